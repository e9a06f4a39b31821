"""A context: many sequences that share one memory and one decoder thread."""

from __future__ import annotations

import asyncio
import warnings
from typing import TYPE_CHECKING, Any

import msgspec

from llamactor import _checks as check
from llamactor._home import Home
from llamactor._hub import finalisers_rest, finish, hub_for, running_loop
from llamactor._opening import Opening
from llamactor.sequence import Sequence

if TYPE_CHECKING:
    from types import TracebackType

    from llamactor import _core
    from llamactor._work import Lease


class ContextStats(msgspec.Struct, frozen=True):
    """What a context holds and has done since it was opened; a snapshot."""

    cells_total: int
    """Memory cells; one holds a token, for one sequence or for several that share it."""
    cells_used: int
    """Cells that hold a token."""
    cells_free: int
    """Cells that hold none."""
    sequences_total: int
    """Sequences there are."""
    sequences_active: int
    """Sequences somebody holds."""
    sequences_waiting: int
    """Callers that wait for one."""
    batches: int
    """Decode calls."""
    micro_batches: int
    """Micro-batches evaluated."""
    evaluated_tokens: int
    """Tokens evaluated, for prompts and generation."""
    prompt_tokens: int
    """Tokens evaluated for prompts."""
    decoded_tokens: int
    """Tokens evaluated for generation."""
    cached_tokens: int
    """Prompt tokens found in the cache instead of being evaluated."""
    copied_tokens: int
    """Of those, tokens found in another sequence."""
    shifted_tokens: int
    """Tokens dropped to make room."""
    preemptions: int
    """Times a prediction had to give its cells up for a while."""
    evictions: int
    """Times an idle sequence lost its cached tokens."""
    parked_states: int
    """States of chats kept outside of the cells."""
    parked_bytes: int
    """Host memory that they take."""
    parked_disk_bytes: int
    """Disk that they take."""
    restored_tokens: int
    """Tokens that came back from parked states instead of being evaluated."""
    occupancy: float
    """Share of the cells in use, 0 to 1."""
    decode_time: float
    """Seconds spent in decode calls."""


class Context:
    """One llama.cpp context; serves any event loop and outlives the one that opened it."""

    def __init__(
        self,
        native: _core.Context,
        model: _core.Model,
        owner: object,
        chat_template: str | None = None,
        lease: Lease | None = None,
    ) -> None:
        """Wrap an open native context; made by `Model.create_context`."""
        self._native = native
        self._model = model
        self._owner = owner
        self._chat_template = chat_template
        self._closing = False
        self._lease = lease
        info: dict[str, Any] = native.info()
        self._size: int = info["context_size"]
        self._sequences: int = info["sequences"]

    @property
    def context_size(self) -> int:
        """Tokens that one sequence may hold."""
        return self._size

    @property
    def sequences(self) -> int:
        """How many sequences it has."""
        return self._sequences

    @property
    def closed(self) -> bool:
        """Whether it or its model was closed."""
        return self._native.closed

    @property
    def stats(self) -> ContextStats:
        """What it holds and has done, as a snapshot."""
        return msgspec.convert(self._native.stats(), ContextStats)

    def sequence(self, *, timeout: float | None = None) -> Opening[Sequence]:
        """Return a sequence, on this caller's turn: ``await`` it or enter it with ``async with``.

        Callers are served in order. Cancelling the wait leaves the queue; a sequence already
        granted goes back.

        Args:
            timeout: Seconds to wait; None has no limit, 0 does not wait.

        Raises:
            TimeoutError: none became free in time.
            ClosedError: the context was closed.
        """
        return Opening(self._acquire(check.check_timeout("timeout", timeout)))

    def try_sequence(self) -> Sequence | None:
        """Return a sequence if one is free and nobody waits, else None; never suspends."""
        running_loop("a sequence")
        native = self._native.try_acquire()
        return None if native is None else Sequence(native, self._home())

    async def _acquire(self, timeout: float | None) -> Sequence:
        sequence = self.try_sequence() if timeout == 0 else await self._queue(timeout)
        if sequence is None:
            raise TimeoutError(
                f"none of the {self._sequences} sequences became free within {timeout} s"
            )
        return sequence

    async def _queue(self, timeout: float | None) -> Sequence | None:
        hub = hub_for(running_loop("a context"))
        try:
            async with asyncio.timeout(timeout):
                native = await finish(
                    hub, self._native.acquire(hub.native, 0), discard=lambda late: late.close()
                )
        except TimeoutError:
            return None
        return Sequence(native, self._home())

    def _home(self) -> Home:
        return Home(self._native, self._model, self._chat_template, self._size, self)

    async def aclose(self) -> None:
        """Close it with all its sequences; idempotent. Their predictions fail with `ClosedError`.

        Cancelling this does not stop the closing, only the waiting for it.
        """
        self._closing = True
        if not self._native.closed:
            hub = hub_for(running_loop("a context"))
            try:
                await finish(hub, self._native.close(hub.native), cancellable=False)
            finally:
                self._end_lease()

    def _end_lease(self) -> None:
        """Let the model go: it is not at work for this context any more."""
        if self._lease is not None:
            self._lease.release()

    async def __aenter__(self) -> Context:
        """Return itself; never suspends."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it, as `aclose` does; cancelling is as there."""
        await self.aclose()

    def __repr__(self) -> str:
        """Return size and state in words."""
        state = "closed" if self.closed else "open"
        return f"<Context of {self._size} tokens, {self._sequences} sequences, {state}>"

    def __del__(self) -> None:
        """Warn of a forgotten context, on whatever thread; dropping the native one releases it."""
        if getattr(self, "_closing", True) or finalisers_rest():
            return
        self._end_lease()
        if self._native.closed:
            return
        warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
