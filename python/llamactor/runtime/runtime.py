"""A runtime: many models in one process, within one budget of memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from llamactor import _checks as check
from llamactor.errors import ModelNotLoadedError
from llamactor.loading import Loading
from llamactor.options import GenerationOptions, LoadKeywords, generation_options, load_options
from llamactor.presets import Preset, Presets, layered
from llamactor.runtime.core import RuntimeCore
from llamactor.runtime.estimate import Wanted
from llamactor.runtime.handle import ModelHandle
from llamactor.runtime.loads import Job, LoadRequest, Prepared, Share
from llamactor.runtime.memory import Memory, MemoryLimit, MemoryPlan, check_limit, read_memory
from llamactor.runtime.residents import Query, Resident, free_name
from llamactor.runtime.status import LoadingModel, RuntimeStatus, StatusIterator
from llamactor.store import ModelStore
from llamactor.system import Device, LogLevel, devices, set_log_level

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from types import TracebackType


MAX_TTL = 1e9
"""Some thirty years, in seconds."""


class Runtime:
    """Loads models, finds them, keeps them within a budget of memory, and lets them go.

    It belongs to the event loop it is first used in. ``async with`` closes it at the end, with all
    its models.
    """

    def __init__(
        self,
        models_dir: str | os.PathLike[str] | None = None,
        *,
        memory_limit: MemoryLimit = "80%",
        threads: int | None = None,
        log_level: LogLevel | None = None,
        presets: Presets | None = None,
    ) -> None:
        """Make a runtime without models; nothing is read or started yet.

        Args:
            models_dir: Folder of the model store; None is the user's own.
            memory_limit: What the models may take together: bytes, ``"6GiB"``, or a share of the
                memory of each device, of which never more than is free; None has no limit. Of
                GPUs there is never more than is free, whatever the limit.
            threads: Compute threads of each context, unless a load has its own; None leaves the
                loop a core.
            log_level: How much of llama.cpp's log goes to stderr, for the whole process; None
                leaves that as it is.
            presets: Where presets are looked up; None is the user's own file.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument is out of range.
        """
        if threads is not None:
            check.check_int("threads", threads, 1, 512, hint="None leaves the loop a core")
        if not isinstance(presets, Presets | None):
            raise TypeError(f"presets must be Presets or None, not {check.describe(presets)}")
        if log_level is not None:
            set_log_level(log_level)
        folder = None if models_dir is None else check.check_path("models_dir", models_dir)
        self._store = ModelStore(folder)
        self._presets = presets or Presets()
        self._threads = threads
        self._core = RuntimeCore(check_limit(memory_limit), self._store)
        self._jobs: list[Job] = []

    # --- loading ----------------------------------------------------------------------------------

    def load(
        self,
        ref: str | os.PathLike[str],
        *,
        identifier: str | None = None,
        preset: str | None = None,
        ttl: float | None = None,
        keep: bool = False,
        **options: Unpack[LoadKeywords],
    ) -> Loading[ModelHandle]:
        """Start loading a model, also one that is loaded already, and return the `Loading`.

        Idle models are unloaded for it if they must be; where those at work would have to go, it
        waits for them. Cancelling whoever awaits it cancels the load when nobody else waits for it
        or refers to it. ``async with`` unloads the model at the end.

        Args:
            ref: As for `load_model`, or a name in the store.
            identifier: The name it has here; None is its name in the store or that of its file,
                with ``:2`` and so on if that is taken.
            preset: Name of a preset: its load and generation options lie below those of the calls.
            ttl: Seconds of idleness after which it is unloaded; None is never.
            keep: Never unload it to make room for others.
            **options: See `LoadOptions`, and `ContextOptions` for the default context.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: an option is out of range, or the identifier is taken.
            RuntimeError: called outside of the runtime's event loop.
            ClosedError: the runtime was closed.
        """
        self._core.bind_loop()
        request = _request(ref, identifier, preset, ttl, keep=keep, options=options)
        if identifier in self._taken():
            raise ValueError(
                f"identifier {identifier!r} is taken; choose another, unload that model, or swap it"
            )
        return self._loading(Share(self._start(request), self._handle, owns=True))

    def model(
        self,
        ref: str | os.PathLike[str] | None = None,
        *,
        preset: str | None = None,
        ttl: float | None = None,
        keep: bool = False,
        **options: Unpack[LoadKeywords],
    ) -> Loading[ModelHandle]:
        """Return a model that is loaded, or load it: calls at the same time share one load.

        The options count only if it is loaded for this call. The model stays until the caller next
        suspends, and whatever it has begun by then keeps it; ``async with`` keeps it while the
        block is open, and unloads nothing. Cancelling whoever awaits it cancels the load when
        nobody else wants it.

        Args:
            ref: An identifier, or as for `load`; None is any model that is loaded.
            preset: As for `load`.
            ttl: As for `load`.
            keep: As for `load`.
            **options: As for `load`.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: an option is out of range.
            ModelNotLoadedError: no `ref` was given and nothing is loaded.
            RuntimeError: called outside of the runtime's event loop.
            ClosedError: the runtime was closed.
        """
        self._core.bind_loop()
        resident = self._loaded_as(ref)
        if resident is None and ref is None:
            raise ModelNotLoadedError("no model is loaded; say which one to load")
        request = _request(ref or "", None, preset, ttl, keep=keep, options=options, known=resident)
        if resident is not None:
            self._core.used(resident)
            job: Job | None = resident.job
        else:
            job = next((job for job in self._jobs if _asks_for(job, request.ref)), None)
        return self._loading(Share(job or self._start(request), self._handle, owns=False))

    def get(
        self,
        query: str | None = None,
        *,
        identifier: str | None = None,
        path: str | os.PathLike[str] | None = None,
        architecture: str | None = None,
    ) -> ModelHandle:
        """Return a handle for whichever loaded model satisfies a query; loads nothing.

        It survives unloading and loading, and always means the model that satisfies the query then:
        of several the one used last.

        Args:
            query: An identifier, or else what the model was asked for by, its path or a folder
                above it (``owner/repo`` is one), or its architecture.
            identifier: The name it must have.
            path: Its file, or a folder above it.
            architecture: Its architecture.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument is empty.
        """
        for name, value in (
            ("query", query),
            ("identifier", identifier),
            ("architecture", architecture),
        ):
            if value is not None:
                check.check_text(name, value, empty=False)
        place = None if path is None else check.check_path("path", path)
        return ModelHandle(self._core, Query(query, identifier, place, architecture))

    def loaded(self) -> tuple[ModelHandle, ...]:
        """Return handles for all models that are loaded, in the order they were."""
        return tuple(self._handle(resident) for resident in self._core.residents)

    # --- unloading --------------------------------------------------------------------------------

    async def unload(self, identifier: str, drain: bool | Literal["refuse"] = True) -> None:  # noqa: FBT001, FBT002
        """Unload a model; nobody finds it from now on.

        Cancelling this does not stop the unloading, only the waiting for it.

        Args:
            identifier: The name it has here.
            drain: True waits for what runs there, False lets it fail with `ClosedError`, and
                ``"refuse"`` raises `BusyError` if there is anything.

        Raises:
            ModelNotLoadedError: no model has that name.
            BusyError: something runs there, and `drain` is ``"refuse"``.
            ClosedError: the runtime was closed.
        """
        self._core.bind_loop()
        if drain != "refuse":
            check.check_bool("drain", drain)
        name = check.check_text("identifier", identifier)
        if drain == "refuse":
            await asyncio.sleep(0)  # what was delivered just now is held until its caller suspends
        resident = self._core.residents.named(name)
        if drain == "refuse":
            self._core.refuse_if_busy(resident)
        await self._core.unloaded(resident, drain=drain is not False)

    async def swap(
        self,
        identifier: str,
        ref: str | os.PathLike[str],
        *,
        drain: bool = True,
        preset: str | None = None,
        **options: Unpack[LoadKeywords],
    ) -> ModelHandle:
        """Load another model, let the name mean it at once, then unload the one before.

        Both are loaded for a while, so both have to fit. What runs at the old one ends there; what
        begins after the change runs at the new one, and there is no moment without either. Returns
        once the old one is gone. Cancelling this before the change leaves everything as it was, and
        after it only stops the waiting.

        Args:
            identifier: The name of a loaded model.
            ref: As for `load`.
            drain: False lets what runs at the old one fail with `ClosedError`.
            preset: As for `load`.
            **options: As for `load`; ``ttl`` and ``keep`` stay those of the name.

        Raises:
            ModelNotLoadedError: no model has that name.
            TypeError: an option is unknown or has the wrong type.
            ValueError: an option is out of range.
            InsufficientMemoryError: the new one does not fit beside the old one.
            ModelLoadError: it cannot be loaded; the old one stays.
            ClosedError: the runtime was closed.
        """
        self._core.bind_loop()
        check.check_bool("drain", drain)
        before = self._core.residents.named(check.check_text("identifier", identifier))
        request = _request(
            ref,
            identifier,
            preset,
            before.ttl,
            keep=before.keep,
            options=options,
            replaces=before,
            drain=drain,
        )
        handle = await self._loading(Share(self._start(request), self._handle, owns=False))
        while before in self._core.residents.all:
            await self._core.change()
        return handle

    # --- what there is ----------------------------------------------------------------------------

    def status(self) -> StatusIterator:
        """Return an iterator over snapshots, now and whenever something changes.

        It ends when the runtime is closed. Cancelling an ``anext`` loses nothing.
        """
        self._core.bind_loop()
        return StatusIterator(self._core, lambda: self.snapshot)

    @property
    def snapshot(self) -> RuntimeStatus:
        """What it has and does now."""
        core = self._core
        return RuntimeStatus(
            models=tuple(resident.described(core.now) for resident in core.residents.all),
            loading=tuple(
                LoadingModel(job.request.ref, job.identifier, job.progress) for job in self._jobs
            ),
            memory_bytes=core.planned_bytes,
            closed=core.closed and not core.residents.all and not self._jobs,
        )

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices that can hold layers, the CPU among them."""
        return tuple(devices())

    @property
    def store(self) -> ModelStore:
        """The models that can be loaded by name."""
        return self._store

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._core.closed

    async def memory(self) -> Memory:
        """Return what memory there is, and what the models have; cancelling this loses nothing."""
        self._core.bind_loop()
        budget = await self._core.budget()
        return await asyncio.to_thread(read_memory, budget.total, self._core.planned_bytes)

    async def estimate(
        self,
        ref: str | os.PathLike[str],
        *,
        preset: str | None = None,
        **options: Unpack[LoadKeywords],
    ) -> MemoryPlan:
        """Return what loading a model would take and mean now, from the header of its file.

        Nothing is loaded. A model of the hub is downloaded first. Cancelling this leaves nothing
        behind but what was downloaded.

        Args:
            ref: As for `load`.
            preset: As for `load`.
            **options: As for `load`.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: an option is out of range.
            ModelNotFoundError: the reference leads to no file.
            ModelLoadError: the file is no model.
            UnsupportedError: the model cannot have such a context.
        """
        self._core.bind_loop()
        request = _request(ref, None, preset, None, keep=False, options=options)
        wanted, _ = await self._find(request, None)
        found = await self._core.estimate(wanted)
        return await self._core.plan(request.ref, found)

    # --- closing ----------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Stop all loads and close all models; idempotent. What runs fails with `ClosedError`.

        Cancelling this does not stop the closing, only the waiting for it.

        Raises:
            RuntimeError: called outside of the runtime's event loop; nothing was closed.
        """
        if not self._core.closed:
            self._core.bind_loop()
            for job in list(self._jobs):
                job.stop()
            self._core.close()
        await self._core.ended()

    async def __aenter__(self) -> Runtime:
        """Return itself, bound to this event loop; never suspends."""
        self._core.bind_loop()
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
        """Return what is loaded."""
        names = ", ".join(resident.identifier for resident in self._core.residents)
        return f"<Runtime {'closed' if self.closed else names or 'without models'}>"

    # --- how --------------------------------------------------------------------------------------

    def _start(self, request: LoadRequest) -> Job:
        job = Job(self._core, request, self._prepare)
        self._jobs.append(job)
        job.on_end(lambda: self._jobs.remove(job))
        return job

    def _loading(self, share: Share) -> Loading[ModelHandle]:
        return Loading(share)

    def _handle(self, resident: Resident) -> ModelHandle:
        return ModelHandle(self._core, Query(identifier=resident.identifier))

    def _taken(self) -> set[str | None]:
        names = {resident.identifier for resident in self._core.residents}
        return {*names, *(job.identifier for job in self._jobs if not job.stopped)} - {None}

    def _loaded_as(self, ref: str | os.PathLike[str] | None) -> Resident | None:
        """The model that was loaded by this name, reference or path."""
        if ref is None:
            return self._core.residents.find(Query())
        name = check.check_path("ref", ref)
        exact = self._core.residents.find(Query(identifier=name))
        same = [one for one in self._core.residents if _same(name, one.ref, one.wanted.path)]
        return exact or max(same, key=lambda one: one.order, default=None)

    async def _prepare(self, job: Job) -> Prepared:
        """Find file, options and name of what a job asks for."""
        wanted, defaults = await self._find(job.request, job)
        if job.identifier is None:
            name = self._store.name_of(job.request.ref, Path(wanted.path))
            job.identifier = free_name(name, {taken for taken in self._taken() if taken})
        return Prepared(wanted, job.identifier, defaults)

    async def _find(
        self, request: LoadRequest, job: Job | None
    ) -> tuple[Wanted, GenerationOptions]:
        name = request.preset
        preset = Preset("") if name is None else await self._presets.get(name)
        progress = None if job is None else job.downloaded
        path = await self._store.resolve(request.ref, progress=progress)
        own_load, own_generation = await self._store.defaults(request.ref)
        here = {} if self._threads is None else {"threads": self._threads}
        load = layered(request.options, preset.load, own_load, here)
        generation = layered(preset.generation, own_generation)
        return Wanted(str(path), *load_options(load)), generation_options(generation)


def _request(
    ref: str | os.PathLike[str],
    identifier: str | None,
    preset: str | None,
    ttl: float | None,
    *,
    keep: bool,
    options: Mapping[str, Any],
    known: Resident | None = None,
    replaces: Resident | None = None,
    drain: bool = True,
) -> LoadRequest:
    """Return a request whose every argument was checked."""
    name = known.ref if known is not None else check.check_path("ref", ref)
    for label, text in (("identifier", identifier), ("preset", preset)):
        if text is not None:
            check.check_text(label, text, empty=False)
    if ttl is not None:
        check.check_float("ttl", ttl, 0, MAX_TTL, hint="seconds; None is never")
    if check.check_bool("keep", keep) and ttl is not None:
        raise ValueError("keep=True and a ttl contradict each other; give one of them")
    load_options(options)
    return LoadRequest(
        ref=name,
        identifier=identifier,
        preset=preset,
        ttl=ttl,
        keep=keep,
        options=dict(options),
        replaces=replaces,
        drain=drain,
    )


def _asks_for(job: Job, ref: str) -> bool:
    """Whether a load under way will give what is asked for."""
    waited_for = not (job.done or job.stopped) and job.request.replaces is None
    return waited_for and (job.identifier == ref or _same(ref, job.request.ref, ""))


def _same(name: str, ref: str, path: str) -> bool:
    """Whether a name is a reference or a path, or leads to the same file as one."""
    if name in {ref, path}:
        return True
    return name.endswith(".gguf") and Path(name).absolute() in {
        Path(ref).absolute(),
        Path(path).absolute(),
    }
