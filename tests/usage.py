"""What this process has, for tests that look for what was left behind."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path
from typing import NamedTuple

MALLINFO = (
    *("arena", "ordblks", "smblks", "hblks", "mapped"),
    *("usmblks", "fsmblks", "in_use", "fordblks", "keepcost"),
)


class Mallinfo(ctypes.Structure):
    """The C library's `struct mallinfo2`."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO)


def trim() -> ctypes.CDLL:
    """Give back what nobody needs; return the C library."""
    gc.collect()
    library = ctypes.CDLL(None)
    library.malloc_trim(0)
    return library


class Usage(NamedTuple):
    """What this process has."""

    threads: int
    descriptors: int
    allocated: int
    """Bytes that the C library's allocator has handed out: exact, but without Python's objects."""
    resident: int
    """Bytes in memory: everything, but freed blocks that cannot be given back count too."""

    @classmethod
    def now(cls) -> Usage:
        library = trim()
        library.mallinfo2.restype = Mallinfo
        heap = library.mallinfo2()
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return cls(
            threads=len(os.listdir("/proc/self/task")),  # noqa: PTH208 -- counts, no paths wanted
            descriptors=len(os.listdir("/proc/self/fd")),  # noqa: PTH208
            allocated=heap.in_use + heap.mapped,
            resident=pages * os.sysconf("SC_PAGE_SIZE"),
        )
