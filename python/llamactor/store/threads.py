"""Blocking work off the event loop, in a thread of its own that can be told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


class StoppedError(Exception):
    """Raised in a thread by `Stop.check`; nobody else sees it."""


class Stop:
    """Tells a thread that nobody waits for its work any more."""

    def __init__(self) -> None:
        """Make one that is not set."""
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._action: Callable[[], object] | None = None

    def set(self) -> None:
        """Ask the thread to stop."""
        with self._lock:
            self._event.set()
            if self._action is not None:
                self._action()

    def check(self) -> None:
        """Raise `StoppedError` if the thread is to stop."""
        if self._event.is_set():
            raise StoppedError

    def wait(self, seconds: float) -> None:
        """Sleep, at most until the thread is to stop; raises `StoppedError` then."""
        self._event.wait(seconds)
        self.check()

    @contextlib.contextmanager
    def calling(self, action: Callable[[], object]) -> Iterator[None]:
        """Call `action` from the thread that sets this, while the block runs; raises if set."""
        with self._lock:
            self.check()
            self._action = action
        try:
            yield
        finally:
            with self._lock:
                self._action = None


class _Outcome(Generic[T]):
    """What a thread has come to, on its way to a future."""

    def __init__(self, future: asyncio.Future[T]) -> None:
        self._future = future
        self._loop = future.get_loop()

    def run(self, work: Callable[[Stop], T], stop: Stop) -> None:
        try:
            result = work(stop)
        except BaseException as error:
            self._settle(lambda error=error: self._future.set_exception(error))  # type: ignore[misc]
        else:
            self._settle(lambda: self._future.set_result(result))

    def _settle(self, action: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits
            self._loop.call_soon_threadsafe(action)


async def off_loop(work: Callable[[Stop], T], *, abandon: bool = False) -> T:
    """Run `work` in a thread of its own and return what it returns, or raise what it raises.

    Cancelling this asks the work to stop and waits until it has; cancelling once more does not
    wait, and neither does cancelling work to `abandon`, which leaves nothing behind whenever it
    ends. The thread does not hold up the end of the interpreter.
    """
    stop = Stop()
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    outcome = _Outcome(future)
    thread = threading.Thread(
        target=outcome.run, args=(work, stop), name="llamactor-store", daemon=True
    )
    thread.start()
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop.set()
        future.add_done_callback(lambda future: future.exception())  # whatever it was, it is seen
        if not abandon:
            await asyncio.wait([future])
        raise
