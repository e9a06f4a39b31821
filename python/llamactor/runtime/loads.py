"""One load of a runtime, from the reference to a model that can be found, and those who want it.

Theory of operation. A `Job` runs in a task of its own. Every call that asked for its model has a
`Share` of it, which is what the `Loading` that was given out refers to; the job goes on while
anybody's share is alive. A model that has arrived is held for each share until it was delivered,
and then for as long as the caller runs without suspending: what is called on it at once finds it.
Whoever finds the model later takes a share of the same job: it goes when all have given up, unless
somebody has got it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from llamactor.errors import InsufficientMemoryError, LoadCancelledError
from llamactor.loading import Loading, LoadProgress, NativeLoad, Stage
from llamactor.prediction import report_to_loop
from llamactor.runtime.core import RuntimeCore, Waiting
from llamactor.runtime.estimate import Wanted, read_usages
from llamactor.runtime.memory import HOST, Usages
from llamactor.runtime.residents import Resident

if TYPE_CHECKING:
    from llamactor._work import Lease
    from llamactor.model import Model
    from llamactor.options import GenerationOptions
    from llamactor.runtime.estimate import Estimate
    from llamactor.runtime.handle import ModelHandle

DOWNLOAD_SHARE = 0.5
"""Of the fraction, where a model has to be downloaded first."""


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody asked a runtime to load."""

    ref: str
    """The model."""
    identifier: str | None = None
    """The name it shall have; None is a free one made of the model's own."""
    preset: str | None = None
    """Name of a preset whose options lie below those of the call."""
    ttl: float | None = None
    """Seconds of idleness after which it goes."""
    keep: bool = False
    """Whether it never goes to make room."""
    options: Mapping[str, Any] = {}
    """Load options of the call."""
    replaces: Resident | None = None
    """The model that it takes the place of."""
    drain: bool = True
    """Whether that model finishes what runs there."""


class Prepared(msgspec.Struct, frozen=True):
    """A request whose file and options are known."""

    wanted: Wanted
    """How it is loaded."""
    identifier: str
    """The name it will have."""
    defaults: GenerationOptions
    """What its predictions use unless they have their own."""


Prepare = Callable[["Job"], Any]
"""A coroutine function that finds file, options and name of what a job asks for."""


class Job:
    """A load under way."""

    def __init__(self, core: RuntimeCore, request: LoadRequest, prepare: Prepare) -> None:
        """Start it."""
        self.core = core
        self.request = request
        self.loop = core.bind_loop()
        self.identifier = request.identifier
        self.done = False
        self.stopped = False
        """Whether it was cancelled, and only ends what it has begun."""
        self.taken = False
        """Whether somebody has got its model."""
        self.progress = LoadProgress("resolving", 0.0)
        self.resident: Resident | None = None
        self.error: BaseException | None = None
        self.shares: set[Share] = set()
        """Of those who have not got it yet."""
        self._prepare = prepare
        self._base = 0.0
        self._callbacks: list[Callable[[], object]] = []
        self._watchers: set[asyncio.Future[None]] = set()
        self._task = core.spawn(self._run(), f"load {request.ref}")
        self._task.add_done_callback(self._ended)

    # --- what shares see --------------------------------------------------------------------------

    async def change(self) -> None:
        """Wait until something changes; cancelling this stops the wait only."""
        watcher = self.loop.create_future()
        self._watchers.add(watcher)
        try:
            await watcher
        finally:
            self._watchers.discard(watcher)

    def changed(self) -> None:
        """Wake whoever waits for a change."""
        for watcher in self._watchers:
            if not watcher.done():
                watcher.set_result(None)
        self.core.changed()

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call `callback` when it has ended."""
        self._callbacks.append(callback)

    def take(self, share: Share) -> None:
        """One has got the model: it stays, whoever gives up."""
        self.taken = True
        self.shares.discard(share)

    def drop(self, share: Share) -> None:
        """One does not want it any more; the last one stops it."""
        self.shares.discard(share)
        self._stop_if_unwanted()
        self.changed()

    def stop(self) -> None:
        """Cancel it; once, since another time would break off what it waits for then."""
        if not self.stopped:
            self.stopped = True
            self._task.cancel()

    def _stop_if_unwanted(self) -> None:
        """Stop it, or unload what it has loaded, if everybody has given up."""
        if self.shares or self.taken or self.loop.is_closed():
            return
        if not self.done:
            self.stop()
        elif self.resident is not None and not self.resident.leaving:
            _ = self.core.begin_unloading(self.resident)

    def downloaded(self, fraction: float) -> None:
        """So much of the file is here; what is here at once is no download."""
        if fraction < 1 or self._base:
            self._base = DOWNLOAD_SHARE
            self._advance("downloading", DOWNLOAD_SHARE * fraction)

    # --- how --------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            self.resident = await self._load()
            self._advance("ready", 1.0)
        except asyncio.CancelledError:
            pass  # `_ended` says so, also where this was never begun
        except Exception as error:
            self.error = error

    def _ended(self, _: asyncio.Task[None]) -> None:
        if self.resident is None and self.error is None:
            self.error = LoadCancelledError(
                f"loading {self.request.ref!r} was cancelled; nothing stays loaded"
            )
        self.done = True
        for callback in self._callbacks:
            callback()
        self._stop_if_unwanted()  # the last one left when there was nothing to stop any more
        self.changed()

    async def _load(self) -> Resident:
        prepared: Prepared = await self._prepare(self)
        ref, replaces = self.request.ref, self.request.replaces
        found = await self.core.estimate(prepared.wanted, replaces)
        waiting = Waiting(prepared.identifier, found.usages, replaces)
        try:
            await self.core.admit(ref, found, waiting, self._wait)
            model = await self._load_native(found.wanted)
        except BaseException as error:
            self.core.withdraw(waiting)
            if isinstance(error, InsufficientMemoryError) and error.plan is None:
                plan = await self.core.plan(ref, found, replaces)
                error.plan = msgspec.structs.replace(plan, fits=False)
            raise
        return self._settle(prepared, found, waiting, model)

    async def _load_native(self, wanted: Wanted) -> Model:
        native = NativeLoad(self.loop, wanted.path, wanted.load, wanted.context)
        loading = Loading(native)
        try:
            async for progress in loading:
                if not native.done and progress.stage != "resolving":  # that is over
                    share = 1.0 - self._base
                    self._advance(progress.stage, self._base + share * progress.fraction)
            return native.deliver()
        except asyncio.CancelledError:
            loading.cancel()
            await native.gone()
            raise

    def _settle(
        self, prepared: Prepared, found: Estimate, waiting: Waiting, model: Model
    ) -> Resident:
        """Without suspending: a model is either found and paid for, or not there."""
        core, request = self.core, self.request
        usages = _measured(model, found.usages)
        epoch = core.residents.next_epoch()
        resident = Resident(prepared.identifier, request.ref, found.wanted, model, usages, epoch)
        resident.job = self
        resident.defaults = prepared.defaults
        resident.ttl, resident.keep = request.ttl, request.keep
        before = core.settle(resident, waiting)
        self.taken = request.replaces is not None  # by all who have the name
        if before is not None:
            _ = core.finish_unloading(before, drain=request.drain)
        for share in self.shares:
            share.hold(resident)
        return resident

    def _wait(self, position: int) -> None:
        fraction = self.progress.fraction
        self._show(LoadProgress("waiting", fraction, position))

    def _advance(self, stage: Stage, fraction: float) -> None:
        """1.0 is said once, when the model can be found."""
        bounded = fraction if stage == "ready" else min(fraction, 0.999)
        self._show(LoadProgress(stage, max(bounded, self.progress.fraction)))

    def _show(self, progress: LoadProgress) -> None:
        if progress != self.progress:
            self.progress = progress
            self.changed()


def _measured(model: Model, planned: Usages) -> dict[str, Any]:
    """What the buffers really take, with what was planned for the rest."""
    native = model._context  # noqa: SLF001 -- for this
    if native is None:
        return dict(planned)
    buffers: Any = native.info()["usages"]
    usages = read_usages(buffers)
    host = usages.get(HOST)
    if host is None:
        return dict(planned)
    before = planned[HOST]
    weights = max(host.weights, before.weights)  # adapters have buffers of their own
    whole = msgspec.structs.replace(host, weights=weights, overhead=before.overhead)
    return usages | {HOST: whole}


class Share:
    """What a `Loading` of a runtime refers to: one caller's interest in a job."""

    def __init__(self, job: Job, handle: Callable[[Resident], ModelHandle], *, owns: bool) -> None:
        """Take part in `job`; who `owns` the model unloads it at the end of ``async with``."""
        self.loop = job.loop
        self.ref = job.request.ref
        self.delivered = False
        self._job = job
        self._handle = handle
        self._owns = owns
        self._cancelled = False
        self._retrieved = False
        self._lease: Lease | None = None
        self._blocks: list[Lease] = []
        job.shares.add(self)
        if job.resident is not None:
            self.hold(job.resident)

    @property
    def done(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self._cancelled or self._job.done

    @property
    def progress(self) -> LoadProgress:
        """How far it is."""
        return self._job.progress

    async def change(self) -> None:
        """Wait until something changes; cancelling this stops the wait only."""
        await self._job.change()

    def hold(self, resident: Resident) -> None:
        """Keep the model for the caller until it was delivered."""
        self._lease = resident.model._work.begin()  # noqa: SLF001 -- for this

    def deliver(self) -> ModelHandle:
        """Return the model or raise why there is none."""
        self.raise_failure()
        resident = self._job.resident
        assert resident is not None
        self.delivered = True
        self._job.take(self)
        if self._lease is not None:
            # Not now: what the caller does with it at once must find it.
            self.loop.call_soon(self._lease.release)
            self._lease = None
        return self._handle(resident)

    def raise_failure(self) -> None:
        """Raise the failure, if it failed."""
        error = self._job.error
        if self._cancelled:
            error = LoadCancelledError(f"loading {self.ref!r} was cancelled by its caller")
        if error is not None:
            self._retrieved = True
            raise error.with_traceback(None)

    def cancel(self) -> None:
        """Want it no more; the load stops, or its model goes, when nobody else wants it."""
        if self.delivered or self._cancelled or self._job.error is not None:
            return
        self._cancelled = True
        if self._lease is not None:
            self._lease.release()
        self._job.drop(self)

    def abandon(self) -> None:
        """Nobody refers to it any more: stop, and report a failure that nobody saw."""
        error = self._job.error
        if error is not None and not self._cancelled and not self._retrieved:
            message = f"loading {self.ref!r} failed and nobody retrieved the failure"
            report_to_loop(self.loop, {"message": message, "exception": error})
        self._retrieved = True
        self.cancel()

    def enter(self) -> None:
        """Hold the model until the block is left."""
        resident = self._job.resident
        assert resident is not None
        self._blocks.append(resident.model._work.begin())  # noqa: SLF001 -- for this

    async def leave(self) -> None:
        """Unload a model of one's own, let another go; cancelling is as with `Runtime.unload`."""
        if self._blocks:
            self._blocks.pop().release()
        resident = self._job.resident
        if self._owns and resident is not None and not resident.leaving:
            await self._job.core.unloaded(resident, drain=False)
