"""What this machine and this build offer: devices, instruction sets, llama.cpp's log."""

from __future__ import annotations

from typing import Literal

import msgspec

from llamactor import _checks as check
from llamactor import _core

LogLevel = Literal["off", "error", "warn", "info", "debug"]


class Device(msgspec.Struct, frozen=True):
    """A device that can hold layers of a model."""

    name: str
    """What the load option `devices` takes, such as ``CUDA0``."""
    description: str
    """What the backend says of it, such as the name of the card."""
    backend: str
    """The backend that drives it, such as ``CUDA`` or ``CPU``."""
    kind: str
    """``cpu``, ``gpu``, ``integrated_gpu``, ``accelerator`` or ``unknown``."""
    memory_total: int
    """Bytes."""
    memory_free: int
    """Bytes free now."""


def devices() -> list[Device]:
    """Return the devices that llama.cpp found, the CPU among them.

    Returns:
        One entry per device, in llama.cpp's order (``ggml_backend_dev_get``).
    """
    return msgspec.convert(_core.devices(), list[Device])


def system_info() -> str:
    """Return one line about the instruction sets and backends of this build.

    Returns:
        The text of ``llama_print_system_info``.
    """
    return _core.system_info()


def set_log_level(level: LogLevel) -> None:
    """Choose how much of llama.cpp's log goes to stderr from now on; ``"off"`` at the start.

    What llama.cpp calls an error while it loads a model is in the exception's message anyway.

    Args:
        level: ``"off"``, ``"error"``, ``"warn"``, ``"info"`` or ``"debug"``, for the whole process.

    Raises:
        ValueError: Another level.
    """
    check.check_choice("level", level, ("off", "error", "warn", "info", "debug"))
    _core.set_log_level(level)
