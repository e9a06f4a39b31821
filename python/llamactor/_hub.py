"""One native hub per event loop: how news from Rust threads reaches the loop.

Theory of operation. Rust threads never call Python. They put the id of whatever has news (a
prediction that can be read on, a call that is done) on the hub of its loop, and when the hub goes
from empty to non-empty they write one descriptor. The loop watches that descriptor, drains the ids
and calls the listener of each: one wake-up per decode step for everything on that loop. A pass
handles a bounded number of ids, so that a flood cannot starve the loop.

A loop that cannot watch descriptors (Windows Proactor) gets one daemon thread that waits for the
descriptor and calls `call_soon_threadsafe` once per wake-up.

Listeners are internal state, never a handle of the user's; nothing here keeps a loop alive, and the
descriptor is closed when its loop is closed or gone.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import sys
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, TypeVar

from llamactor import _core
from llamactor.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

MAX_IDS_PER_PASS = 256
"""How many ids one turn of the loop handles; the rest waits for the next turn."""


class LoopHub:
    """The hub of one loop; all methods but `forget` belong to the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Open the native hub and let `loop` watch it."""
        self.native = _core.Hub()
        self._loop = weakref.ref(loop)
        self._listeners: dict[int, Callable[[], None]] = {}
        self._backlog: deque[int] = deque()
        self._continuing = False
        self._close = self._watch(loop)
        # The loop holds this object through its reader, and the finaliser must not hold it back.
        weakref.finalize(loop, self._close).atexit = False

    def listen(self, ident: int, listener: Callable[[], None]) -> None:
        """Call `listener` on the loop whenever `ident` has news."""
        self._listeners[ident] = listener

    def forget(self, ident: int) -> None:
        """Stop listening; safe from any thread and for an unknown id."""
        self._listeners.pop(ident, None)

    def close_if_loop_closed(self) -> bool:
        """Close the descriptor if the loop can never drain it again."""
        loop = self._loop()
        if loop is not None and not loop.is_closed():
            return False
        self._close()
        return True

    def _watch(self, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
        try:
            loop.add_reader(self.native.fileno(), self._on_news)
        except NotImplementedError:
            return _Dispatcher(loop, self.native, weakref.WeakMethod(self._on_news)).stop
        return self.native.close

    def _on_news(self) -> None:
        self._backlog.extend(self.native.drain())
        if not self._continuing:
            self._deliver()

    def _deliver(self) -> None:
        backlog, listeners = self._backlog, self._listeners
        for _ in range(min(len(backlog), MAX_IDS_PER_PASS)):
            listener = listeners.get(backlog.popleft())
            if listener is not None:
                self._call(listener)
        self._continuing = bool(backlog)
        if backlog and (loop := self._loop()) is not None:
            loop.call_soon(self._deliver)

    def _call(self, listener: Callable[[], None]) -> None:
        try:
            listener()
        except Exception as error:  # one broken listener must not swallow the news of the others
            loop = self._loop()
            if loop is not None:
                loop.call_exception_handler(
                    {"message": "llamactor: a listener failed", "exception": error}
                )


class _Dispatcher:
    """A thread that waits for the descriptor on behalf of a loop that cannot."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        native: _core.Hub,
        on_news: weakref.WeakMethod[Callable[[], None]],
    ) -> None:
        self._loop = weakref.ref(loop)
        self._native = native
        self._on_news = on_news
        self._handled = threading.Event()
        self._stopped, self._stop = socket.socketpair()
        threading.Thread(target=self._run, name="llamactor-hub", daemon=True).start()

    def stop(self) -> None:
        """Let the thread end; it closes the descriptor itself, since it may be waiting on it."""
        self._stop.close()
        self._handled.set()

    def _run(self) -> None:
        while self._wait_for_news() and self._hand_over():
            self._handled.wait()
            self._handled.clear()
        self._native.close()
        self._stopped.close()

    def _wait_for_news(self) -> bool:
        stopped = self._stopped.fileno()
        readable, _, _ = select.select([self._native.fileno(), stopped], [], [])
        return stopped not in readable

    def _hand_over(self) -> bool:
        loop = self._loop()
        if loop is None:
            return False
        try:
            loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop was closed
            return False
        return True

    def _deliver(self) -> None:
        on_news = self._on_news()
        if on_news is not None:
            on_news()
        self._handled.set()


_hubs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopHub] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_forked = False


def running_loop(what: str) -> asyncio.AbstractEventLoop:
    """Return the running loop, or raise `RuntimeError` saying that `what` needs one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        require_own_process()
        raise RuntimeError(
            f"{what} needs a running asyncio event loop; call it from a coroutine"
        ) from None


def check_loop(loop: asyncio.AbstractEventLoop, what: str) -> None:
    """Raise `RuntimeError` unless `loop` is the running one."""
    if running_loop(what) is not loop:
        require_own_process()
        raise RuntimeError(
            f"{what} is bound to the event loop it was created in, which is not the running one"
        )


def finalisers_rest() -> bool:
    """Whether finalisers have nothing to do any more: the interpreter ends, or this is a fork."""
    return _forked or sys.is_finalizing()


def call_on_loop(loop: asyncio.AbstractEventLoop, action: Callable[[], object]) -> None:
    """Run `action` on the thread of `loop`: now if this is it or the loop is closed, else soon."""
    try:
        elsewhere = asyncio.get_running_loop() is not loop
    except RuntimeError:
        elsewhere = True
    if elsewhere:
        try:
            loop.call_soon_threadsafe(action)
        except RuntimeError:  # the loop is closed
            pass
        else:
            return
    action()


def hub_for(loop: asyncio.AbstractEventLoop) -> LoopHub:
    """Return the hub of `loop`, which must be the running loop."""
    hub = _hubs.get(loop)
    if hub is None or _forked:
        hub = _open_hub(loop)
    return hub


def require_own_process() -> None:
    """Raise `ClosedError` in a forked child."""
    if _forked:
        raise ClosedError(
            "this process was forked after llamactor started; start it anew in the child (spawn)"
        )


def _open_hub(loop: asyncio.AbstractEventLoop) -> LoopHub:
    require_own_process()
    with _lock:
        for other, hub in list(_hubs.items()):
            if hub.close_if_loop_closed():
                del _hubs[other]
        hub = _hubs[loop] = LoopHub(loop)
    return hub


async def finish(
    hub: LoopHub,
    call: _core.Call[T],
    *,
    discard: Callable[[T], object] | None = None,
    cancellable: bool = True,
) -> T:
    """Wait for a native call and return its value, or raise its error.

    Cancelling this cancels the call if it is `cancellable`; a value that arrives all the same goes
    to `discard`.
    """
    if not call.done:
        waiter = asyncio.get_running_loop().create_future()
        hub.listen(call.id, lambda: _settle(call, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            if cancellable:
                call.cancel()
            _abandon(hub, call, discard)
            raise
        hub.forget(call.id)
    return call.take()


def _settle(call: _core.Call[T], waiter: asyncio.Future[None]) -> None:
    if call.done and not waiter.done():
        waiter.set_result(None)


def _abandon(hub: LoopHub, call: _core.Call[T], discard: Callable[[T], object] | None) -> None:
    """Throw the outcome of `call` away, now or when it arrives."""

    def throw_away() -> None:
        if not call.done:
            return
        hub.forget(call.id)
        try:
            value = call.take()
        except Exception:
            return  # the caller was cancelled and asked for no outcome
        if discard is not None:
            discard(value)

    hub.listen(call.id, throw_away)
    throw_away()


def _after_fork_in_child() -> None:
    global _forked, _lock
    _forked = True
    _lock = threading.Lock()  # it may have been held by a thread that does not exist here
    _core.after_fork_in_child()


def _register_fork_guard() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork_in_child)


_register_fork_guard()
