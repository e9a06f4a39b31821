"""Cancelling, by every way: how much is still evaluated, counted by the context's own counters.

The counters are read when the cancel has been asked for. What was evaluated by then is no fault of
the cancel, so the bounds hold whatever the machine does meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor import ClosedError, Context, Model, Prediction, PromptProgress, Sequence
from tests.contexts import prompt, remembers, soon, until, waiting
from tests.models import tiny_llama

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Gate

UBATCH = 64
"""Tokens in a micro-batch, where there are several."""

LONG = prompt(2000)
"""A prompt that takes a second or more."""


@pytest.fixture(scope="session")
def heavy_model_path(models: Path) -> Path:
    """A Llama that needs long enough for a prompt that a cancel comes in the middle of it."""
    return tiny_llama(models / "heavy.gguf", width=256, layers=8, heads=4)


@dataclass
class Case:
    """A prediction that runs, and everything it runs in."""

    model: Model
    context: Context
    sequence: Sequence
    prediction: Prediction | None = None
    closing: asyncio.Task[None] | None = None

    def running(self) -> Prediction:
        assert self.prediction is not None
        return self.prediction

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path, **options: Any) -> AsyncIterator[Case]:
        async with llamactor.load_model(path, context_size=64, sequences=1, threads=1) as model:
            options = {"context_size": 4096, "sequences": 1, "threads": 1} | options
            async with model.create_context(**options) as context:
                sequence = await context.sequence()
                yield cls(model, context, sequence)
                await sequence.aclose()


# --- the ways -------------------------------------------------------------------------------------


async def by_cancel(case: Case) -> None:
    case.running().cancel()


async def by_cancel_from_a_thread(case: Case) -> None:
    await asyncio.to_thread(case.running().cancel)


async def by_cancelling_the_task_that_awaits(case: Case) -> None:
    task = await waiting(case.running().result())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_cancelling_the_task_that_iterates(case: Case) -> None:
    async def read(prediction: Prediction) -> None:
        async for _ in prediction:
            await asyncio.Event().wait()

    task = await waiting(read(case.running()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_a_timeout(case: Case) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await case.running()


async def by_leaving_its_block(case: Case) -> None:
    while True:
        async with case.running():
            break


async def by_dropping_the_last_reference(case: Case) -> None:
    aiter(case.running())  # a read prediction may be dropped without a warning
    case.prediction = None
    gc.collect()


async def by_closing_the_sequence(case: Case) -> None:
    await case.sequence.aclose()


async def by_closing_the_context(case: Case) -> None:
    case.closing = await waiting(case.context.aclose())
    await until(lambda: case.context.closed)


async def by_closing_the_model(case: Case) -> None:
    case.closing = await waiting(case.model.aclose())
    await until(lambda: case.context.closed)


CANCELS = (
    by_cancel,
    by_cancel_from_a_thread,
    by_cancelling_the_task_that_awaits,
    by_cancelling_the_task_that_iterates,
    by_a_timeout,
    by_leaving_its_block,
    by_dropping_the_last_reference,
)
CLOSES = (by_closing_the_sequence, by_closing_the_context, by_closing_the_model)
every_way = pytest.mark.parametrize("way", [*CANCELS, *CLOSES])
Way = Callable[[Case], Awaitable[None]]


async def finish(case: Case, way: Way) -> None:
    """Wait until nothing runs any more, and check how it ended."""
    if case.closing is not None:
        await soon(case.closing)
    if case.prediction is None:
        await soon(case.sequence.erase([]))  # has its turn after the prediction
    elif way in CLOSES:
        with pytest.raises(ClosedError):
            await soon(case.prediction)
    else:
        result = await soon(case.prediction)
        assert result.stop_reason == "cancelled"
        assert result.stats.predicted_tokens == len(result.tokens)


async def stays_exact(case: Case, way: Way, tokens: list[int]) -> None:
    """Pass if counters and tokens agree and the sequence still predicts rightly."""
    if case.context.closed:
        assert case.sequence.closed
        return
    stats = case.context.stats
    n = stats.cells_used
    assert stats.evaluated_tokens == stats.prompt_tokens + stats.decoded_tokens == n
    if case.sequence.closed:
        case.sequence = await soon(case.context.sequence())
        assert n == 0 or await case.sequence.prefill(tokens[:n]) == 0, "it was cached"
    held = case.sequence.tokens
    assert held == tokens[:n]
    if not held:
        held = prompt(30, 1)
        await case.sequence.prefill(held)
    await remembers(case.sequence, held, case.model)
    result = await soon(case.sequence.predict([*held, *prompt(3, 2)], max_tokens=3))
    assert result.stats.cached_tokens == len(held)
    assert case.context.stats.cells_used == len(case.sequence.tokens) == len(held) + 5


# --- during a prompt ------------------------------------------------------------------------------


async def computing() -> None:
    """Wait until the process has computed for a while; nothing else computes for so long."""
    start = time.process_time()
    await until(lambda: time.process_time() - start > 0.03)


@every_way
async def test_a_prompt_goes_on_for_one_micro_batch_at_most(
    heavy_model_path: Path, way: Way
) -> None:
    async with Case.open(heavy_model_path, ubatch_size=UBATCH) as case:
        case.prediction = case.sequence.predict(LONG)
        await until(lambda: case.context.stats.micro_batches >= 2)
        await way(case)
        before = case.context.stats
        assert before.evaluated_tokens < len(LONG)
        await finish(case, way)
        after = case.context.stats
        assert after.evaluated_tokens - before.evaluated_tokens <= UBATCH
        assert after.micro_batches - before.micro_batches <= 1
        await stays_exact(case, way, LONG)


@every_way
async def test_alone_on_a_cpu_not_even_the_micro_batch_is_finished(
    heavy_model_path: Path, way: Way
) -> None:
    async with Case.open(heavy_model_path, batch_size=2048, ubatch_size=2048) as case:
        case.prediction = case.sequence.predict(LONG)
        await computing()
        await way(case)
        await finish(case, way)
        stats = case.context.stats
        assert stats.decode_time > 0, "it was interrupted, not kept from starting"
        assert stats.evaluated_tokens == stats.micro_batches == 0
        await stays_exact(case, way, LONG)


@every_way
async def test_micro_batches_before_the_interrupted_one_stay(
    heavy_model_path: Path, way: Way
) -> None:
    """One decode call of 32 micro-batches: it ends in the middle and what is complete counts."""
    async with Case.open(heavy_model_path, batch_size=2048, ubatch_size=UBATCH) as case:
        case.prediction = case.sequence.predict(LONG)
        await computing()
        await way(case)
        await finish(case, way)
        stats = case.context.stats
        assert stats.evaluated_tokens % UBATCH == 0
        assert stats.evaluated_tokens < len(LONG)
        await stays_exact(case, way, LONG)


async def test_others_in_the_batch_are_not_interrupted(heavy_model_path: Path) -> None:
    async with (
        Case.open(heavy_model_path, sequences=2, ubatch_size=UBATCH) as case,
        case.context.sequence() as other,
    ):
        companion = other.predict(prompt(10, 1), max_tokens=60)
        await until(lambda: companion.stats.predicted_tokens >= 2)
        case.prediction = case.sequence.predict(LONG)
        await until(lambda: len(case.sequence.tokens) >= UBATCH)
        case.prediction.cancel()
        held = len(case.sequence.tokens)
        assert (await soon(case.prediction)).stop_reason == "cancelled"
        assert len(case.sequence.tokens) - held <= UBATCH
        result = await soon(companion)
        assert len(result.tokens) == 60
        stats = case.context.stats
        assert stats.cells_used == len(case.sequence.tokens) + len(other.tokens)
        await remembers(case.sequence, case.sequence.tokens, case.model)
        await remembers(other, [*prompt(10, 1), *result.tokens[:-1]], case.model)


async def test_a_wide_batch_with_others_does_not_hold_a_cancel_up(heavy_model_path: Path) -> None:
    """A call that is not interrupted must not be longer than a micro-batch."""
    async with (
        Case.open(heavy_model_path, sequences=2, batch_size=2048, ubatch_size=UBATCH) as case,
        case.context.sequence() as other,
    ):
        companion = other.predict(prompt(40, 1), max_tokens=1)
        case.prediction = case.sequence.predict(LONG)
        await computing()
        case.prediction.cancel()
        assert (await soon(case.prediction)).stop_reason == "cancelled"
        await soon(companion)
        assert len(case.sequence.tokens) < len(LONG) // 2


@pytest.mark.parametrize("work", ["prefill", "score"])
async def test_work_without_a_prediction_stops_too(heavy_model_path: Path, work: str) -> None:
    async with Case.open(heavy_model_path, ubatch_size=UBATCH) as case:
        task = await waiting(getattr(case.sequence, work)(LONG))
        await until(lambda: case.context.stats.micro_batches >= 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        before = case.context.stats
        await soon(case.sequence.erase([]))
        after = case.context.stats
        assert after.evaluated_tokens - before.evaluated_tokens <= UBATCH
        assert after.evaluated_tokens < len(LONG)
        await stays_exact(case, by_cancel, LONG)


async def test_a_deterministic_prompt_stops_within_a_micro_batch(heavy_model_path: Path) -> None:
    async with Case.open(heavy_model_path, ubatch_size=UBATCH) as case:
        prediction = case.sequence.predict(LONG, deterministic=True)
        await until(lambda: case.context.stats.micro_batches >= 2)
        prediction.cancel()
        before = case.context.stats
        assert (await soon(prediction)).stop_reason == "cancelled"
        after = case.context.stats
        assert after.evaluated_tokens - before.evaluated_tokens <= UBATCH
        assert after.evaluated_tokens < len(LONG)
        held = case.sequence.tokens
        assert held == LONG[: len(held)]
        await case.sequence.prefill(LONG[:100])
        await remembers(case.sequence, LONG[:100], case.model)


async def test_what_waits_behind_others_is_never_evaluated(
    tiny_model_path: Path, gate: Gate
) -> None:
    async with Case.open(tiny_model_path) as case:
        running = case.sequence.predict(prompt(10), logits_processor=gate, max_tokens=2)
        await gate.reached()
        behind = case.sequence.predict(prompt(500, 1))
        prefill = await waiting(case.sequence.prefill(prompt(500, 2)))
        behind.cancel()
        prefill.cancel()
        with pytest.raises(asyncio.CancelledError):
            await prefill
        gate.open()
        assert len((await soon(running)).tokens) == 2
        result = await soon(behind)
        assert (result.content, result.stop_reason) == ("", "cancelled")
        await soon(case.sequence.erase([]))
        assert case.context.stats.evaluated_tokens == 11
        assert len(case.sequence.tokens) == 11


async def test_a_cancel_in_the_queue_of_a_sequence_ends_at_once(
    tiny_model_path: Path, gate: Gate
) -> None:
    async with Case.open(tiny_model_path) as case:
        running = case.sequence.predict(prompt(10), logits_processor=gate, max_tokens=2)
        await gate.reached()
        behind = case.sequence.predict(prompt(500, 1))
        behind.cancel()
        assert (await soon(behind)).stop_reason == "cancelled"
        assert not running.done
        gate.open()
        await soon(running)


async def test_progress_is_told_until_the_cancel(heavy_model_path: Path) -> None:
    async with Case.open(heavy_model_path, ubatch_size=UBATCH) as case:
        prediction = case.sequence.predict(LONG)
        seen = []
        async for event in prediction.events():
            if isinstance(event, PromptProgress):
                seen.append(event)
            if len(seen) == 3:
                prediction.cancel()
        assert [event.processed % UBATCH for event in seen] == [0] * len(seen)
        processed = [event.processed for event in seen]
        assert processed == sorted(processed)
        assert all((event.cached, event.total) == (0, len(LONG)) for event in seen)
        assert len(case.sequence.tokens) - processed[2] <= 2 * UBATCH


# --- during decoding ------------------------------------------------------------------------------


@every_way
async def test_decoding_goes_on_for_one_step_at_most(tiny_model_path: Path, way: Way) -> None:
    async with Case.open(tiny_model_path) as case:
        tokens = prompt(20)
        case.prediction = case.sequence.predict(tokens)
        await until(lambda: case.context.stats.decoded_tokens >= 5)
        await way(case)
        before = case.context.stats
        await finish(case, way)
        after = case.context.stats
        assert after.decoded_tokens - before.decoded_tokens <= 1
        assert after.prompt_tokens == 20
        if case.prediction is not None:
            tokens += await produced(case.prediction)
            await stays_exact(case, way, tokens)


@every_way
async def test_a_generation_on_its_own_thread_makes_no_further_step(
    tiny_model_path: Path, gate: Gate, way: Way
) -> None:
    async with Case.open(tiny_model_path) as case:
        case.prediction = case.sequence.predict(prompt(20), logits_processor=gate)
        gate.allow(3)
        for _ in range(4):
            await gate.reached()
        await way(case)
        before = case.context.stats
        assert (before.prompt_tokens, before.decoded_tokens) == (20, 3)
        gate.open()
        await finish(case, way)
        after = case.context.stats
        assert (after.batches, after.evaluated_tokens) == (before.batches, 23)
        assert gate.arrived == 4


async def produced(prediction: Prediction) -> list[int]:
    """The tokens that a cancelled or closed prediction has made."""
    try:
        return (await prediction).tokens
    except ClosedError as failure:
        return failure.partial.tokens if failure.partial else []


async def test_the_others_go_on_when_one_is_cancelled(tiny_model_path: Path) -> None:
    async with Case.open(tiny_model_path, sequences=8) as case:
        spare = [await case.context.sequence() for _ in range(7)]
        everyone = [case.sequence, *spare]
        running = [each.predict(prompt(10, i), max_tokens=150) for i, each in enumerate(everyone)]
        await until(lambda: all(each.stats.predicted_tokens > 2 for each in running))
        for each in running[::2]:
            each.cancel()
        results = [await soon(each) for each in running]
        assert [result.stop_reason for result in results[1::2]] == ["max_tokens"] * 4
        assert all(len(result.tokens) == 150 for result in results[1::2])
        for i, (sequence, result) in enumerate(zip(everyone, results, strict=True)):
            whole = [*prompt(10, i), *result.tokens]
            assert sequence.tokens == whole[: len(sequence.tokens)]
            assert len(whole) - len(sequence.tokens) <= 1
            await remembers(sequence, sequence.tokens, case.model)
        for sequence in spare:
            await sequence.aclose()


async def test_many_cancels_leave_no_cell_behind(tiny_model_path: Path) -> None:
    async with Case.open(tiny_model_path, context_size=1024, sequences=4) as case:
        await case.sequence.aclose()
        for i in range(100):
            async with asyncio.TaskGroup() as group:
                for j in range(5):
                    group.create_task(start_and_cancel(case.context, i + j))
        await until(lambda: case.context.stats.sequences_active == 0)
        assert case.context.stats.sequences_waiting == 0
        case.sequence = await case.context.sequence()
        whole = prompt(1024, 77)
        assert await soon(case.sequence.prefill(whole)) == 1024
        assert case.context.stats.cells_used == 1024
        await case.sequence.erase([(200, 1024)])
        await remembers(case.sequence, whole[:200], case.model)


async def start_and_cancel(context: Context, number: int) -> None:
    async with context.sequence() as sequence:
        prediction = sequence.predict(prompt(20, number), max_tokens=50)
        for _ in range(number % 7):
            await asyncio.sleep(0)
        prediction.cancel()
        result = await soon(prediction)
        assert result.stats.predicted_tokens == len(result.tokens) <= 50
