"""Prints what a runtime says that a model takes, and by how much the process grows with it.

    python -m tests.growth FILE CONTEXT_SIZE

In a process of its own: another model is used first, so that the code of llama.cpp is in memory,
and nothing else has left holes that new blocks could fill.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import llamactor
from tests.models import FIRST_BYTE, tiny_llama
from tests.usage import trim

PROMPT = 600
"""Tokens, if the context has room: a whole micro-batch touches all buffers."""


def taken() -> int:
    """Bytes that the process has in memory of its own, and of model files.

    Pages of programs and libraries do not count: the system may take them and give them back at
    any time, and a busy one does so while this is measured.
    """
    trim()
    total, is_model = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, *values = line.split(maxsplit=1)
        if not name.endswith(":"):
            is_model = line.endswith(".gguf")
        elif name in {"Anonymous:", "Swap:"} or (is_model and name == "Rss:"):
            total += int(values[0].split()[0]) * 1024
    return total


async def use(model: llamactor.ModelHandle, context_size: int) -> None:
    """Fill a micro-batch, and as much of the context as that takes."""
    tokens = [FIRST_BYTE + i % 256 for i in range(min(PROMPT, context_size - 16))]
    await model.complete(tokens, max_tokens=8, ignore_eos=True)


async def main(ref: str, context_size: int) -> None:
    """Measure one model."""
    async with llamactor.Runtime(memory_limit=None) as runtime:
        with tempfile.TemporaryDirectory() as folder:
            warm = tiny_llama(Path(folder) / "warm.gguf")
            async with runtime.load(warm, context_size=512, threads=1) as model:
                await use(model, 512)
        before = taken()
        model = await runtime.load(ref, context_size=context_size, threads=1)
        await use(model, context_size)
        grown = taken() - before
        assert model.loaded is not None
        print(model.loaded.memory_bytes, grown)  # noqa: T201 -- for whoever started this


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
