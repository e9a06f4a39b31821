"""The runtime: many models by name, within one budget of memory."""

from __future__ import annotations

from llamactor.runtime.handle import ModelHandle
from llamactor.runtime.memory import DeviceUsage, Memory, MemoryPlan
from llamactor.runtime.residents import LoadedModel
from llamactor.runtime.runtime import Runtime
from llamactor.runtime.status import LoadingModel, RuntimeStatus, StatusIterator

__all__ = (
    "DeviceUsage",
    "LoadedModel",
    "LoadingModel",
    "Memory",
    "MemoryPlan",
    "ModelHandle",
    "Runtime",
    "RuntimeStatus",
    "StatusIterator",
)
