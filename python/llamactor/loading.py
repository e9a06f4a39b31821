"""Loading: from a reference to a file to a `Model`, off the event loop.

Theory of operation. `load_model` starts a `NativeLoad` at once and returns a `Loading`, which
is only a reference to it. Waiters hold the `Loading` while they wait, readers of progress do not;
when the last reference goes before the model was delivered to anybody, the load is cancelled, or
the model it made is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeAlias, TypeVar, Unpack

import msgspec

from llamactor import _checks as check
from llamactor import _core
from llamactor._hub import (
    call_on_loop,
    check_loop,
    finalisers_rest,
    finish,
    hub_for,
    running_loop,
)
from llamactor.errors import BusyError, LoadCancelledError, StoreError
from llamactor.model import Model, default_context_options
from llamactor.options import ContextOptions, LoadKeywords, LoadOptions, load_options
from llamactor.prediction import report_to_loop
from llamactor.store import ModelStore
from llamactor.store.refs import kind_of

if TYPE_CHECKING:
    import os
    from collections.abc import Generator
    from types import TracebackType

    from llamactor._opening import Closable

T = TypeVar("T")
M = TypeVar("M", bound="Closable")
M_co = TypeVar("M_co", bound="Closable", covariant=True)

Stage: TypeAlias = Literal["resolving", "downloading", "waiting", "weights", "context", "ready"]

_DOWNLOAD_SHARE = 0.7  # of the fraction, if the model has to be downloaded first
_WEIGHTS_SHARE = 0.9  # of what is left of it; the rest is the default context


class LoadProgress(msgspec.Struct, frozen=True):
    """How far a load is."""

    stage: Stage
    """What it does now."""
    fraction: float
    """Share that is done, 0 to 1; never falls, and ends at 1.0."""
    position: int | None = None
    """While it waits for memory: its place among those that wait, counted from 1."""


class LoadJob(Protocol[M_co]):
    """What a `Loading` refers to: a load while it runs, and its outcome."""

    loop: asyncio.AbstractEventLoop
    """The loop it belongs to."""
    ref: str
    """What is loaded."""
    delivered: bool
    """Whether somebody has got the model."""

    @property
    def done(self) -> bool:
        """Whether it has ended."""

    @property
    def progress(self) -> LoadProgress:
        """How far it is."""

    async def change(self) -> None:
        """Wait until something changes; cancelling this stops the wait only."""

    def deliver(self) -> M_co:
        """Return the model or raise why there is none."""

    def raise_failure(self) -> None:
        """Raise the failure, if it failed."""

    def cancel(self) -> None:
        """Stop; no effect once the model was delivered."""

    def abandon(self) -> None:
        """Nobody refers to it any more."""

    def enter(self) -> None:
        """Begin what ``async with`` holds."""

    async def leave(self) -> None:
        """End what ``async with`` began; cancelling this is as with `Model.aclose`."""


class Loading(Generic[M]):
    """A load under way, bound to the event loop it was started in.

    ``await`` it, enter it with ``async with`` (which closes the model at the end of the block), or
    iterate it for `LoadProgress`. All waiters get the same model.
    """

    def __init__(self, load: LoadJob[M]) -> None:
        """Refer to a running load; made by `load_model`, `Runtime.load` and `Runtime.model`."""
        self._load = load
        self._entered = False

    @property
    def done(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self._load.done

    @property
    def progress(self) -> LoadProgress:
        """How far it is."""
        return self._load.progress

    def cancel(self) -> None:
        """Cancel it: returns at once, idempotent, from any thread.

        Awaiting and iterating it then raise `LoadCancelledError`, and nothing stays loaded.
        No effect once the model was delivered.
        """
        call_on_loop(self._load.loop, self._load.cancel)

    async def result(self) -> M:
        """Return the model: the same as awaiting the loading, as a coroutine.

        Cancelling this cancels the load only when nobody else waits for it or refers to it.

        Raises:
            ModelNotFoundError: the reference leads to no file.
            ModelLoadError: the file is no model, or cannot be loaded.
            LoadCancelledError: `cancel` was called.
            InsufficientMemoryError: memory could not be had.
            RuntimeError: called in another event loop than the loading's.
        """
        load = self._load
        check_loop(load.loop, "awaiting a loading")
        try:
            while not load.done:
                await load.change()
        except BaseException:
            # A traceback keeps this frame, which must not keep a reference: that is interest.
            del self
            raise
        return load.deliver()

    def __await__(self) -> Generator[Any, None, M]:
        """Return the model; see `result` for what cancelling does."""
        return self.result().__await__()

    async def __aenter__(self) -> M:
        """Return the model; cancelling is as with `result`."""
        try:
            model = await self.result()
        except BaseException:
            del self  # as in `result`
            raise
        self._load.enter()
        self._entered = True
        return model

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the model; cancelling is as with `Model.aclose`.

        One that `Runtime.model` gave is let go instead.
        """
        if self._entered:
            await self._load.leave()

    def __aiter__(self) -> AsyncIterator[LoadProgress]:
        """Iterate over the progress, from where it is to 1.0; does not keep the load going.

        Cancelling an `anext` loses nothing. Raises what awaiting would raise.
        """
        check_loop(self._load.loop, "iterating a loading")
        return _ProgressIterator(self._load)

    def __repr__(self) -> str:
        """Return the progress in words."""
        return f"<Loading {self._load.ref!r} {self.progress.stage} {self.progress.fraction:.0%}>"

    def __del__(self) -> None:
        """Let the load go; on whatever thread this runs."""
        load = getattr(self, "_load", None)
        if load is not None and not load.delivered and not finalisers_rest():
            call_on_loop(load.loop, load.abandon)


def load_model(ref: str | os.PathLike[str], **options: Unpack[LoadKeywords]) -> Loading[Model]:
    """Start loading a model and a default context for it, and return the `Loading` to await.

    Cancelling whoever awaits it cancels the load when nobody else waits for it or refers to it.

    Args:
        ref: Path of a ``.gguf`` (the first part of a split one), a name in the model store (see
            `ModelStore`), ``"smollm2"``, ``"pkg:name"`` for the ``.gguf`` inside an installed
            Python package, which is not imported, or ``"hf:owner/repo[:quantisation | /file]"``,
            which is downloaded into the store unless it is there.
        **options: See `LoadOptions`, and `ContextOptions` for the default context.

    Raises:
        TypeError: an option is unknown or has the wrong type.
        ValueError: an option is out of range.
        RuntimeError: called without a running event loop.
    """
    loop = running_loop("load_model")
    name = check.check_path("ref", ref)
    load, context = load_options(options)
    return Loading(NativeLoad(loop, name, load, context))


class NativeLoad:
    """A load while it runs, and its outcome."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        ref: str,
        options: LoadOptions,
        context_options: ContextOptions,
    ) -> None:
        """Start it."""
        self.loop = loop
        self.ref = ref
        self._chat_template = options.chat_template
        self.progress = LoadProgress("resolving", 0.0)
        self.done = False
        self.delivered = False
        self._native: tuple[_core.Model, _core.Context | None] | None = None
        self._model: Model | None = None
        self._error: BaseException | None = None
        self._retrieved = False
        self._cancelled = False
        self._resolving = False
        self._downloaded = 0.0
        self._call: _core.Call[Any] | None = None
        self._closing: _core.Call[None] | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self._hub = hub_for(loop)
        # The loop itself refers to tasks weakly.
        self._task = loop.create_task(
            self._run(options, context_options), name=f"llamactor load {ref}"
        )

    async def change(self) -> None:
        """Wait until something changes."""
        waiter = self.loop.create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def deliver(self) -> Model:
        """Return the model or raise why there is none."""
        self.raise_failure()
        if self._native is not None:
            native, context = self._native
            self._model, self._native = Model(native, context, self._chat_template), None
            self.delivered = True
        assert self._model is not None
        return self._model

    def raise_failure(self) -> None:
        """Raise the failure, if it failed."""
        if self._error is not None:
            self._retrieved = True
            raise self._error.with_traceback(None)

    def cancel(self) -> None:
        """Stop, or close the model that nobody has got."""
        if self.delivered or self._cancelled or self._error is not None:
            return
        self._cancelled = True
        if self._resolving:
            self._task.cancel()
        if self._call is not None:
            self._call.cancel()
        if self._native is not None:
            self._error = self._cancellation()
            self._closing = self._native[0].close(self._hub.native)
            self._native = None

    async def gone(self) -> None:
        """Wait, after `cancel`, until nothing is left; cancelling this stops the wait only."""
        while not self.done:
            await self.change()
        if self._closing is not None:
            await finish(self._hub, self._closing, cancellable=False)

    def abandon(self) -> None:
        """Nobody refers to it any more: stop, and report a failure that nobody saw."""
        failed = self._error is not None and not self._cancelled
        if failed and not self._retrieved:
            message = f"loading {self.ref!r} failed and nobody retrieved the failure"
            report_to_loop(self.loop, {"message": message, "exception": self._error})
        self._retrieved = True
        self.cancel()

    def enter(self) -> None:
        """Leave it as it is: a model is open until it is closed."""

    async def leave(self) -> None:
        """Close the model; cancelling this is as with `Model.aclose`."""
        if self._model is not None:
            await self._model.aclose()

    async def _run(self, options: LoadOptions, context_options: ContextOptions) -> None:
        try:
            self._native = await self._load(options, context_options)
            self._advance("ready", 1.0)
        except asyncio.CancelledError:  # while it was resolved, or the loop is being shut down
            self._cancelled = True
            if self._call is not None:
                self._call.cancel()
            self._error = self._cancellation()
        except Exception as error:
            self._error = self._cancellation() if self._cancelled else error
        self.done = True
        self._call = None
        self._wake()

    async def _load(
        self, options: LoadOptions, context_options: ContextOptions
    ) -> tuple[_core.Model, _core.Context | None]:
        found = await self._resolve()
        # Errors name a path as it was given.
        path = self.ref if found == Path(self.ref) else str(found)
        native = await self._step(
            "weights", _core.load_model(self._hub.native, path, options.native())
        )
        try:
            return native, await self._open_context(native, context_options)
        except BaseException:
            await finish(self._hub, native.close(self._hub.native), cancellable=False)
            raise

    async def _open_context(
        self, native: _core.Model, options: ContextOptions
    ) -> _core.Context | None:
        """Return the default context, or None for a model that can have none."""
        wanted = default_context_options(native.info(), options)
        context = None
        if wanted is not None and not self._cancelled:
            context = await self._step("context", native.create_context(self._hub.native, wanted))
        if self._cancelled:
            raise self._cancellation()
        return context

    async def _resolve(self) -> Path:
        """Return the file to load, downloaded where it has to be, and count its use."""
        if self._cancelled:
            raise self._cancellation()
        store = ModelStore()
        self._resolving = True
        try:
            path = await store.resolve(self.ref, progress=self._on_download)
            if kind_of(self.ref) in {"name", "hub"}:
                # What cannot be counted can be loaded all the same.
                with contextlib.suppress(StoreError, BusyError, OSError):
                    await store.note_use(self.ref)
        finally:
            self._resolving = False
        return path

    def _on_download(self, fraction: float) -> None:
        self._downloaded = _DOWNLOAD_SHARE
        self._advance("downloading", _DOWNLOAD_SHARE * fraction)

    async def _step(self, stage: Stage, call: _core.Call[T]) -> T:
        """Wait for a native call, even a cancelled one, so that nothing stays behind."""
        self._call = call
        if self._cancelled:
            call.cancel()
        self._hub.listen(call.id, lambda: self._on_progress(stage, call))
        try:
            while not call.done:
                await self.change()
        finally:
            self._hub.forget(call.id)
        return call.take()

    def _on_progress(self, stage: Stage, call: _core.Call[Any]) -> None:
        start, share = (
            (0.0, _WEIGHTS_SHARE) if stage == "weights" else (_WEIGHTS_SHARE, 1.0 - _WEIGHTS_SHARE)
        )
        left = 1.0 - self._downloaded
        # 1.0 is said once, when the model is ready to be delivered.
        self._advance(stage, min(self._downloaded + left * (start + share * call.progress), 0.999))

    def _advance(self, stage: Stage, fraction: float) -> None:
        self.progress = LoadProgress(stage, max(fraction, self.progress.fraction))
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _cancellation(self) -> LoadCancelledError:
        return LoadCancelledError(f"loading {self.ref!r} was cancelled; nothing stays loaded")


class _ProgressIterator(AsyncIterator[LoadProgress]):
    """Reads the progress of a load; not the `Loading` is held, since readers are no interest."""

    __slots__ = ("_last", "_load")

    def __init__(self, load: LoadJob[Any]) -> None:
        self._load = load
        self._last: LoadProgress | None = None

    async def __anext__(self) -> LoadProgress:
        """Return the progress when it has changed."""
        load = self._load
        check_loop(load.loop, "iterating a loading")
        while load.progress == self._last and not load.done:
            await load.change()
        if load.done:
            load.raise_failure()
        if load.progress == self._last:
            raise StopAsyncIteration
        self._last = load.progress
        return load.progress
