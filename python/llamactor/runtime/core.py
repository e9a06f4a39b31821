"""What a runtime keeps: its models, who waits for memory, what is idle, and who wants to know.

Theory of operation. Everything here happens on one event loop, and decisions are made without
suspending: a model that is found idle, taken from those that can be found and told to close cannot
begin anything in between. Memory counts from the moment it is promised to a load until the model
that had it is closed, so the sum never exceeds the limit, not even while models change places.

Loads that need memory stand in one line, first come, first served. The first of them takes the
models that were idle longest; where that is not enough it waits until something becomes idle.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import deque
from typing import TYPE_CHECKING, Any

from llamactor._hub import call_on_loop, check_loop, running_loop
from llamactor.errors import BusyError, ClosedError, InsufficientMemoryError, StoreError
from llamactor.prediction import report_to_loop
from llamactor.runtime.estimate import Estimate, estimate, suggest
from llamactor.runtime.memory import (
    HOST,
    Budget,
    MemoryPlan,
    Usages,
    in_words,
    read_budget,
    total_by_device,
)
from llamactor.runtime.residents import Resident, Residents

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from llamactor.runtime.estimate import Wanted
    from llamactor.store import ModelStore


class Waiting:
    """A load that wants memory, or has it promised."""

    def __init__(self, identifier: str, usages: Usages, spared: Resident | None) -> None:
        """Want so much; `spared` must not go for it."""
        self.identifier = identifier
        self.usages = usages
        self.spared = spared


class RuntimeCore:
    """The state of a `Runtime`."""

    def __init__(self, limit: float | int | None, store: ModelStore) -> None:
        """Begin with nothing loaded."""
        self.limit = limit
        self.store = store
        self.residents = Residents()
        self.line: deque[Waiting] = deque()
        self.promised: set[Waiting] = set()
        self.closed = False
        self.version = 0
        """Grows with every change."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watchers: set[asyncio.Future[None]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timers: dict[Resident, asyncio.TimerHandle] = {}

    # --- the loop ---------------------------------------------------------------------------------

    def bind_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop that it belongs to: the one it is first used in.

        Raises:
            RuntimeError: another loop runs, or none.
            ClosedError: the runtime was closed.
        """
        if self._loop is None:
            self._loop = running_loop("a runtime")
        check_loop(self._loop, "a runtime")
        if self.closed:
            raise ClosedError("the runtime was closed")
        return self._loop

    @property
    def now(self) -> float:
        """The clock of the loop, in seconds."""
        return 0.0 if self._loop is None else self._loop.time()

    def spawn(self, work: Coroutine[Any, Any, object], name: str) -> asyncio.Task[Any]:
        """Do something beside; the loop itself refers to tasks weakly."""
        task = self.bind_loop().create_task(work, name=f"llamactor {name}")
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            message = f"llamactor: {task.get_name()} failed"
            report_to_loop(task.get_loop(), {"message": message, "exception": error})

    def changed(self) -> None:
        """Wake whoever waits for a change."""
        self.version += 1
        watchers, self._watchers = self._watchers, set()
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)

    async def change(self) -> None:
        """Wait until something changes."""
        watcher = asyncio.get_running_loop().create_future()
        self._watchers.add(watcher)
        try:
            await watcher
        finally:
            self._watchers.discard(watcher)

    # --- memory -----------------------------------------------------------------------------------

    @property
    def usages(self) -> list[Usages]:
        """What is in use or promised, by model."""
        held: list[Usages] = [resident.usages for resident in self.residents.all]
        return [*held, *(waiting.usages for waiting in self.promised)]

    @property
    def planned_bytes(self) -> int:
        """What is in use or promised in all."""
        return sum(total_by_device(self.usages).values())

    async def budget(self) -> Budget:
        """Return what the models may take now."""
        held = total_by_device(self.usages)
        return await asyncio.to_thread(read_budget, self.limit, held)

    async def estimate(self, wanted: Wanted, spared: Resident | None = None) -> Estimate:
        """Return what a model would take, sized to what can ever be free for it."""
        budget = await self.budget()
        return await estimate(wanted, functools.partial(self._fits_ever, budget, spared))

    def _staying(self, spared: Resident | None) -> list[Resident]:
        """The models that never go for others, with the one that must not go for this."""
        return [one for one in self.residents if one.keep or one is spared]

    def _fits_ever(self, budget: Budget, spared: Resident | None, usages: Usages) -> bool:
        return budget.excess([*(one.usages for one in self._staying(spared)), usages]) == 0

    async def plan(self, ref: str, found: Estimate, spared: Resident | None = None) -> MemoryPlan:
        """Return what loading it would mean now."""
        budget = await self.budget()
        evicted = self._evictions(budget, found.usages, spared)
        waits = () if evicted is not None else self._awaited(budget, found.usages, spared)
        suggestion = None
        if evicted is None and waits is None:
            fits = functools.partial(self._fits_ever, budget, spared)
            suggestion = await suggest(found, fits)
        used = sum(total_by_device(self.usages).values())
        size: Any = found.wanted.context.context_size
        return MemoryPlan(
            ref=ref,
            path=found.wanted.path,
            context_size=size,
            gpu_layers=found.layers,
            per_device=dict(found.usages),
            fits=evicted is not None,
            evicts=tuple(resident.identifier for resident in evicted or ()),
            waits_for=waits or (),
            free_bytes=None if budget.total is None else max(0, budget.total - used),
            suggestion=suggestion,
        )

    def _evictions(
        self, budget: Budget, usages: Usages, spared: Resident | None
    ) -> list[Resident] | None:
        """The fewest idle models to unload for it, those used longest ago first; None if never."""
        candidates = [one for one in self.residents.evictable() if one is not spared]
        going: list[Resident] = []
        while self._excess(budget, usages, going):
            if not candidates:
                return None
            going.append(candidates.pop(0))
        for resident in reversed(going[:-1]):
            fewer = [one for one in going if one is not resident]
            if not self._excess(budget, usages, fewer):
                going = fewer
        return going

    def _excess(self, budget: Budget, usages: Usages, without: Iterable[Resident]) -> int:
        gone = set(without)
        staying = [one.usages for one in self.residents.all if one not in gone]
        promised = [waiting.usages for waiting in self.promised]
        return budget.excess([*staying, *promised, usages])

    def _awaited(
        self, budget: Budget, usages: Usages, spared: Resident | None
    ) -> tuple[str, ...] | None:
        """The models that have to become idle first; None if that would not help either."""
        if not self._fits_ever(budget, spared, usages):
            return None
        staying = self._staying(spared)
        going = [one.identifier for one in self.residents.all if one not in staying]
        return (*going, *(waiting.identifier for waiting in self.promised))

    async def admit(
        self, ref: str, found: Estimate, waiting: Waiting, on_wait: Callable[[int], None]
    ) -> None:
        """Wait in line until memory is promised; cancelling this leaves the line.

        Raises:
            InsufficientMemoryError: it can never be had, whatever becomes idle.
        """
        self.line.append(waiting)
        try:
            while not await self._try_admit(ref, found, waiting):
                on_wait(self.line.index(waiting) + 1)
                await self.change()
        finally:
            self.line.remove(waiting)
            self.changed()

    async def _try_admit(self, ref: str, found: Estimate, waiting: Waiting) -> bool:
        """Promise it memory if it is the first in line and there is some."""
        budget = await self.budget()
        evicted = self._evictions(budget, waiting.usages, waiting.spared)
        if evicted is None and self._awaited(budget, waiting.usages, waiting.spared) is None:
            left = budget.left(one.usages for one in self._staying(waiting.spared))
            raise insufficient(await self.plan(ref, found, waiting.spared), self.limit, left)
        if self.line[0] is not waiting or evicted is None:
            return False
        if evicted:
            # Not gathered: a load that is cancelled here must not cancel the unloading.
            await asyncio.wait([self.begin_unloading(resident) for resident in evicted])
            return await self._try_admit(ref, found, waiting)
        self.promised.add(waiting)
        return True

    # --- coming and going -------------------------------------------------------------------------

    def settle(self, resident: Resident, waiting: Waiting) -> Resident | None:
        """Let a loaded model be found, in the memory that was promised; return what it replaces."""
        self.promised.discard(waiting)
        before = self.residents.bind(resident)
        listener = functools.partial(
            call_on_loop, self.bind_loop(), functools.partial(self.used, resident)
        )
        resident.model._work.listener = listener  # noqa: SLF001 -- for this
        self.used(resident)
        _ = self.spawn(self._note(resident.ref, uses=1, tokens=0), f"count {resident.identifier}")
        return before

    def withdraw(self, waiting: Waiting) -> None:
        """Give back what was promised."""
        if waiting in self.promised:
            self.promised.discard(waiting)
            self.changed()

    def used(self, resident: Resident) -> None:
        """Note that something at a model has begun or ended, or was asked of it."""
        resident.idle_since = self.now
        self.residents.used(resident)
        self._arm(resident)
        self.changed()

    def _arm(self, resident: Resident) -> None:
        """Look again when its time to live may be over."""
        loop = self._loop
        if resident.ttl is None or resident.busy or resident.leaving or resident in self._timers:
            return
        if loop is not None and not loop.is_closed():  # what runs on other loops may outlive it
            due = resident.idle_since + resident.ttl
            self._timers[resident] = loop.call_at(due, self._expire, resident)

    def _expire(self, resident: Resident) -> None:
        self._timers.pop(resident, None)
        if resident.ttl is None or resident.busy or resident.leaving or self.closed:
            return
        if self.now < resident.idle_since + resident.ttl:
            self._arm(resident)
        else:
            _ = self.begin_unloading(resident)

    def begin_unloading(self, resident: Resident, *, drain: bool = True) -> asyncio.Task[Any]:
        """Let nobody find it, and close it once what runs there has ended, or at once.

        Raises:
            RuntimeError: another loop runs, or none; nothing has changed then.
        """
        _ = self.bind_loop()
        self.residents.unbind(resident)
        self.changed()
        return self.finish_unloading(resident, drain=drain)

    async def unloaded(self, resident: Resident, *, drain: bool) -> None:
        """Unload a model; cancelling this stops the waiting only."""
        await asyncio.wait([self.begin_unloading(resident, drain=drain)])

    def finish_unloading(self, resident: Resident, *, drain: bool) -> asyncio.Task[Any]:
        """Close a model that nobody finds any more."""
        if timer := self._timers.pop(resident, None):
            timer.cancel()
        return self.spawn(self._close(resident, drain=drain), f"unload {resident.identifier}")

    def refuse_if_busy(self, resident: Resident) -> None:
        """Raise `BusyError` if something runs at a model."""
        if resident.busy:
            raise BusyError(
                f"{resident.identifier!r} is at work for {resident.model._work.leases} "  # noqa: SLF001
                "predictions, contexts or blocks; drain=True waits for them"
            )

    async def _close(self, resident: Resident, *, drain: bool) -> None:
        try:
            while drain and resident.busy and not self.closed:
                await self.change()
        finally:
            # Also when the loop is being shut down: the weights must go.
            try:
                await resident.model.aclose()
            finally:
                self.residents.gone(resident)
                self.changed()
        work = resident.model._work  # noqa: SLF001 -- for this
        await self._note(resident.ref, uses=0, tokens=work.predicted_tokens)

    async def _note(self, ref: str, *, uses: int, tokens: int) -> None:
        """Count in the store; what cannot be counted works all the same."""
        with contextlib.suppress(StoreError, BusyError, OSError):
            await self.store.note_use(ref, uses=uses, tokens=tokens)

    def close(self) -> None:
        """Let every model close, whatever runs there."""
        for resident in self.residents:
            _ = self.begin_unloading(resident, drain=False)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self.closed = True
        self.changed()  # those that drain need not wait any longer

    async def ended(self) -> None:
        """Wait until everything that was started has ended; cancelling stops the waiting only."""
        if self._loop is not None and self._tasks:
            check_loop(self._loop, "a runtime")
            await asyncio.wait(self._tasks)


def insufficient(
    plan: MemoryPlan, limit: float | int | None, left: dict[str, int]
) -> InsufficientMemoryError:
    """Return the error that says what was wanted, what there is, and what would work.

    Args:
        plan: What was wanted.
        limit: Of the runtime.
        left: What the models that stay leave of each budget, as `Budget.left` has it.
    """
    share = f" ({limit:.0%} of the memory)" if isinstance(limit, float) else ""
    taken = total_by_device([plan.per_device]) | {"": plan.total_bytes}
    device = max(left, key=lambda name: taken.get(name, 0) - left[name])
    room = in_words(left[device]) if left[device] > 0 else "nothing"
    if device in {"", HOST}:
        wanted, there = in_words(taken[device]), f"memory_limit{share} leaves {room}"
    else:
        wanted, there = f"{in_words(taken[device])} on {device}", f"that has {room}"
    error = InsufficientMemoryError(
        f"{plan.ref!r} with context_size={plan.context_size} takes {wanted}, and {there} beside "
        f"the models that stay; {_advice(plan)} fit"
    )
    error.plan = plan
    return error


def _advice(plan: MemoryPlan) -> str:
    if plan.suggestion is None:
        return "a smaller model or quantisation may"
    options = ", ".join(f"{name}={value!r}" for name, value in plan.suggestion.items())
    return f"{options} would"
