"""What the shell offers after Tab: models, presets, files."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from llamactor.presets import Presets
from llamactor.store import ModelStore
from llamactor.store.refs import DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cyclopts.completion._engine import CompletionContext


def complete_reference(context: CompletionContext) -> list[tuple[str, str]]:
    """Return what can be loaded: names of the store, and files where a path is begun."""
    names = [(DEFAULT_MODEL, "the default model"), *complete_stored(context)]
    return [*dict(names).items(), *((path, "") for path in _paths(context.incomplete))]


def complete_stored(_: CompletionContext) -> list[tuple[str, str]]:
    """Return the names of the store, each with what it is."""
    models = asyncio.run(ModelStore().list())
    return [(model.name, f"{model.architecture} {model.quantization}") for model in models]


def complete_preset(_: CompletionContext) -> list[str]:
    """Return the names of the presets."""
    return [preset.name for preset in asyncio.run(Presets().list())]


def _paths(begun: str) -> Iterator[str]:
    """Yield the folders and model files that a path may go on with."""
    folder, _, name = begun.rpartition("/")
    place = Path(f"{folder}/" if "/" in begun else ".").expanduser()
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path.name.startswith(name) and (path.is_dir() or path.suffix == ".gguf"):
            yield f"{begun.removesuffix(name)}{path.name}{'/' if path.is_dir() else ''}"
