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
from tests.usage import Usage

PROMPT = 600
"""Tokens, if the context has room: a whole micro-batch touches all buffers."""


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
        before = Usage.now()
        model = await runtime.load(ref, context_size=context_size, threads=1)
        await use(model, context_size)
        grown = Usage.now().resident - before.resident
        assert model.loaded is not None
        print(model.loaded.memory_bytes, grown)  # noqa: T201 -- for whoever started this


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
