"""Who is evaluated when: turns, priorities, deadlines, full contexts, shared cells, parking.

Text is not compared between runs that share a batch and runs that do not. Instead the tokens that a
prediction drew are scored again in a context of their own: each must have been the likeliest.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor import (
    Context,
    ContextOverflowError,
    ContextShifted,
    DeadlineExceededError,
    Model,
    Prediction,
    Sequence,
)
from tests.contexts import (
    PROBE,
    TOLERANCE,
    distance,
    plausible,
    prompt,
    remembers,
    soon,
    uncached,
    until,
    waiting,
)
from tests.models import tiny_llama

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Gate


@asynccontextmanager
async def opened(
    model: Model, size: int, sequences: int = 2, **options: Any
) -> AsyncIterator[tuple[Context, list[Sequence]]]:
    """A context with all its sequences."""
    async with model.create_context(
        context_size=size, sequences=sequences, threads=1, **options
    ) as context:
        held = [await context.sequence() for _ in range(sequences)]
        yield context, held
        for sequence in held:
            await sequence.aclose()


async def collect(prediction: Prediction) -> list[str]:
    return [text async for text in prediction]


async def unbroken(
    prediction: Prediction, model: Model, tokens: list[int], count: int
) -> llamactor.PredictionResult:
    """Pass if it drew `count` tokens that follow from `tokens`, and its text is all there."""
    pieces = await soon(collect(prediction))
    result = await soon(prediction)
    assert len(result.tokens) == result.stats.predicted_tokens == count
    assert "".join(pieces) == result.content == model.detokenize(result.tokens)
    assert result.stats.prompt_tokens == len(tokens)
    await plausible(model, tokens, result)
    return result


# --- turns ----------------------------------------------------------------------------------------


async def test_predictions_run_side_by_side(tiny_model_path: Path) -> None:
    """None of them ends by itself, and every one has its first piece."""
    begun: set[Prediction] = set()

    async def read(prediction: Prediction) -> None:
        async for _ in prediction:
            begun.add(prediction)
            if len(begun) == 8:
                prediction.cancel()

    async with llamactor.load_model(tiny_model_path, context_size=8192, threads=1) as model:
        prompts = [prompt(20, number) for number in range(8)]
        running = [model.complete(tokens, overflow="rolling_window") for tokens in prompts]
        await soon(asyncio.gather(*map(read, running)))
        assert {(await each).stop_reason for each in running} == {"cancelled"}


async def test_a_long_prompt_does_not_stop_those_who_generate(tiny_model: Model) -> None:
    seen: list[tuple[int, int]] = []

    async with opened(tiny_model, 8192) as (context, (one, other)):

        def look(*_: object) -> None:
            seen.append((context.stats.batches, running.stats.predicted_tokens))

        running = one.predict(prompt(10), overflow="rolling_window")
        await until(lambda: running.stats.predicted_tokens > 1)
        before = running.stats.predicted_tokens
        n_before = context.stats.batches
        await soon(other.predict(prompt(2000, 1), logits_processor=look, max_tokens=1))
        running.cancel()
        await soon(running)
        ((n_after, after),) = seen
        assert n_after - n_before >= 2000 // 128, "beside others a prompt goes in small parts"
        assert after - before >= n_after - n_before - 2, "each of them came with a token"


async def test_a_short_prompt_overtakes_a_long_one(tiny_model: Model) -> None:
    async with opened(tiny_model, 8192) as (context, (one, other)):
        order: list[str] = []
        long = one.predict(
            prompt(6000), logits_processor=lambda *_: order.append("long"), max_tokens=1
        )
        await until(lambda: context.stats.batches > 0)
        short = other.predict(
            prompt(20, 1), logits_processor=lambda *_: order.append("short"), max_tokens=1
        )
        await soon(asyncio.gather(long.result(), short.result()))
        assert order == ["short", "long"]


async def test_a_stalled_callback_holds_only_its_own_sequence(
    tiny_model: Model, gate: Gate
) -> None:
    async with opened(tiny_model, 1024) as (_, (one, other)):
        stalled = one.predict(prompt(10), logits_processor=gate, max_tokens=3)
        await gate.reached()
        assert len((await soon(other.predict(prompt(10, 1), max_tokens=50))).tokens) == 50
        assert stalled.stats.predicted_tokens == 0
        gate.open()
        assert len((await soon(stalled)).tokens) == 3


# --- priorities and deadlines ---------------------------------------------------------------------


async def test_of_those_who_wait_for_a_sequence_the_higher_priority_goes_first(
    tiny_model_path: Path, gate: Gate
) -> None:
    async with llamactor.load_model(
        tiny_model_path, context_size=512, sequences=1, threads=1
    ) as model:
        order: list[int] = []

        async def run(priority: int) -> None:
            await model.complete("once", max_tokens=1, priority=priority)
            order.append(priority)

        holder = model.complete("once", logits_processor=gate, max_tokens=1)
        await gate.reached()
        tasks = [await waiting(run(priority)) for priority in (0, -5, 7, 0, 7, 3, -5)]
        gate.open()
        await soon(holder)
        await soon(asyncio.gather(*tasks))
        assert order == [7, 7, 3, 0, 0, -5, -5]


async def test_of_two_prompts_the_higher_priority_is_evaluated_first(tiny_model: Model) -> None:
    async with opened(tiny_model, 12_000) as (context, (one, other)):
        order: list[str] = []
        low = one.predict(
            prompt(5000), logits_processor=lambda *_: order.append("low"), max_tokens=1, priority=-1
        )
        await until(lambda: context.stats.batches > 0)
        high = other.predict(
            prompt(5500, 1),
            logits_processor=lambda *_: order.append("high"),
            max_tokens=1,
            priority=1,
        )
        await soon(asyncio.gather(low.result(), high.result()))
        assert order == ["high", "low"]


async def test_a_deadline_while_decoding_keeps_the_partial_answer(tiny_model: Model) -> None:
    async with opened(tiny_model, 512, 1) as (context, (sequence,)):
        prediction = sequence.predict(prompt(10), deadline=0.2, overflow="rolling_window")
        with pytest.raises(DeadlineExceededError, match="deadline") as failure:
            await soon(prediction)
        partial = failure.value.partial
        assert partial is not None
        assert partial.stop_reason is None
        assert len(partial.tokens) == partial.stats.predicted_tokens > 0
        assert tiny_model.detokenize(partial.tokens) == partial.content == prediction.text
        with pytest.raises(DeadlineExceededError):
            await prediction
        assert isinstance(failure.value, TimeoutError)
        assert len((await soon(sequence.predict(prompt(5), max_tokens=2))).tokens) == 2
        assert context.stats.cells_used == len(sequence.tokens)


async def test_a_deadline_passes_while_waiting_for_a_sequence(
    tiny_model_path: Path, gate: Gate
) -> None:
    async with llamactor.load_model(
        tiny_model_path, context_size=512, sequences=1, threads=1
    ) as model:
        holder = model.complete("once", logits_processor=gate, max_tokens=1)
        await gate.reached()
        with pytest.raises(DeadlineExceededError, match="waiting") as failure:
            await soon(model.complete("twice", deadline=0.01))
        assert failure.value.partial is not None
        assert failure.value.partial.content == ""
        gate.open()
        await soon(holder)


async def test_a_deadline_passes_while_waiting_behind_another_prediction(
    tiny_model: Model, gate: Gate
) -> None:
    async with opened(tiny_model, 512, 1) as (_, (sequence,)):
        first = sequence.predict(prompt(10), logits_processor=gate, max_tokens=1)
        await gate.reached()
        second = sequence.predict(prompt(10), deadline=0.01)
        with pytest.raises(DeadlineExceededError):
            await soon(second)
        gate.open()
        await soon(first)


async def test_a_deadline_passes_while_a_callback_stalls(tiny_model: Model, gate: Gate) -> None:
    async with opened(tiny_model, 512, 1) as (_, (sequence,)):
        gate.allow(2)
        prediction = sequence.predict(prompt(10), logits_processor=gate, deadline=0.2)
        for _ in range(3):
            await gate.reached()
        await until(lambda: prediction.stats.total_time > 0.21)
        gate.open()
        with pytest.raises(DeadlineExceededError) as failure:
            await soon(prediction)
        assert failure.value.partial is not None
        assert 2 <= len(failure.value.partial.tokens) <= 3


# --- a full context -------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", [None, "stop_at_limit"])
async def test_at_the_limit_it_stops(tiny_model: Model, overflow: Any) -> None:
    async with opened(tiny_model, 100, 1) as (context, (sequence,)):
        tokens = prompt(30)
        result = await soon(sequence.predict(tokens, overflow=overflow))
        assert result.stop_reason == "context_full"
        assert len(result.tokens) == 71, "the last one needs no cell"
        assert sequence.tokens == [*tokens, *result.tokens[:-1]]
        assert context.stats.cells_used == 100
        assert result.context_shift is None
        await plausible(tiny_model, tokens, result)


async def test_max_tokens_comes_before_the_limit(tiny_model: Model) -> None:
    async with opened(tiny_model, 100, 1) as (_, (sequence,)):
        result = await soon(sequence.predict(prompt(30), max_tokens=71))
        assert (len(result.tokens), result.stop_reason) == (71, "max_tokens")


@pytest.mark.parametrize("overflow", [None, "stop_at_limit"])
async def test_a_prompt_that_does_not_fit_fails_at_the_await(
    tiny_model: Model, overflow: Any
) -> None:
    async with opened(tiny_model, 100, 1) as (context, (sequence,)):
        await sequence.prefill(prompt(20))
        prediction = sequence.predict(prompt(101, 1), overflow=overflow)
        with pytest.raises(ContextOverflowError, match=r"101 tokens .* 100") as failure:
            await soon(prediction)
        assert isinstance(failure.value, ValueError)
        assert failure.value.partial is not None
        assert sequence.tokens == prompt(20)
        assert context.stats.evaluated_tokens == 20
        result = await soon(sequence.predict(prompt(100, 1)))
        assert (len(result.tokens), result.stop_reason) == (1, "context_full")


@pytest.mark.parametrize("overflow", ["rolling_window", "truncate_middle"])
async def test_a_prompt_that_does_not_fit_is_cut(tiny_model: Model, overflow: Any) -> None:
    async with opened(tiny_model, 100, 1) as (_, (sequence,)):
        tokens = prompt(250)
        result = await soon(sequence.predict(tokens, overflow=overflow, max_tokens=10))
        assert len(result.tokens) == 10
        held = sequence.tokens[:-9]
        assert 75 <= len(held) <= 90
        start = 1 if overflow == "rolling_window" else len(held) // 2
        assert held == [*tokens[:start], *tokens[start - len(held) :]]
        assert result.stats.prompt_tokens == len(held)
        await plausible(tiny_model, held, result)


@pytest.fixture(scope="session")
def shallow_path(models: Path) -> Path:
    """One layer: moved cells are exactly those of the tokens at their new places."""
    return tiny_llama(models / "shallow.gguf", layers=1)


@pytest.mark.parametrize("overflow", ["rolling_window", "truncate_middle"])
async def test_a_full_context_makes_room_and_goes_on(shallow_path: Path, overflow: Any) -> None:
    async with (
        llamactor.load_model(shallow_path, context_size=64, threads=1) as model,
        opened(model, 100, 1) as (context, (sequence,)),
    ):
        tokens = prompt(60)
        prediction = sequence.predict(tokens, overflow=overflow, max_tokens=300)
        events = [event async for event in prediction.events()]
        result = await prediction
        assert (len(result.tokens), result.stop_reason) == (300, "max_tokens")
        shifts = [event.dropped for event in events if isinstance(event, ContextShifted)]
        assert len(shifts) > 5
        assert result.context_shift is not None
        assert result.context_shift.dropped == result.stats.shifted_tokens == sum(shifts)
        assert context.stats.shifted_tokens == sum(shifts)
        kept = result.context_shift.kept
        assert kept == (1 if overflow == "rolling_window" else 25)
        held, whole = sequence.tokens, [*tokens, *result.tokens[:-1]]
        assert len(held) == len(whole) - sum(shifts) <= 100
        assert held == [*whole[:kept], *whole[kept - len(held) :]]
        assert context.stats.cells_used == len(held)
        assert context.stats.evaluated_tokens == len(whole), "cells were moved, not made again"
        await sequence.erase([(60, len(held))])
        await remembers(sequence, held[:60], model)


async def test_a_rolling_window_beside_others_in_few_cells(tiny_model: Model) -> None:
    async with opened(tiny_model, 200, 3) as (context, sequences):
        prompts = [prompt(40 + 20 * i, i) for i in range(3)]
        running = [
            sequence.predict(tokens, overflow="rolling_window", max_tokens=250)
            for sequence, tokens in zip(sequences, prompts, strict=True)
        ]
        for prediction, tokens in zip(running, prompts, strict=True):
            pieces = await soon(collect(prediction))
            result = await soon(prediction)
            assert len(result.tokens) == 250
            assert "".join(pieces) == result.content == tiny_model.detokenize(result.tokens)
            assert result.stats.prompt_tokens == len(tokens)
            assert result.stats.shifted_tokens > 0
        assert context.stats.cells_used <= 200


async def test_a_deterministic_prediction_fills_its_context_as_others_do(
    tiny_model: Model,
) -> None:
    async with opened(tiny_model, 100, 2) as (_, (one, other)):
        full = await soon(one.predict(prompt(30), deterministic=True))
        assert (len(full.tokens), full.stop_reason) == (71, "context_full")
        options: dict[str, Any] = {
            "deterministic": True,
            "overflow": "rolling_window",
            "max_tokens": 150,
            "logprobs": 0,
        }
        first, second = [await soon(each.predict(prompt(30), **options)) for each in (one, other)]
        assert len(first.tokens) == 150
        assert first.tokens[:71] == full.tokens
        assert bits(first) == bits(second)


async def test_after_a_deterministic_prediction_the_sequence_is_like_any_other(
    tiny_model: Model,
) -> None:
    tokens = prompt(100)
    async with opened(tiny_model, 1024, 3) as (context, (one, *rest)):
        for each in rest:
            await each.aclose()
        result = await soon(one.predict(tokens, deterministic=True, max_tokens=10))
        held = [*tokens, *result.tokens[:-1]]
        assert one.tokens == held
        assert result.stats.prompt_tokens == 100
        async with await one.fork() as fork:
            await remembers(fork, held, tiny_model)
        later = await soon(one.predict([*held, *prompt(5, 1)], max_tokens=3))
        await plausible(tiny_model, [*held, *prompt(5, 1)], later)
        await one.erase([(60, len(one.tokens))])
        await remembers(one, tokens[:60], tiny_model)
        assert context.stats.cells_used <= 1024


async def test_a_shift_leaves_a_fork_alone(tiny_model: Model) -> None:
    async with tiny_model.create_context(context_size=200, sequences=2, threads=1) as context:
        sequence = await context.sequence()
        await sequence.prefill(prompt(100))
        fork = await sequence.fork()
        result = await soon(
            sequence.predict(
                [*prompt(100), *prompt(50, 1)], overflow="rolling_window", max_tokens=100
            )
        )
        assert len(result.tokens) == 100
        assert fork.tokens == prompt(100)
        await remembers(fork, prompt(100), tiny_model)
        await fork.aclose()
        await sequence.aclose()


# --- cells that many share ------------------------------------------------------------------------


async def test_idle_prefixes_go_when_others_need_the_room(tiny_model: Model) -> None:
    async with tiny_model.create_context(context_size=300, sequences=3, threads=1) as context:
        for seed in range(3):
            spare = [await context.sequence() for _ in range(3)]
            await spare[seed].prefill(prompt(90, seed))
            for each in spare:
                await each.aclose()
        assert context.stats.cells_used == 270
        async with context.sequence() as sequence:
            await sequence.prefill(prompt(200, 9))
            assert context.stats.evictions >= 1
            assert context.stats.cells_used <= 300
            await remembers(sequence, prompt(200, 9), tiny_model)


async def test_what_nobody_holds_goes_before_what_is_held(tiny_model: Model) -> None:
    async with tiny_model.create_context(context_size=300, sequences=3, threads=1) as context:
        held = await context.sequence()
        await held.prefill(prompt(100))
        async with context.sequence() as gone:
            await gone.prefill(prompt(100, 1))
        async with context.sequence() as sequence:
            await sequence.prefill(prompt(150, 2))
        assert context.stats.evictions == 1
        evaluated = context.stats.evaluated_tokens
        await held.predict([*prompt(100), 50], max_tokens=1)
        assert context.stats.evaluated_tokens == evaluated + 1
        await held.aclose()


@pytest.mark.parametrize("work", ["score", "predict", "fork", "save", "erase", "shift", "load"])
async def test_a_held_sequence_that_lost_its_cells_goes_on_as_if_it_had_not(
    tiny_model: Model, tmp_path: Path, work: str
) -> None:
    tokens = prompt(150)
    async with opened(tiny_model, 300, 2) as (context, (one, other)):
        await one.prefill(tokens)
        await one.save(tmp_path / "state")
        await other.prefill(prompt(200, 1))
        assert context.stats.evictions == 1
        assert context.stats.cells_used == 200
        assert one.tokens == tokens
        await other.aclose()
        match work:
            case "score":
                assert distance(await one.score(PROBE), await uncached(tiny_model, tokens)) < 0.1
                assert one.tokens == [*tokens, *PROBE]
            case "predict":
                result = await soon(one.predict([*tokens, 50], max_tokens=2))
                await plausible(tiny_model, [*tokens, 50], result)
            case "fork":
                async with await one.fork() as fork:
                    await remembers(fork, tokens, tiny_model)
                await remembers(one, tokens, tiny_model)
            case "save":
                await one.save(tmp_path / "again")
                await one.clear()
                await one.load(tmp_path / "again")
                await remembers(one, tokens, tiny_model)
            case "erase":
                await one.erase([(100, 150)])
                await remembers(one, tokens[:100], tiny_model)
            case "shift":
                await one.shift(100, 50)
                await remembers(one, tokens[:100], tiny_model)
            case _:
                await one.load(tmp_path / "state")
                await remembers(one, tokens, tiny_model)


async def test_a_prediction_that_fits_no_more_beside_another_waits_and_goes_on(
    tiny_model: Model, gate: Gate
) -> None:
    """Two prompts fit, their answers do not: one gives its cells up and comes back."""
    async with opened(tiny_model, 256, 2) as (context, (one, other)):
        first = one.predict(prompt(80), max_tokens=120, max_pending=None, logits_processor=gate)
        await gate.reached()
        second = other.predict(prompt(80, 1), max_tokens=120, max_pending=None)
        gate.open()
        await unbroken(first, tiny_model, prompt(80), 120)
        await unbroken(second, tiny_model, prompt(80, 1), 120)
        assert context.stats.preemptions >= 1
        assert context.stats.cells_used <= 256


async def test_many_predictions_in_few_cells_all_come_to_their_end(tiny_model: Model) -> None:
    async with opened(tiny_model, 400, 8) as (context, sequences):
        prompts = [prompt(30 + 10 * i, i) for i in range(8)]
        running = [
            sequence.predict(tokens, max_tokens=100, max_pending=None)
            for sequence, tokens in zip(sequences, prompts, strict=True)
        ]
        for prediction, tokens in zip(running, prompts, strict=True):
            await unbroken(prediction, tiny_model, tokens, 100)
        assert context.stats.preemptions >= 1
        for sequence in sequences:
            await sequence.clear()
        assert context.stats.cells_used == 0


async def test_the_lower_priority_gives_way(tiny_model: Model, gate: Gate) -> None:
    seen: list[int] = []

    def look(tokens: list[int], logits: Any) -> None:
        seen.append(low.stats.predicted_tokens)

    async with opened(tiny_model, 256, 2) as (context, (one, other)):
        low = one.predict(prompt(80), max_tokens=150, priority=-1, logits_processor=gate)
        await gate.reached()
        high = other.predict(prompt(80, 1), max_tokens=120, priority=1, logits_processor=look)
        gate.open()
        result = await soon(high)
        assert len(result.tokens) == 120
        await unbroken(low, tiny_model, prompt(80), 150)
        assert context.stats.preemptions >= 1
    assert len(seen) == 120
    assert seen[-1] < 100, "it has gone on only when there was room again"


async def test_a_stalled_callback_holds_no_cells_that_a_higher_priority_needs(
    tiny_model: Model, gate: Gate
) -> None:
    async with opened(tiny_model, 256, 2) as (context, (one, other)):
        low = one.predict(prompt(80), max_tokens=100, priority=-1, logits_processor=gate)
        await gate.reached()
        high = other.predict(prompt(80, 1), max_tokens=150, priority=1)
        await unbroken(high, tiny_model, prompt(80, 1), 150)
        assert low.stats.predicted_tokens == 0
        assert context.stats.preemptions == 1
        gate.open()
        await unbroken(low, tiny_model, prompt(80), 100)


@pytest.mark.parametrize("end", ["cancel", "last token", "pause"])
async def test_what_a_preempted_callback_comes_to_in_the_end_is_taken(
    tiny_model: Model, gate: Gate, end: str
) -> None:
    limits: dict[str, Any] = {"max_tokens": 1 if end == "last token" else 100, "max_pending": 16}
    async with opened(tiny_model, 256, 2) as (context, (one, other)):
        low = one.predict(prompt(80), priority=-1, logits_processor=gate, **limits)
        reader = aiter(low)
        await gate.reached()
        if end == "pause":
            gate.allow(16)
            for _ in range(16):
                await gate.reached()
        high = other.predict(prompt(80, 1), max_tokens=150, priority=1)
        await unbroken(high, tiny_model, prompt(80, 1), 150)
        assert context.stats.preemptions == 1
        if end == "cancel":
            low.cancel()
        gate.open()
        text = "".join([text async for text in reader])
        result = await soon(low)
        assert result.content == text
        expected = {"cancel": "cancelled"}.get(end, "max_tokens")
        assert result.stop_reason == expected
        await plausible(tiny_model, prompt(80), result)
        held = [*prompt(80), *result.tokens]
        assert one.tokens == held[: len(one.tokens)]
        await remembers(one, one.tokens, tiny_model)


async def test_output_of_a_preempted_generation_on_its_own_thread_is_unbroken(
    tiny_model: Model, gate: Gate
) -> None:
    prompts = [prompt(80), prompt(80, 1)]
    async with opened(tiny_model, 256, 2) as (context, sequences):
        running = [
            sequence.predict(tokens, max_tokens=120, logprobs=0, logits_processor=gate)
            for sequence, tokens in zip(sequences, prompts, strict=True)
        ]
        for _ in running:
            await gate.reached()
        gate.open()
        for prediction, tokens in zip(running, prompts, strict=True):
            result = await unbroken(prediction, tiny_model, tokens, 120)
            assert result.logprobs is not None
            assert [each.token for each in result.logprobs] == result.tokens
            scores = await uncached(tiny_model, tokens, result.tokens)
            assert distance([each.logprob for each in result.logprobs], scores) < TOLERANCE
        assert context.stats.preemptions >= 1


async def test_a_preempted_prediction_can_be_cancelled(tiny_model: Model, gate: Gate) -> None:
    async with opened(tiny_model, 256, 2) as (context, (one, other)):
        holder = one.predict(prompt(200), logits_processor=gate, max_tokens=5, priority=1)
        await gate.reached()
        waits = other.predict(prompt(100, 1), max_tokens=5)
        await until(lambda: context.stats.evaluated_tokens >= 200)
        waits.cancel()
        result = await soon(waits)
        assert (result.stop_reason, result.tokens) == ("cancelled", [])
        gate.open()
        assert len((await soon(holder)).tokens) == 5


async def test_a_job_of_its_own_waits_for_room_too(tiny_model: Model, gate: Gate) -> None:
    async with opened(tiny_model, 256, 2) as (_, (one, other)):
        holder = one.predict(prompt(200), logits_processor=gate, max_tokens=2)
        await gate.reached()
        scoring = await waiting(other.score(prompt(150, 1)))
        gate.open()
        await soon(holder)
        scores = await soon(scoring)
        assert other.tokens == prompt(150, 1)
        expected = await uncached(tiny_model, prompt(50, 1), prompt(150, 1)[50:])
        assert distance(scores[50:], expected) < TOLERANCE


# --- readers that lag -----------------------------------------------------------------------------


async def lagging(sequence_or_model: Any, tokens: list[int], **options: Any) -> tuple[Any, Any]:
    """A prediction whose only reader has read something and stopped, and that reader."""
    prediction = sequence_or_model.complete(tokens, max_pending=16, **options)
    reader = aiter(prediction)  # it lags from now on
    await until(lambda: prediction.stats.predicted_tokens > 16)
    n_drawn = prediction.stats.predicted_tokens
    first = await soon(anext(reader))
    await until(lambda: prediction.stats.predicted_tokens > n_drawn + 16)
    return prediction, (first, reader)


async def test_a_paused_prediction_gives_its_sequence_to_those_who_wait(
    tiny_model_path: Path,
) -> None:
    async with llamactor.load_model(
        tiny_model_path, context_size=1024, sequences=1, threads=1
    ) as model:
        tokens = prompt(40)
        paused, (first, reader) = await lagging(model, tokens, max_tokens=200)
        for number in range(3):
            result = await soon(model.complete(prompt(100, 1 + number), max_tokens=20))
            assert len(result.tokens) == 20
        assert not paused.done
        text = first + "".join([text async for text in reader])
        result = await soon(paused)
        assert text == result.content == model.detokenize(result.tokens)
        assert len(result.tokens) == 200
        assert result.stats.prompt_tokens == 40
        await plausible(model, tokens, result)


async def test_a_parked_prediction_can_be_cancelled_dropped_and_closed(
    tiny_model_path: Path,
) -> None:
    async with llamactor.load_model(
        tiny_model_path, context_size=1024, sequences=1, threads=1
    ) as model:
        readers = []
        for _ in range(3):
            prediction, (_, reader) = await lagging(model, prompt(40))
            await soon(model.complete(prompt(10, 1), max_tokens=2))
            readers.append((prediction, reader))
        cancelled, _ = readers[0]
        cancelled.cancel()
        result = await soon(cancelled)
        assert result.stop_reason == "cancelled"
        assert len(result.tokens) > 16
        del prediction, reader
        readers[1] = (None, None)
        await soon(model.complete(prompt(10, 2), max_tokens=2))
        closed, _ = readers[2]
        await soon(model.aclose())
        with pytest.raises(llamactor.ClosedError) as failure:
            await soon(closed)
        assert failure.value.partial is not None
        assert len(failure.value.partial.tokens) > 16


async def test_a_parked_prediction_that_waits_for_a_sequence_again_can_be_cancelled(
    tiny_model_path: Path, gate: Gate
) -> None:
    async with llamactor.load_model(
        tiny_model_path, context_size=1024, sequences=1, threads=1
    ) as model:
        parked, (_, reader) = await lagging(model, prompt(40))
        working = model.complete(prompt(10, 1), max_tokens=9, logits_processor=gate)
        await soon(gate.reached())
        await soon(anext(reader))  # it has caught up, and the only sequence is at work
        parked.cancel()
        result = await soon(parked)
        assert result.stop_reason == "cancelled"
        assert not working.done
        gate.open()
        assert len((await soon(working)).tokens) == 9


async def test_many_lagging_readers_share_one_sequence(tiny_model_path: Path) -> None:
    async with llamactor.load_model(
        tiny_model_path, context_size=1024, sequences=2, threads=1
    ) as model:
        prompts = [prompt(20 + i, i) for i in range(6)]
        lagged = [await lagging(model, tokens, max_tokens=120) for tokens in prompts]
        for tokens, (prediction, (first, reader)) in zip(prompts, lagged, strict=True):
            text = first + "".join([text async for text in reader])
            result = await soon(prediction)
            assert text == result.content
            assert len(result.tokens) == 120
            await plausible(model, tokens, result)


async def test_a_paused_prediction_on_a_held_sequence_gives_up_its_cells_only(
    tiny_model: Model,
) -> None:
    """The sequence is its holder's; others get the cells, and it goes on when it is read."""
    async with opened(tiny_model, 256, 2) as (_, (one, other)):
        paused = one.predict(prompt(100), max_tokens=140, max_pending=16)
        reader = aiter(paused)
        await until(lambda: paused.stats.predicted_tokens > 16)
        result = await soon(other.predict(prompt(150, 1), max_tokens=50))
        assert len(result.tokens) == 50
        await plausible(tiny_model, prompt(150, 1), result)
        text = "".join([text async for text in reader])
        result = await soon(paused)
        assert text == result.content
        assert len(result.tokens) == 140
        await plausible(tiny_model, prompt(100), result)


# --- the same again, bit for bit ------------------------------------------------------------------


def bits(result: llamactor.PredictionResult) -> tuple[Any, ...]:
    assert result.logprobs is not None
    return (
        result.content,
        result.tokens,
        [(each.logprob, [(t.token, t.logprob) for t in each.top]) for each in result.logprobs],
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_deterministic_prediction_repeats_bit_for_bit(
    tiny_model: Model, temperature: float
) -> None:
    """Alone, after other things on the sequence, on another sequence, and beside others."""
    tokens = prompt(200)
    options: dict[str, Any] = {
        "deterministic": True,
        "max_tokens": 30,
        "logprobs": 3,
        "seed": 5,
        "temperature": temperature,
    }
    async with opened(tiny_model, 2048, 4) as (_, (one, other, *rest)):
        first = bits(await soon(one.predict(tokens, **options)))
        assert bits(await soon(one.predict(tokens, **options))) == first
        await other.prefill([*tokens, *prompt(30, 1)])
        await one.prefill(tokens[:77])
        assert bits(await soon(one.predict(tokens, **options))) == first
        beside = [each.predict(prompt(50, 2), max_pending=None) for each in rest]
        await until(lambda: all(each.stats.predicted_tokens > 1 for each in beside))
        again = await soon(other.predict(tokens, **options))
        assert bits(again) == first
        assert again.stats.cached_tokens == 0
        assert not any(each.done for each in beside)
        for each in beside:
            each.cancel()
            await soon(each)
        both = [each.predict(tokens, **options) for each in (one, other)]
        assert [bits(await soon(each)) for each in both] == [first, first]


async def test_a_deterministic_prediction_repeats_in_another_context(tiny_model: Model) -> None:
    seen: list[tuple[Any, ...]] = []
    for _ in range(2):
        async with opened(tiny_model, 512, 2) as (_, (one, other)):
            companion = other.predict(prompt(50, len(seen)), max_tokens=100)
            result = await soon(
                one.predict(prompt(90), deterministic=True, max_tokens=20, logprobs=0)
            )
            seen.append(bits(result))
            await soon(companion)
    assert seen[0] == seen[1]
