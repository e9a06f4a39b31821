"""The pattern of a factory that can be awaited or entered."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import TracebackType


class Closable(Protocol):
    """Anything with an `aclose`."""

    async def aclose(self) -> None:
        """Release what it owns."""


T = TypeVar("T", bound=Closable)


class Opening(Coroutine[Any, Any, T]):
    """A coroutine that opens something, and an async context manager that opens and closes it.

    Use it once: ``thing = await opening`` or ``async with opening as thing``. Being a coroutine it
    also goes into `asyncio.create_task` and warns when it is never awaited. Cancelling it leaves
    nothing open.
    """

    __slots__ = ("_coroutine", "_opened")

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        """Wrap the coroutine that does the work."""
        self._coroutine = coroutine
        self._opened: T | None = None

    def send(self, value: Any) -> Any:
        """Resume the coroutine."""
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise inside the coroutine."""
        return self._coroutine.throw(*error)

    def close(self) -> None:
        """End the coroutine before it has finished."""
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, T]:
        """Open, and leave closing to the caller; cancelling leaves nothing open."""
        return self._coroutine.__await__()

    async def __aenter__(self) -> T:
        """Open; cancelling leaves nothing open."""
        self._opened = await self._coroutine
        return self._opened

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close what was opened; cancelling is as with its `aclose`."""
        if self._opened is not None:
            await self._opened.aclose()
