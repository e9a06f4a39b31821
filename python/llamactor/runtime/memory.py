"""Memory: what there is, what a model would take, and what a runtime may use."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import psutil

from llamactor import _checks as check
from llamactor.system import Device, devices

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

HOST = "CPU"
"""The name under which the host's memory is counted."""

MemoryLimit: TypeAlias = "int | str | None"
"""Bytes, ``"6GiB"``, a share such as ``"80%"``, or None for no limit."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*")
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


class DeviceUsage(msgspec.Struct, frozen=True):
    """What a model with its default context takes on one device; bytes."""

    weights: int = 0
    """Weights."""
    cache: int = 0
    """Keys and values, or recurrent states, of the context."""
    compute: int = 0
    """Intermediate results of a graph, and rows of logits."""
    overhead: int = 0
    """Vocabulary and bookkeeping, on the host only; about right, where the others are exact."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.compute + self.overhead


class MemoryPlan(msgspec.Struct, frozen=True):
    """What loading a model would take, and whether that is to be had."""

    ref: str
    """The model, as it was asked for."""
    path: str
    """Its file."""
    context_size: int
    """Cells of the default context, in tokens."""
    gpu_layers: int
    """Layers that devices other than the CPU would hold."""
    per_device: dict[str, DeviceUsage]
    """Bytes by device; the host's memory is ``"CPU"``."""
    fits: bool
    """Whether it can be loaded now, after the models in `evicts` have gone."""
    evicts: tuple[str, ...] = ()
    """Identifiers of the idle models that would be unloaded for it."""
    waits_for: tuple[str, ...] = ()
    """Identifiers of models at work that have to become idle first."""
    free_bytes: int | None = None
    """What the limit leaves beside the models that are loaded; None without a limit."""
    suggestion: dict[str, Any] | None = None
    """Load options with which it would fit, if it does not; None where nothing helps."""

    @property
    def total_bytes(self) -> int:
        """Bytes on all devices together."""
        return sum(usage.total for usage in self.per_device.values())

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights on all devices."""
        return sum(usage.weights for usage in self.per_device.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes of the context's cache on all devices."""
        return sum(usage.cache for usage in self.per_device.values())

    @property
    def compute_bytes(self) -> int:
        """Bytes of compute buffers on all devices."""
        return sum(usage.compute for usage in self.per_device.values())


class Memory(msgspec.Struct, frozen=True):
    """The memory of this machine and what a runtime has of it; bytes, as a snapshot."""

    ram_total: int
    """Physical memory."""
    ram_available: int
    """What can be had without swapping."""
    swap_total: int
    """Swap space."""
    swap_used: int
    """Swap space in use."""
    process_resident: int
    """What this process has in memory, mapped weights included."""
    devices: tuple[Device, ...]
    """Devices with their total and free memory, the CPU among them."""
    limit_bytes: int | None
    """What the runtime's models may take together; None is no limit."""
    planned_bytes: int
    """What the models take that are loaded, loading, or not gone yet."""


Usages: TypeAlias = "Mapping[str, DeviceUsage]"


class Budget(msgspec.Struct, frozen=True):
    """How much the models of a runtime may take: on each device, or together."""

    per_device: dict[str, int] = {}
    """Most bytes on a device; those that are not named have no limit."""
    together: int | None = None
    """Most bytes on all devices together."""

    def excess(self, usages: Iterable[Usages]) -> int:
        """Return by how many bytes these models together exceed it; 0 if they fit."""
        return max([0, *(-left for left in self.left(usages).values())])

    def left(self, usages: Iterable[Usages]) -> dict[str, int]:
        """Return what these models leave of each limit; of that on all together under ``""``."""
        totals = total_by_device(usages)
        left = {name: limit - totals.get(name, 0) for name, limit in self.per_device.items()}
        if self.together is not None:
            left[""] = self.together - sum(totals.values())
        return left

    @property
    def total(self) -> int | None:
        """What the limits allow in all; None is no limit."""
        if self.together is not None:
            return self.together
        return sum(self.per_device.values()) if HOST in self.per_device else None


def total_by_device(usages: Iterable[Usages]) -> dict[str, int]:
    """Return the bytes that several models take on each device."""
    totals: dict[str, int] = {}
    for usage in usages:
        for name, device in usage.items():
            totals[name] = totals.get(name, 0) + device.total
    return totals


def check_limit(value: object) -> float | int | None:
    """Return a memory limit as a share (float, above 0 to 1), as bytes (int), or None."""
    hint = 'bytes, "6GiB", a share such as "80%", or None for no limit'
    if value is None:
        return None
    if not isinstance(value, str):
        return check.check_int("memory_limit", value, 1, hint=hint)
    if share := _SHARE.fullmatch(value):
        return check.check_float("memory_limit in %", float(share[1]), 0, 100, above=True) / 100
    if size := _SIZE.fullmatch(value):
        return check.check_int(
            "memory_limit", math.floor(float(size[1]) * _UNITS[size[2] or ""]), 1, hint=hint
        )
    raise ValueError(f"memory_limit must be {hint}, not {value!r}")


def read_budget(limit: float | int | None, held: Mapping[str, int]) -> Budget:
    """Return what may be used now, with `held` bytes in use by the runtime's own models.

    A share leaves others what they have: it is of the whole memory, but never more than is free or
    held. Of other devices than the host there is never more, whatever the limit. Blocks on the
    operating system.
    """
    share = limit if isinstance(limit, float) else 1.0
    room = room_on_devices(devices(), share, held)
    if isinstance(limit, float):
        room[HOST] = _room_on_host(share, held.get(HOST, 0))
    return Budget(per_device=room, together=limit if isinstance(limit, int) else None)


def room_on_devices(
    found: Iterable[Device], share: float, held: Mapping[str, int]
) -> dict[str, int]:
    """Return such a share of each device but the host, or what is free or held there if less."""
    return {
        device.name: min(
            int(share * device.memory_total), device.memory_free + held.get(device.name, 0)
        )
        for device in found
        if device.kind != "cpu" and device.memory_total
    }


def _room_on_host(share: float, held: int) -> int:
    """The same of the host, where what models hold may be free all the same.

    Mapped weights and pages that nobody has written are available to others: of what models hold
    only what this process has to itself comes on top of that.
    """
    ram, process = psutil.virtual_memory(), psutil.Process().memory_info()
    own = process.rss - getattr(process, "shared", 0)
    return min(int(share * ram.total), ram.available + min(held, own))


def read_memory(limit_bytes: int | None, planned_bytes: int) -> Memory:
    """Return a snapshot; blocks on the operating system."""
    ram, swap = psutil.virtual_memory(), psutil.swap_memory()
    return Memory(
        ram_total=ram.total,
        ram_available=ram.available,
        swap_total=swap.total,
        swap_used=swap.used,
        process_resident=psutil.Process().memory_info().rss,
        devices=tuple(devices()),
        limit_bytes=limit_bytes,
        planned_bytes=planned_bytes,
    )


def in_words(n_bytes: int) -> str:
    """Return bytes for a message, such as ``1.4 GiB``."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
