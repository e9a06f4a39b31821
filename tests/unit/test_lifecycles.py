"""A thousand random lives on one model: no hang, nothing left behind, no warning, no growth.

Several threads, each with a loop of its own and several tasks, share one model and its contexts. A
life takes a sequence or the model itself, does a few things in random order and ends in one of the
ways there are. Every choice comes from a seed; only the interleaving of threads does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

import llamactor
from llamactor import BusyError, ClosedError, LoadCancelledError, Prediction, Sequence
from tests.conftest import PATIENCE
from tests.usage import Usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

THREADS, TASKS, LIVES = 4, 5, 25
"""Half a thousand lives per round."""

ROUNDS = 2

SEED = 20_260_803

HEAP_SLACK = 1 << 20
"""Bytes that may be in use more after the second half than after the first: 2 KiB per life."""

RSS_SLACK = 16 << 20
"""The same for resident memory, which freed blocks in many threads' arenas blur by some MiB."""

ENDLESS: dict[str, Any] = {"ignore_eos": True, "overflow": "rolling_window"}
"""Options of a prediction that goes on until somebody stops it."""

TEXTS = (
    "once upon a time",
    "the sea",
    "one, two, three",
    "def main():\n",
    "once upon a stone",
    "я",
)

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Life:
    """One task's way through its lives."""

    def __init__(self, world: World, rng: random.Random, path: Path) -> None:
        self.world = world
        self.rng = rng
        self.path = path

    async def live(self) -> None:
        """Live once, in one of all ways."""
        lives: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = (
            *[self.hold_a_sequence] * 5,
            *[self.complete] * 4,
            self.crowd,
            self.queue,
            self.stall,
            self.open_a_context,
            self.load_a_model,
        )
        await self.rng.choice(lives)()

    # --- lives ------------------------------------------------------------------------------------

    async def hold_a_sequence(self) -> None:
        async with self.rng.choice(self.world.contexts).sequence() as sequence:
            for _ in range(self.rng.randrange(1, 5)):
                await self.act(sequence)
            await self.end(lambda: sequence.predict(self.prompt(), **ENDLESS), sequence)

    async def complete(self) -> None:
        model = self.world.model
        await self.end(lambda: model.complete(self.prompt(), **ENDLESS))

    async def crowd(self) -> None:
        """More predictions than there are sequences, cancelled in any order."""
        model = self.world.model
        predictions = [model.complete(self.prompt(), **ENDLESS) for _ in range(10)]
        for prediction in self.rng.sample(predictions, len(predictions)):
            prediction.cancel()
            await self.turns()
        results = await asyncio.gather(*predictions)
        assert {result.stop_reason for result in results} == {"cancelled"}

    async def queue(self) -> None:
        """Wait for a sequence and lose patience, or get one."""
        context = self.rng.choice(self.world.contexts)
        waiting = asyncio.ensure_future(context.sequence())
        await self.turns()
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await waiting).aclose()
        with contextlib.suppress(TimeoutError):
            async with context.sequence(timeout=self.rng.choice((0, 0.001))) as sequence:
                await sequence.predict(self.prompt(), max_tokens=2)

    async def stall(self) -> None:
        """A reader lags until its prediction pauses, and perhaps gives its sequence up."""
        prediction = self.world.model.complete(self.prompt(), max_tokens=40, max_pending=2)
        iterator = aiter(prediction)
        text = await anext(iterator)
        await self.turns()
        text += "".join([piece async for piece in iterator])
        assert text == (await prediction).content

    async def open_a_context(self) -> None:
        """A context of its own, closed under whatever runs in it."""
        opening = self.world.model.create_context(context_size=256, sequences=3, threads=1)
        async with opening as context:
            sequence = await context.sequence()
            prediction = sequence.predict(self.prompt(), **ENDLESS)
            scoring = asyncio.ensure_future(sequence.score(self.tokens()))
            await self.turns()
        for failure in (prediction, scoring):
            with pytest.raises(ClosedError):
                await failure

    async def load_a_model(self) -> None:
        """Load the same file once more; most of the times nobody wants it in the end."""
        loading = llamactor.load_model(self.world.path, context_size=256, sequences=1, threads=1)
        await self.turns()
        if self.rng.random() < 0.7:
            loading.cancel()
        with contextlib.suppress(LoadCancelledError):
            async with loading as model:
                await self.end(lambda: model.complete(self.prompt(), **ENDLESS))

    # --- what a sequence can do -------------------------------------------------------------------

    async def act(self, sequence: Sequence) -> None:
        acts = (
            self.predict,
            self.prefill,
            self.score,
            self.erase,
            self.shift,
            self.clear,
            self.save_and_load,
            self.fork,
        )
        act = self.rng.choice(acts)(sequence)
        if self.rng.random() < 0.7:
            return await act
        task = asyncio.create_task(act)
        await self.turns()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        # Whatever was interrupted: the sequence is usable and knows what it holds.
        tokens = self.tokens()
        await sequence.prefill(tokens)
        assert sequence.tokens == tokens
        return None

    async def predict(self, sequence: Sequence) -> None:
        count = self.rng.randrange(1, 20)
        result = await sequence.predict(self.prompt(), max_tokens=count, ignore_eos=True)
        assert len(result.tokens) == result.stats.predicted_tokens == count

    async def prefill(self, sequence: Sequence) -> None:
        tokens = self.tokens()
        assert await sequence.prefill(tokens) <= len(tokens)
        assert sequence.tokens == tokens

    async def score(self, sequence: Sequence) -> None:
        tokens = self.tokens()
        assert len(await sequence.score(tokens)) == len(tokens)

    async def erase(self, sequence: Sequence) -> None:
        held = sequence.tokens
        start, end = sorted(self.rng.randrange(len(held) + 1) for _ in range(2))
        await sequence.erase([(start, end)])
        assert sequence.tokens == held[:start] + held[end:]

    async def shift(self, sequence: Sequence) -> None:
        held = sequence.tokens
        keep, end = sorted(self.rng.randrange(len(held) + 1) for _ in range(2))
        await sequence.shift(keep, end - keep)
        assert sequence.tokens == held[:keep] + held[end:]

    async def clear(self, sequence: Sequence) -> None:
        await sequence.clear()
        assert sequence.tokens == []

    async def save_and_load(self, sequence: Sequence) -> None:
        tokens = self.tokens()
        await sequence.prefill(tokens)
        await sequence.save(self.path)
        await sequence.clear()
        await sequence.load(self.path)
        assert sequence.tokens == tokens

    async def fork(self, sequence: Sequence) -> None:
        """Both branches go on, and either may be closed first."""
        with contextlib.suppress(BusyError):
            async with await sequence.fork(timeout=self.rng.choice((0, 0.002))) as branch:
                assert branch.tokens == sequence.tokens
                await asyncio.gather(self.predict(sequence), self.predict(branch))
                await self.end(lambda: branch.predict(self.prompt(), **ENDLESS), branch)

    # --- how a prediction can end -----------------------------------------------------------------

    async def end(self, start: Callable[[], Prediction], sequence: Sequence | None = None) -> None:
        """Start a prediction that never ends by itself, read some of it, and end it."""
        if self.rng.random() < 0.2:
            return await self.drop(start)
        prediction = start()
        if sequence is not None and self.rng.random() < 0.2:
            return await self.close_under(prediction, sequence)
        ways = (
            self.cancel,
            self.cancel_elsewhere,
            self.cancel_the_waiter,
            self.lose_patience,
            self.leave_the_loop,
            self.leave_the_block,
            self.cancel_the_reader,
        )
        await self.rng.choice(ways)(prediction)
        result = await prediction
        assert result.stop_reason == "cancelled"
        assert result.content == prediction.text
        return None

    async def drop(self, start: Callable[[], Prediction]) -> None:
        """Drop the last reference, at once or whenever the collector comes."""
        prediction = start()
        iterator = await self.read(prediction)
        ring: list[object] = [prediction, iterator]
        if self.rng.random() < 0.5:
            ring.append(ring)
        del prediction, iterator, ring
        if self.rng.random() < 0.3:
            await asyncio.to_thread(gc.collect)

    async def close_under(self, prediction: Prediction, sequence: Sequence) -> None:
        async with prediction:
            await self.read(prediction)
            await sequence.aclose()
            with pytest.raises(ClosedError) as failure:
                await prediction
        assert failure.value.partial is not None
        assert failure.value.partial.content == prediction.text

    async def cancel(self, prediction: Prediction) -> None:
        iterator = await self.read(prediction)
        prediction.cancel()
        async for _ in iterator:
            pass

    async def cancel_elsewhere(self, prediction: Prediction) -> None:
        try:
            await self.turns()
            await asyncio.to_thread(prediction.cancel)
        except asyncio.CancelledError:
            prediction.cancel()  # else it is dropped and nobody ever did anything with it
            raise

    async def cancel_the_waiter(self, prediction: Prediction) -> None:
        waiter = asyncio.create_task(prediction.result())
        await self.turns(at_least=1)  # a task that never began was never interest
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter

    async def lose_patience(self, prediction: Prediction) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(self.rng.random() * 0.01):
                await prediction

    async def leave_the_loop(self, prediction: Prediction) -> None:
        async for _ in prediction:
            break

    async def leave_the_block(self, prediction: Prediction) -> None:
        async with prediction:
            await self.read(prediction)

    async def cancel_the_reader(self, prediction: Prediction) -> None:
        async def read() -> None:
            async for _ in prediction.events():
                pass

        reader = asyncio.create_task(read())
        await self.turns(at_least=1)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader

    # --- chance -----------------------------------------------------------------------------------

    def prompt(self) -> str:
        return self.rng.choice(TEXTS) * self.rng.randrange(1, 4)

    def tokens(self) -> list[int]:
        return self.world.model.tokenize(self.prompt())

    async def read(self, prediction: Prediction) -> AsyncIterator[str]:
        """Read the first few pieces, or just begin to; returns the iterator."""
        iterator = aiter(prediction)
        for _ in range(self.rng.randrange(4)):
            await anext(iterator)
        return iterator

    async def turns(self, at_least: int = 0) -> None:
        """Let everybody else run for a while."""
        for _ in range(self.rng.randrange(at_least, 8)):
            await asyncio.sleep(0)


class World:
    """What all lives share."""

    def __init__(self, path: Path, directory: Path, model: llamactor.Model) -> None:
        self.path = path
        self.directory = directory
        self.model = model
        self.contexts: list[llamactor.Context] = []
        self.reports: list[dict[str, Any]] = []

    async def open_contexts(self) -> None:
        """One with room for everybody, one where sequences push each other out."""
        for cells in (4096, 320):
            self.contexts.append(
                await self.model.create_context(context_size=cells, sequences=6, threads=1)
            )

    async def close_contexts(self) -> None:
        """Every sequence has come back, and every cell can be had again."""
        for context in self.contexts:
            held = [await context.sequence(timeout=PATIENCE) for _ in range(context.sequences)]
            assert context.try_sequence() is None
            for sequence in held:
                await sequence.clear()
                await sequence.aclose()
            await until(lambda context=context: context.stats.sequences_active == 0)  # type: ignore[misc]
            assert context.stats.sequences_waiting == 0
            assert context.stats.cells_used == 0
            await context.aclose()
        self.contexts.clear()

    def live_in_threads(self, loop: Callable[[], asyncio.AbstractEventLoop], seed: str) -> None:
        """Let every thread live its share of lives."""
        failures: list[BaseException] = []

        def run(name: str) -> None:
            try:
                with asyncio.Runner(loop_factory=loop) as runner:
                    runner.get_loop().set_exception_handler(self.report)
                    runner.run(self.live(name))
            except BaseException as failure:
                failures.append(failure)

        threads = [
            threading.Thread(target=run, args=(f"{seed}-{i}",), daemon=True) for i in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a life hangs"
        if failures:
            raise BaseExceptionGroup("lives failed", failures)

    def report(self, _: object, context: dict[str, Any]) -> None:
        # The collector may come for a dropped prediction after its sequence was closed.
        if not isinstance(context.get("exception"), ClosedError):
            self.reports.append(context)

    async def live(self, name: str) -> None:
        async with asyncio.TaskGroup() as group:
            for i in range(TASKS):
                group.create_task(self.live_on(f"{name}-{i}"))

    async def live_on(self, name: str) -> None:
        life = Life(self, random.Random(name), self.directory / name)
        for _ in range(LIVES):
            await life.live()


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOOPS)
def test_a_thousand_random_lives_leave_nothing_behind(
    kind: str, tiny_model_path: Path, tmp_path: Path
) -> None:
    with asyncio.Runner(loop_factory=LOOPS[kind]) as runner:
        runner.run(load_and_close(tiny_model_path))
    before = Usage.now()  # whatever is made once in a process is there
    with asyncio.Runner(loop_factory=LOOPS[kind]) as runner:
        model = runner.run(load(tiny_model_path))
        world = World(tiny_model_path, tmp_path, model)
        at_rest = [live_a_round(runner, world, kind, number) for number in range(ROUNDS)]
        runner.run(model.aclose())
    asyncio.run(until(lambda: Usage.now().threads <= before.threads))
    assert Usage.now().descriptors <= before.descriptors
    assert world.reports == []
    assert at_rest[-1].allocated - at_rest[0].allocated < HEAP_SLACK
    assert at_rest[-1].resident - at_rest[0].resident < RSS_SLACK


def test_a_sequence_that_arrives_after_its_loop_has_ended_goes_back(tiny_model_path: Path) -> None:
    gc.disable()  # nor does it take the collector
    try:
        with asyncio.Runner() as runner:
            model = runner.run(load(tiny_model_path))
            context = runner.run(open_pair(model))
            for _ in range(20):
                asyncio.run(fork_and_leave(context))
            runner.run(all_come_back(context))
            runner.run(model.aclose())
    finally:
        gc.enable()


async def open_pair(model: llamactor.Model) -> llamactor.Context:
    return await model.create_context(context_size=256, sequences=2, threads=1)


async def fork_and_leave(context: llamactor.Context) -> None:
    """Cancel a fork that its sequence is working on, and end the loop before it can answer."""
    async with context.sequence() as sequence:
        await sequence.prefill(TEXTS[0])
        fork = asyncio.create_task(sequence.fork(timeout=None))
        await asyncio.sleep(0)
        fork.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await fork).aclose()  # it was quicker


async def all_come_back(context: llamactor.Context) -> None:
    for sequence in [await context.sequence(timeout=PATIENCE) for _ in range(context.sequences)]:
        await sequence.aclose()


@pytest.mark.every_loop
async def test_a_closed_model_leaves_memory_whatever_handles_are_kept(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.gguf"
    own.write_bytes(tiny_model_path.read_bytes())
    model = await load(own)
    context = await open_pair(model)
    sequence = await context.sequence()
    finished = model.complete(TEXTS[0], max_tokens=2)
    result = await finished
    running = sequence.predict(TEXTS[0], **ENDLESS)
    assert str(own) in Path("/proc/self/maps").read_text(encoding="utf-8")
    await model.aclose()
    await until(lambda: str(own) not in Path("/proc/self/maps").read_text(encoding="utf-8"))
    with pytest.raises(ClosedError):
        await running
    assert (sequence.closed, context.closed, finished.text) == (True, True, result.content)


def live_a_round(runner: asyncio.Runner, world: World, kind: str, number: int) -> Usage:
    """Live half a thousand lives; returns what is in use when all is quiet again."""
    runner.run(world.open_contexts())
    world.live_in_threads(LOOPS[kind], f"{SEED}-{number}")
    runner.run(world.close_contexts())
    return Usage.now()


async def load(path: Path) -> llamactor.Model:
    return await llamactor.load_model(path, context_size=1024, sequences=4, threads=1)


async def load_and_close(path: Path) -> None:
    await (await load(path)).aclose()


async def until(condition: Callable[[], bool]) -> None:
    """Let other threads run until `condition` holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 -- nothing announces it
            await asyncio.sleep(0.001)
