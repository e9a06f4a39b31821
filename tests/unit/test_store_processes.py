"""Several processes share one store, and some are killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from llamactor import ModelStore
from tests import models
from tests.conftest import PATIENCE

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = float(os.environ.get("LLAMACTOR_TEST_STORE_SECONDS", "2"))
"""How long the processes work; 30 is for a note."""

HAMMER = '''
"""Imports, uses, verifies and removes at random; prints what it has counted."""
import asyncio, collections, random, sys, time
from llamactor import ModelNotFoundError, ModelStore

async def main(folder, files, seed, seconds):
    store, chance = ModelStore(folder), random.Random(seed)
    counts = collections.Counter()
    await store.note_use("shared", tokens=1)
    counts["uses"] += 1
    print("begun", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        name = chance.choice(["a", "b"])  # one is copied, one is recorded where it lies
        action = chance.choice(["import", "use", "use", "use", "verify", "list", "remove"])
        counts["actions"] += 1
        if action == "import":
            await store.import_(f"{files}/{name}.gguf", name=name, copy=name == "a")
        elif action == "use":
            await asyncio.gather(*(store.note_use("shared", tokens=3) for _ in range(3)))
            counts["uses"] += 3
        elif action == "verify":
            found = await store.verify()
            assert all(each.ok for each in found), found
            assert "shared" in {each.name for each in found}
        elif action == "list":
            assert "shared" in {model.name for model in await store.list()}
        else:
            try:
                await store.remove(name)
            except ModelNotFoundError:
                pass
    print(counts["uses"], counts["actions"], flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
'''


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Three small models."""
    folder = tmp_path / "files"
    folder.mkdir()
    for seed, name in enumerate(("a", "b", "shared")):
        models.tiny_llama(folder / f"{name}.gguf", width=32, layers=1, heads=1, seed=seed)
    return folder


@pytest.fixture
async def store(tmp_path: Path, files: Path) -> ModelStore:
    """A store with one model that nobody removes."""
    store = ModelStore(tmp_path / "store")
    await store.import_(files / "shared.gguf")
    return store


def hammer(store: ModelStore, files: Path, seed: int, seconds: float) -> subprocess.Popen[str]:
    arguments = [str(store.path), str(files), str(seed), str(seconds)]
    command = [sys.executable, "-W", "error", "-c", HAMMER, *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


async def ended(process: subprocess.Popen[str], seconds: float = 0) -> tuple[str, str]:
    return await asyncio.to_thread(process.communicate, timeout=PATIENCE + seconds)


async def test_two_processes_lose_no_update_and_see_no_lock(store: ModelStore, files: Path) -> None:
    processes = [hammer(store, files, seed, SECONDS) for seed in (1, 2)]
    outputs = [await ended(process, SECONDS) for process in processes]
    assert [errors for _, errors in outputs] == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    counts = [tuple(map(int, output.split()[1:])) for output, _ in outputs]
    uses, actions = (sum(numbers) for numbers in zip(*counts, strict=True))
    shared = await store.get("shared")
    print(f"{actions} actions of two processes in {SECONDS:.0f} s, {uses} uses counted")  # noqa: T201
    assert shared.usage_count == uses
    assert shared.tokens_generated == 3 * uses - 2 * 2  # the first use of each had one token
    names = Counter(model.name for model in await store.list())
    assert set(names) <= {"a", "b", "shared"}
    for model in await store.list():
        assert model.path.exists()


async def test_a_killed_process_leaves_a_store_that_opens(store: ModelStore, files: Path) -> None:
    chance = random.Random(0)
    for seed in range(3):
        process = hammer(store, files, seed, PATIENCE)
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "begun\n"
        await asyncio.sleep(chance.uniform(0.0, 0.1))  # a kill may come at any time
        process.send_signal(signal.SIGKILL)
        await ended(process)
        before = (await store.get("shared")).usage_count
        await store.note_use("shared")
        assert (await store.get("shared")).usage_count == before + 1
        assert (await store.verify("shared"))[0].ok
    for name in {model.name for model in await store.list()} - {"shared"}:
        await store.remove(name)
    await store.import_(files / "a.gguf", copy=True)
    assert {model.name for model in await store.list()} == {"a", "shared"}


async def test_a_forked_child_can_use_the_store(store: ModelStore) -> None:
    program = f"""
import asyncio, os
from llamactor import ModelStore
store = ModelStore({str(store.path)!r})
asyncio.run(store.note_use("shared"))
child = os.fork()
asyncio.run(store.note_use("shared"))
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    assert await asyncio.to_thread(process.wait, PATIENCE) == 0
    assert (await store.get("shared")).usage_count == 3
