"""What a model would take, and what would fit: measured on an outline, without loading it.

Theory of operation. llama.cpp reads a file's header and lays out every tensor of the model, of a
context's cache and of its graphs, but allocates nothing: the sizes of all buffers are then known,
per device and for every architecture. On top comes what is not in buffers: the vocabulary's tables,
the rows of logits and the bookkeeping of cells, whose sizes were measured.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from llamactor import _core
from llamactor._hub import LoopHub, finish, hub_for, running_loop
from llamactor.errors import InsufficientMemoryError, UnsupportedError
from llamactor.model import default_context_options
from llamactor.runtime.memory import HOST, DeviceUsage

if TYPE_CHECKING:
    from llamactor.options import ContextOptions, LoadOptions
    from llamactor.runtime.memory import Usages

LEAST_CONTEXT = 512
"""Tokens below which no context is suggested."""
STEP = 256
"""Contexts are suggested in multiples of it, as llama.cpp rounds them up."""
LARGEST_MEASURED = 1 << 20
"""Larger contexts are computed from this one: even an outline keeps books of its cells."""

VOCABULARY_BYTES = 270
"""Of a token, with its merges, in the tokeniser's tables."""
CELL_BYTES = 116
"""Of a cell, in llama.cpp's books and in our own."""
FIXED_BYTES = 1_500_000
"""Of a model and a context: graphs, threads, and what an allocator keeps."""

Fits = Callable[["Usages"], bool]
"""Whether a model that takes so much would fit."""


class Wanted(msgspec.Struct, frozen=True):
    """How a model is to be loaded."""

    path: str
    """Its file."""
    load: LoadOptions
    """How its weights are loaded."""
    context: ContextOptions
    """What its default context is like."""


class Estimate(msgspec.Struct, frozen=True):
    """What a model takes when it is loaded so."""

    wanted: Wanted
    """How, with nothing left to be chosen automatically."""
    layers: int
    """Layers that devices other than the CPU hold."""
    usages: dict[str, DeviceUsage]
    """Bytes by device."""


class Outline:
    """The layout of a model without its weights."""

    def __init__(self, hub: LoopHub, native: _core.Model, wanted: Wanted) -> None:
        """Wrap a native outline; made by `outlined`."""
        self._hub = hub
        self._native = native
        self._wanted = wanted
        self.info: dict[str, Any] = native.info()

    @property
    def trained(self) -> int:
        """The context it was trained with, in tokens."""
        size: int = self.info["train_context_size"]
        return size

    async def measure(self, options: ContextOptions) -> dict[str, DeviceUsage]:
        """Return what the model takes with such a context; cancelling this measures nothing.

        Raises:
            UnsupportedError: it cannot have such a context.
        """
        native = default_context_options(self.info, options)
        if native is None:
            return {HOST: self._without_context()}
        size: Any = native["context_size"]
        cells = min(size, LARGEST_MEASURED)
        call = self._native.footprint(self._hub.native, {**native, "context_size": cells})
        usages = read_usages(await finish(self._hub, call))
        host = usages.get(HOST, DeviceUsage())
        own = self._overhead(cells, options.sequences)
        usages[HOST] = msgspec.structs.replace(
            host, weights=host.weights + self._adapters(), overhead=own
        )
        return {name: _scaled(usage, size / cells) for name, usage in usages.items()}

    def _without_context(self) -> DeviceUsage:
        """A model that cannot generate: its weights, if any, and its vocabulary."""
        return DeviceUsage(weights=self.info["size_bytes"], overhead=self._overhead(0, 0))

    def _overhead(self, cells: int, sequences: int) -> int:
        vocabulary: int = self.info["vocab_size"]
        rows = 4 * vocabulary * sequences
        return FIXED_BYTES + VOCABULARY_BYTES * vocabulary + CELL_BYTES * cells + rows

    def _adapters(self) -> int:
        files: Any = self._wanted.load.native()["lora"]
        return sum(Path(path).stat().st_size for path, _ in files)


@contextlib.asynccontextmanager
async def outlined(wanted: Wanted) -> AsyncIterator[Outline]:
    """Lay a model out while the block is open.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelLoadError: the file is no model.
    """
    hub = hub_for(running_loop("an estimate"))
    options = wanted.load.native(outline=True)
    call = _core.load_model(hub.native, wanted.path, options)
    native = await finish(hub, call, discard=lambda late: late.close(hub.native))
    try:
        yield Outline(hub, native, wanted)
    finally:
        native.close(hub.native)


def read_usages(native: list[tuple[str, str, bool, int, int, int]]) -> dict[str, DeviceUsage]:
    """Return the bytes of each device from those of each kind of buffer."""
    found: dict[str, DeviceUsage] = {}
    for device, _, host, weights, cache, compute in native:
        name = HOST if host or not device else device
        before = found.get(name, DeviceUsage())
        found[name] = DeviceUsage(
            before.weights + weights, before.cache + cache, before.compute + compute
        )
    return found


def _scaled(usage: DeviceUsage, factor: float) -> DeviceUsage:
    """What grows with the context, in a larger one."""
    if factor == 1:
        return usage
    return msgspec.structs.replace(
        usage, cache=int(usage.cache * factor), compute=int(usage.compute * factor)
    )


async def estimate(wanted: Wanted, fits: Fits) -> Estimate:
    """Return what the model takes; what is left to choose is chosen so that it fits, if it can.

    Cancelling this leaves nothing behind.

    Args:
        wanted: How it is to be loaded.
        fits: Whether a model that takes so much would fit.
    """
    chosen = await _with_layers(wanted, fits)
    async with outlined(chosen) as outline:
        context = chosen.context
        if context.context_size == "auto":
            context = await _with_size(outline, context, fits)
        usages = await outline.measure(context)
        layers = _layers(chosen.load, outline, usages)
    return Estimate(msgspec.structs.replace(chosen, context=context), layers, usages)


async def suggest(found: Estimate, fits: Fits) -> dict[str, Any] | None:
    """Return load options with which a model that is too large would fit, or None.

    First a smaller context is tried, then one with keys and values of 8 bits, then fewer layers on
    devices. Cancelling this leaves nothing behind.
    """
    wanted = found.wanted
    async with outlined(wanted) as outline:
        most: int = default_size(outline, wanted.context)
        for types in ({}, {"kv_type_k": "q8_0", "kv_type_v": "q8_0"}):
            context = msgspec.structs.replace(wanted.context, **types)
            size = await _largest(outline, context, most, fits)
            if size is not None:
                return {"context_size": size, **types}
    fewer = await _with_layers(_replaced(wanted, "auto"), fits)
    return None if fewer.load.gpu_layers == "auto" else {"gpu_layers": fewer.load.gpu_layers}


def default_size(outline: Outline, context: ContextOptions) -> int:
    """Return the size of a context in tokens, chosen by the model if nobody has."""
    size: Any = context.native(outline.trained)["context_size"]
    return int(size)


async def _with_size(outline: Outline, context: ContextOptions, fits: Fits) -> ContextOptions:
    """Return the options with the largest context that fits; with the usual one if none does."""
    usual = default_size(outline, context)
    size = await _largest(outline, context, usual, fits)
    return msgspec.structs.replace(context, context_size=usual if size is None else size)


async def _largest(outline: Outline, context: ContextOptions, most: int, fits: Fits) -> int | None:
    """Return the largest size up to `most` with which the model fits, or None."""

    async def good(size: int) -> bool:
        return await _is_possible(outline, context, size, fits)

    if await good(most):
        return most
    least, above = LEAST_CONTEXT // STEP, -(-most // STEP)
    if least >= above or not await good(least * STEP):
        return None
    return STEP * await _last(least, above, lambda steps: good(steps * STEP))


async def _last(least: int, above: int, good: Callable[[int], Awaitable[bool]]) -> int:
    """Return the greatest good number below `above`; `least` is good, and none behind a bad one."""
    while above - least > 1:
        middle = (least + above) // 2
        if await good(middle):
            least = middle
        else:
            above = middle
    return least


async def _is_possible(outline: Outline, context: ContextOptions, size: int, fits: Fits) -> bool:
    try:
        return fits(await outline.measure(msgspec.structs.replace(context, context_size=size)))
    except (UnsupportedError, InsufficientMemoryError):
        return False  # such as a quantised cache of a model whose heads are too narrow for it


async def _with_layers(wanted: Wanted, fits: Fits) -> Wanted:
    """Return it with as many layers on devices as fit, if that is left to choose."""
    if wanted.load.gpu_layers != "auto" or not await asyncio.to_thread(_has_devices):
        return wanted

    async def good(layers: int) -> bool:
        usages, _ = await _measured(_replaced(wanted, layers))
        return fits(usages)

    usages, total = await _measured(wanted)
    return wanted if fits(usages) else _replaced(wanted, await _last(0, total + 1, good))


async def _measured(wanted: Wanted) -> tuple[dict[str, DeviceUsage], int]:
    """What it takes with the least context, or the one that was asked for; and its layers."""
    context = wanted.context
    async with outlined(wanted) as outline:
        if context.context_size == "auto":
            size = min(LEAST_CONTEXT, default_size(outline, context))
            context = msgspec.structs.replace(context, context_size=size)
        return await outline.measure(context), outline.info["layers"] + 1


def _replaced(wanted: Wanted, layers: Any) -> Wanted:
    load = msgspec.structs.replace(wanted.load, gpu_layers=layers)
    return msgspec.structs.replace(wanted, load=load)


def _has_devices() -> bool:
    return any(device["kind"] not in {"cpu", "accelerator"} for device in _core.devices())


def _layers(load: LoadOptions, outline: Outline, usages: Usages) -> int:
    if set(usages) <= {HOST}:
        return 0
    total: int = outline.info["layers"] + 1
    return total if load.gpu_layers == "auto" else min(load.gpu_layers, total)
