"""Random lives of a runtime: whatever is loaded, swapped, cancelled and dropped, the rules hold."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llamactor import (
    BusyError,
    ClosedError,
    InsufficientMemoryError,
    LoadCancelledError,
    ModelNotLoadedError,
    Runtime,
)
from tests.contexts import soon, until
from tests.speaking import SAYS, SMALL
from tests.unit.test_loading import is_mapped, until_unmapped
from tests.unit.test_runtime_memory import bytes_of

if TYPE_CHECKING:
    from llamactor import Loading, ModelHandle

pytestmark = pytest.mark.every_loop

USERS = 6
STEPS = 25
EXPECTED = (BusyError, ClosedError, InsufficientMemoryError, ModelNotLoadedError)


def native_threads() -> int:
    """How many threads of models and contexts there are; those of asyncio's executor may stay."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            count += (task / "comm").read_text(encoding="ascii").startswith("llamactor")
    return count


class User:
    """Somebody who does whatever comes to mind, and checks each answer."""

    def __init__(self, runtime: Runtime, spoken: dict[str, Path], seed: int) -> None:
        self.runtime = runtime
        self.spoken = spoken
        self.draw = random.Random(seed)
        self.answers = 0

    async def live(self) -> None:
        actions = (self.ask, self.ask, self.hold, self.load, self.cancel, self.drop)
        for _ in range(STEPS):
            act = self.draw.choice((*actions, self.unload, self.swap, self.read))
            with contextlib.suppress(*EXPECTED):
                await soon(act(self.draw.choice(list(SAYS))))

    def wanted(self, name: str) -> Loading[ModelHandle]:
        return self.runtime.model(self.spoken[name], **SMALL)

    async def ask(self, name: str) -> None:
        model = await self.wanted(name)
        prediction = model.complete("x", max_tokens=self.draw.randrange(1, 9))
        content = (await prediction).content
        assert SAYS[name].startswith(content)
        self.answers += 1

    async def hold(self, name: str) -> None:
        async with self.wanted(name) as model:
            epoch = model.epoch
            await asyncio.sleep(0.001)
            assert epoch is None or model.epoch in {epoch, None} or model.epoch > epoch

    async def load(self, name: str) -> None:
        async with self.runtime.load(self.spoken[name], **SMALL) as model:
            assert (await model.complete("x", max_tokens=8)).content == SAYS[name]
            self.answers += 1

    async def cancel(self, name: str) -> None:
        loading = self.wanted(name)
        for _ in range(self.draw.randrange(30)):
            await asyncio.sleep(0)
        loading.cancel()
        with contextlib.suppress(LoadCancelledError):  # it may have had no effect any more
            await loading

    async def drop(self, name: str) -> None:
        loading = self.runtime.load(self.spoken[name], **SMALL)
        waiter = asyncio.create_task(loading.result())
        del loading
        for _ in range(self.draw.randrange(30)):
            await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.wait([waiter])

    async def unload(self, name: str) -> None:
        policy = self.draw.choice([True, True, "refuse"])
        await self.runtime.unload(name, drain=policy)  # type: ignore[arg-type]

    async def swap(self, name: str) -> None:
        # By itself, so that a name goes on saying what it says.
        await self.runtime.swap(name, self.spoken[name], **SMALL)

    async def read(self, name: str) -> None:
        model = await self.wanted(name)
        async for _ in model.complete("x", max_tokens=50):
            break


@pytest.mark.parametrize("seed", range(3))
async def test_random_lives_keep_every_rule_and_leave_nothing(
    spoken: dict[str, Path], seed: int
) -> None:
    one = await bytes_of(spoken["alpha"])
    limit = 2 * one + one // 2
    threads = native_threads()
    seen: list[int] = []
    async with Runtime(memory_limit=limit) as runtime:

        async def watch() -> None:
            async for status in runtime.status():
                seen.append(status.memory_bytes)
                assert len({one.epoch for one in status.models}) == len(status.models)

        watching = asyncio.create_task(watch())
        users = [User(runtime, spoken, 100 * seed + number) for number in range(USERS)]
        await asyncio.gather(*(user.live() for user in users))
        gc.collect()
        await until(lambda: not runtime.snapshot.loading)
        await until(lambda: {one.state for one in runtime.snapshot.models} <= {"idle"})
        assert all(not one.leases for one in runtime.snapshot.models)
        held = sum(one.memory_bytes for one in runtime.snapshot.models)
        assert runtime.snapshot.memory_bytes == held
    await soon(watching)
    assert max(seen) <= limit
    assert sum(user.answers for user in users) > USERS
    for path in spoken.values():
        await until_unmapped(path)
        assert not is_mapped(path)
    await until(lambda: native_threads() <= threads)
