"""A model in use: its layers of options, its load, and the count of its tokens in the store."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, cast

import msgspec

from llamactor.cli.terminal import loaded
from llamactor.loading import load_model
from llamactor.presets import Presets, layered
from llamactor.store import ModelStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from llamactor.model import Model
    from llamactor.options import GenerationKeywords, LoadKeywords
    from llamactor.prediction import PredictionResult


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which model a command was told to use, and how."""

    model: str
    """Reference of the model."""
    loading: LoadKeywords
    """Options of the load that were given."""
    generation: GenerationKeywords
    """Options of its answers that were given."""
    preset: str | None
    """Name of the preset for what was not given."""


class Use:
    """A loaded model, and what it was used for."""

    def __init__(self, model: Model, generation: GenerationKeywords) -> None:
        """Begin to use it; made by `using`."""
        self.model = model
        self.generation = generation
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens that it has generated."""
        return self._tokens

    def note(self, result: PredictionResult) -> None:
        """Count what a prediction has generated."""
        self._tokens += result.stats.predicted_tokens


@contextlib.asynccontextmanager
async def using(wanted: Wanted) -> AsyncIterator[Use]:
    """Load a model for the block, with its progress on stderr, and count what it generates there.

    Options that were not given are those of the preset, then the model's own of the store.
    Cancelling this while it loads leaves nothing loaded.

    Raises:
        PresetNotFoundError: there is no such preset.
        LlamactorError: the model cannot be loaded.
    """
    store = ModelStore()
    preset = None if wanted.preset is None else await Presets().get(wanted.preset)
    load_defaults, generation_defaults = await store.defaults(wanted.model)
    # A command has one conversation at a time.
    options = layered(
        wanted.loading, preset.load if preset else None, load_defaults, {"sequences": 1}
    )
    generation = layered(
        wanted.generation, preset.generation if preset else None, generation_defaults
    )
    async with await loaded(load_model(wanted.model, **options)) as model:
        use = Use(model, cast("GenerationKeywords", generation))
        try:
            yield use
        finally:
            await store.note_use(wanted.model, uses=0, tokens=use.tokens)
