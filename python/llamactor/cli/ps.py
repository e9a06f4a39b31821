"""``llamactor ps``: the processes of this machine that have models loaded."""

from __future__ import annotations

import asyncio
import os
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from llamactor.cli.flags import Json
from llamactor.cli.tables import show_json, show_table, size
from llamactor.cli.terminal import Status, Work

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil

    from llamactor.cli.terminal import Interrupts

CORE = Path(__file__).parents[1].name + "/_core."
"""What the path of every native module of this package has in it."""
GGUF = b"GGUF"
"""What every model file begins with."""


class LoadedFile(msgspec.Struct, frozen=True):
    """A model file that a process has mapped."""

    path: str
    """Where it is."""
    resident_bytes: int
    """How much of it is in memory now; processes that use one file share that."""


class Process(msgspec.Struct, frozen=True):
    """A process that uses llamactor."""

    pid: int
    """Its number."""
    started: datetime
    """When it began."""
    resident_bytes: int
    """Memory it uses, what it shares included."""
    command: str
    """How it was called."""
    models: list[LoadedFile]
    """What it has loaded."""


def ps(*, json: Json = False) -> Work:
    """Show which processes use llamactor, and the models that they have loaded.

    Nothing registers itself: what is shown is what the system says of your processes, whichever
    program they belong to. A model that was loaded with use_mmap=False has no file to be known by.
    """

    async def work(_: Interrupts) -> int:
        found = await asyncio.to_thread(lambda: list(processes()))
        if json:
            show_json(found)
        else:
            _show(found)
        return Status.DONE

    return work


def _show(found: list[Process]) -> None:
    rows = [
        (
            process.pid,
            f"{process.started.astimezone():%Y-%m-%d %H:%M}",
            size(process.resident_bytes),
            ", ".join(Path(model.path).name for model in process.models) or None,
            " ".join(process.command.split()),  # a program given as text has lines
        )
        for process in found
    ]
    columns = ("PID", "STARTED", "MEMORY", "MODELS", "COMMAND")
    show_table(columns, rows, right=("PID", "MEMORY"))


def processes() -> Iterator[Process]:
    """Yield the processes that use llamactor, but for this one; blocks on the system."""
    import psutil

    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            described = _described(process)
        except (psutil.Error, OSError):  # it has ended, or is somebody else's
            continue
        if described is not None:
            yield described


def _described(process: psutil.Process) -> Process | None:
    # Names alone are cheap; how much of each is in memory the system must count.
    if CORE not in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace"):
        return None
    maps = process.memory_maps()
    return Process(
        pid=process.pid,
        started=datetime.fromtimestamp(process.create_time(), UTC),
        resident_bytes=process.memory_info().rss,
        command=shlex.join(process.cmdline()),
        models=[LoadedFile(m.path, m.rss) for m in maps if _is_model(Path(m.path))],
    )


def _is_model(path: Path) -> bool:
    # A file that was deleted still has its name; one that a link led to may have any.
    return path.suffix == ".gguf" or (path.is_file() and _begins_as_gguf(path))


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF)) == GGUF
    except OSError:
        return False
