"""A line: callers are served one at a time, in the order of their calls.

Unlike with `asyncio.Lock`, a place is taken when `join` is called, not when a task first runs. So
the order is that of the calls, whoever waits in a task of its own and whoever in the caller's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


class Line:
    """Who waits, and who is served: the first."""

    def __init__(self) -> None:
        """Begin with nobody."""
        self._places: deque[Place] = deque()

    def join(self) -> Place:
        """Return a place at the end; its holder must `leave` it, whatever happens."""
        place = Place(self)
        self._places.append(place)
        self.serve()
        return place

    def leave(self, place: Place) -> None:
        """Take a place away, wherever in the line it is."""
        if place in self._places:
            self._places.remove(place)
            self.serve()

    def serve(self) -> None:
        """Call the first one, who may have been called before."""
        if self._places:
            self._places[0].call()


class Place:
    """A place in a line: enter it with ``async with`` to be served and then leave."""

    __slots__ = ("_called", "_line")

    def __init__(self, line: Line) -> None:
        """Wait at the end of `line`."""
        self._line = line
        self._called = asyncio.Event()

    def call(self) -> None:
        """Let its holder go on."""
        self._called.set()

    async def reached(self) -> None:
        """Wait to be first. Cancelling this does not leave the line."""
        await self._called.wait()

    def leave(self) -> None:
        """Let the next one be served; idempotent."""
        self._line.leave(self)

    async def __aenter__(self) -> None:
        """Wait to be first. Cancelling this leaves the line."""
        try:
            await self._called.wait()
        except BaseException:
            self.leave()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave; never suspends."""
        self.leave()
