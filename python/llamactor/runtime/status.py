"""What a runtime has and does, as a stream of snapshots."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from llamactor.loading import LoadProgress
    from llamactor.runtime.core import RuntimeCore
    from llamactor.runtime.residents import LoadedModel


class LoadingModel(msgspec.Struct, frozen=True):
    """A load under way; a snapshot."""

    ref: str
    """What was asked for."""
    identifier: str | None
    """The name it will have; None until that is known."""
    progress: LoadProgress
    """How far it is."""


class RuntimeStatus(msgspec.Struct, frozen=True):
    """What a runtime has and does; a snapshot."""

    models: tuple[LoadedModel, ...]
    """The models that are loaded; those that are about to go are last."""
    loading: tuple[LoadingModel, ...]
    """Loads under way, in the order they were asked for."""
    memory_bytes: int
    """What is in use by models, or promised to loads."""
    closed: bool
    """Whether the runtime was closed and everything has gone: the last snapshot."""


class StatusIterator(AsyncIterator[RuntimeStatus]):
    """Iterates over snapshots: the first at once, others when something has changed.

    Changes that come quickly are seen together. It ends when the runtime is closed.
    """

    def __init__(self, core: RuntimeCore, snapshot: Callable[[], RuntimeStatus]) -> None:
        """Look at a runtime; made by `Runtime.status`."""
        self._core = core
        self._snapshot = snapshot
        self._seen: int | None = None
        self._ended = False

    async def __anext__(self) -> RuntimeStatus:
        """Return a snapshot once something has changed; cancelling this loses nothing."""
        if self._ended:
            raise StopAsyncIteration
        while self._seen == self._core.version:
            await self._core.change()
        self._seen = self._core.version
        snapshot = self._snapshot()
        self._ended = snapshot.closed
        return snapshot
