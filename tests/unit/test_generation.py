"""A generation as a whole: its limits, events, statistics, turn among others and options."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

import llamactor
from llamactor import (
    ContextOverflowError,
    ContextShifted,
    DeadlineExceededError,
    Finished,
    GenerationOptions,
    PredictionResult,
    PredictionStats,
    PromptProgress,
    TextDelta,
)
from tests.conftest import PATIENCE, TIME_SCALE, Gate
from tests.models import EOS, byte_tokens, tiny_scripted

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable
    from pathlib import Path

    from llamactor import Event, Model, Prediction, Sequence

LONG = "once upon a time there lived a king whose kingdom was so small " * 20
"""A prompt of several micro-batches of 64 tokens."""


@pytest.fixture
async def scripted(tmp_path: Path) -> AsyncIterator[Model]:
    """A model that answers "abcd" and ends."""
    path = tiny_scripted(tmp_path / "scripted.gguf", byte_tokens("abcd"), then=EOS)
    async with llamactor.load_model(path, context_size=256, sequences=2, threads=1) as model:
        yield model


@pytest.fixture
async def small(tiny_model_path: Path) -> AsyncIterator[Model]:
    """The tiny model with one sequence in 128 cells."""
    path = tiny_model_path
    async with llamactor.load_model(path, context_size=128, sequences=1, threads=1) as model:
        yield model


@pytest.fixture
async def sequence(tiny_model: Model) -> AsyncIterator[Sequence]:
    """The only sequence of a context that evaluates 64 tokens at once."""
    context = tiny_model.create_context(
        context_size=2048, sequences=1, threads=1, batch_size=64, ubatch_size=64
    )
    async with context as opened, opened.sequence() as sequence:
        yield sequence


async def soon(awaitable: Awaitable[Any]) -> Any:
    async with asyncio.timeout(PATIENCE):
        return await awaitable


async def read(prediction: Prediction) -> list[Event]:
    return [event async for event in prediction.events()]


def told(events: list[Event]) -> tuple[str, list[int]]:
    """The text and the tokens of all deltas."""
    deltas = [event for event in events if isinstance(event, TextDelta)]
    return "".join(delta.text for delta in deltas), [t for delta in deltas for t in delta.tokens]


# --- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 50])
async def test_max_tokens_is_exact(tiny_model: Model, limit: int) -> None:
    result = await tiny_model.complete("once", max_tokens=limit)
    assert len(result.tokens) == limit
    assert result.stop_reason == "max_tokens"


async def test_without_a_limit_it_goes_on_to_the_end(scripted: Model) -> None:
    result = await scripted.complete("@")
    assert (result.content, result.stop_reason) == ("abcd", "eos")
    assert result.tokens == byte_tokens("abcd")
    assert (result.stop_string, result.context_shift) == (None, None)


async def test_a_limit_reached_with_the_last_token_is_the_limit(scripted: Model) -> None:
    assert (await scripted.complete("@", max_tokens=4)).stop_reason == "max_tokens"
    assert (await scripted.complete("@", max_tokens=5)).stop_reason == "eos"


async def test_the_result_as_text_is_its_content(scripted: Model) -> None:
    assert str(await scripted.complete("@", response_prefix="so: ")) == "so: abcd"


async def test_a_cancelled_generation_keeps_what_it_has(tiny_model: Model, gate: Gate) -> None:
    prediction = tiny_model.complete("once", logits_processor=gate, logprobs=1)
    gate.allow(3)
    for _ in range(4):
        await gate.reached()
    prediction.cancel()
    gate.open()
    result = await soon(prediction)
    assert (result.stop_reason, result.stop_string) == ("cancelled", None)
    assert 3 <= len(result.tokens) <= 4
    assert len(result.logprobs) == len(result.tokens)


# --- prompts -------------------------------------------------------------------------------------


async def test_a_prompt_of_tokens_equals_its_text(tiny_model: Model) -> None:
    text = await tiny_model.complete("once upon", max_tokens=10)
    tokens = await tiny_model.complete(tiny_model.tokenize("once upon"), max_tokens=10)
    assert tokens.tokens == text.tokens
    assert tokens.stats.prompt_tokens == text.stats.prompt_tokens


async def test_the_answer_goes_on_where_the_sequence_stands(sequence: Sequence) -> None:
    whole = await sequence.predict("once", max_tokens=20)
    half = await sequence.predict("once", max_tokens=10)
    rest = await sequence.predict(sequence.tokens + half.tokens[-1:], max_tokens=10)
    assert half.tokens + rest.tokens == whole.tokens


# --- events --------------------------------------------------------------------------------------


async def test_events_come_in_order(sequence: Sequence) -> None:
    events = await read(sequence.predict(LONG, max_tokens=30))
    kinds = [type(event) for event in events]
    progress = kinds.count(PromptProgress)
    assert progress >= 1
    assert kinds[:progress] == [PromptProgress] * progress
    assert set(kinds[progress:-1]) == {TextDelta}
    assert kinds[-1] is Finished


async def test_prompt_progress_grows_to_the_whole_prompt(sequence: Sequence) -> None:
    prediction = sequence.predict(LONG, max_tokens=1)
    events = [event for event in await read(prediction) if isinstance(event, PromptProgress)]
    total = (await prediction).stats.prompt_tokens
    assert total > 3 * 64
    processed = [event.processed for event in events]
    assert processed == sorted(set(processed))
    assert processed[-1] == total
    assert {(event.cached, event.total) for event in events} == {(0, total)}


async def test_prompt_progress_counts_what_was_cached(sequence: Sequence) -> None:
    await sequence.prefill(LONG)
    prediction = sequence.predict(LONG + "and", max_tokens=1)
    first, *_ = await read(prediction)
    assert isinstance(first, PromptProgress)
    stats = (await prediction).stats
    assert 0 < first.cached == stats.cached_tokens <= first.processed <= first.total
    assert first.total == stats.prompt_tokens


async def test_deltas_join_to_the_content_and_their_tokens_to_the_tokens(
    tiny_model: Model,
) -> None:
    prediction = tiny_model.complete("once", max_tokens=100, temperature=2.0, seed=5)
    for _ in range(2):  # while it runs and replayed
        events = await read(prediction)
        result = await prediction
        assert told(events) == (result.content, result.tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"stop": "d"},
        {"stop": "cd"},
        {"stop": "abcd"},
        {"trim_trailing_whitespace": True, "response_prefix": "so: "},
        {"stop": "dx"},
    ],
    ids=str,
)
async def test_tokens_without_visible_text_are_in_the_deltas_too(
    scripted: Model, gate: Gate, options: dict[str, Any]
) -> None:
    prediction = scripted.complete("@", logits_processor=gate, **options)
    events: list[Event] = []
    reading = asyncio.create_task(into(events, prediction.events()))
    for _ in range(4):
        await gate.reached()
        gate.allow()
    gate.open()
    await soon(reading)
    result = await prediction
    assert told(events) == (result.content, result.tokens)
    assert told(await read(prediction)) == (result.content, result.tokens)


async def test_a_delta_comes_before_the_next_token(scripted: Model, gate: Gate) -> None:
    prediction = scripted.complete("@", logits_processor=gate)
    events = prediction.events()
    gate.allow()
    await gate.reached()
    await gate.reached()
    seen: list[Event] = []
    while not seen or not isinstance(seen[-1], TextDelta):
        seen.append(await soon(anext(events)))
    assert seen[-1] == TextDelta("a", byte_tokens("a"))
    assert not prediction.done
    gate.open()
    assert told([*seen, *[event async for event in events]])[0] == "abcd"


async def test_finished_carries_the_result(scripted: Model) -> None:
    prediction = scripted.complete("@")
    *_, last = await read(prediction)
    assert isinstance(last, Finished)
    assert last.result is await prediction


async def test_a_cancelled_prediction_also_finishes(tiny_model: Model, gate: Gate) -> None:
    prediction = tiny_model.complete("once", logits_processor=gate)
    await gate.reached()
    prediction.cancel()
    gate.open()
    *_, last = await soon(read(prediction))
    assert isinstance(last, Finished)
    assert last.result.stop_reason == "cancelled"


async def test_events_match_by_type(scripted: Model) -> None:
    words: list[str] = []
    async for event in scripted.complete("@").events():
        match event:
            case PromptProgress(processed=done, total=total):
                words.append(f"{done}/{total}")
            case TextDelta(text=text, segment=None):
                words.append(text)
            case Finished(result=result):
                words.append(str(result.stop_reason))
    assert words[-1] == "eos"
    assert "1/1" in words
    assert "abcd" in "".join(words)


async def test_events_are_tagged_structs(scripted: Model) -> None:
    for event in await read(scripted.complete("@")):
        encoded = msgspec.json.decode(msgspec.json.encode(event))
        assert encoded["type"] == type(event).__name__


# --- statistics ----------------------------------------------------------------------------------


def check_stats(stats: PredictionStats) -> None:
    assert stats.total_tokens == stats.prompt_tokens + stats.predicted_tokens
    assert 0 <= stats.cached_tokens <= stats.prompt_tokens
    numbers = msgspec.structs.asdict(stats)
    assert numbers.pop("prefix_source") in {None, "cells"}
    assert min(numbers.values()) >= 0
    whole = stats.queue_time + stats.prefill_time
    assert stats.time_to_first_token == pytest.approx(whole, abs=1e-6)
    whole += stats.decode_time
    assert stats.total_time == pytest.approx(whole, abs=1e-6)
    if stats.decode_time > 0:
        rate = (stats.predicted_tokens - 1) / stats.decode_time
        assert stats.tokens_per_second == pytest.approx(rate, rel=1e-6)
    rate = (stats.prompt_tokens - stats.cached_tokens) / stats.prefill_time
    assert stats.prompt_tokens_per_second == pytest.approx(rate, rel=1e-6)


async def test_the_statistics_add_up(sequence: Sequence) -> None:
    result = await sequence.predict(LONG, max_tokens=50)
    stats = result.stats
    check_stats(stats)
    assert stats.predicted_tokens == len(result.tokens) == 50
    assert (stats.cached_tokens, stats.shifted_tokens) == (0, 0)
    assert (stats.draft_tokens, stats.accepted_draft_tokens) == (0, 0)
    assert stats.prefill_time > 0
    assert stats.decode_time > 0


async def test_the_prompt_is_what_was_cached_and_what_was_evaluated(sequence: Sequence) -> None:
    evaluated = await sequence.prefill("once upon a time")
    before = sequence.usage
    result = await sequence.predict("once upon a time there", max_tokens=5)
    stats, after = result.stats, sequence.usage
    check_stats(stats)
    assert 0 < stats.cached_tokens <= evaluated
    assert after.prompt_tokens - before.prompt_tokens == stats.prompt_tokens - stats.cached_tokens
    assert after.cached_tokens - before.cached_tokens == stats.cached_tokens
    assert after.predicted_tokens - before.predicted_tokens == 5


async def test_a_single_token_has_no_rate(sequence: Sequence) -> None:
    stats = (await sequence.predict("once", max_tokens=1)).stats
    assert (stats.predicted_tokens, stats.tokens_per_second) == (1, 0.0)
    check_stats(stats)


async def test_the_statistics_live_while_it_runs(sequence: Sequence, gate: Gate) -> None:
    prompt = byte_tokens("once upon")
    prediction = sequence.predict(prompt, logits_processor=gate, max_tokens=3)
    waiting = sequence.predict("twice", max_tokens=1)
    await gate.reached()
    at_first = prediction.stats
    assert (at_first.prompt_tokens, at_first.predicted_tokens) == (len(prompt), 0)
    assert at_first.time_to_first_token == 0
    gate.allow()
    await gate.reached()
    assert prediction.stats.predicted_tokens == 1
    assert prediction.stats.time_to_first_token > 0
    assert waiting.stats.prompt_tokens == 0
    gate.open()
    first, second = await soon(asyncio.gather(prediction.result(), waiting.result()))
    assert prediction.stats == first.stats
    assert prediction.stats.total_time >= at_first.total_time
    # The second waited at least as long as the first took from its first token on.
    assert second.stats.queue_time >= first.stats.decode_time
    check_stats(second.stats)


# --- others --------------------------------------------------------------------------------------


async def test_a_blocked_processor_stalls_only_its_own_sequence(tiny_model: Model) -> None:
    reached, release = threading.Event(), threading.Event()

    def block(tokens: list[int], logits: Any) -> None:
        reached.set()
        assert release.wait(PATIENCE)

    async with (
        tiny_model.create_context(context_size=512, sequences=2, threads=1) as context,
        context.sequence() as one,
        context.sequence() as other,
    ):
        stalled = one.predict("once", logits_processor=block, max_tokens=5)
        assert await asyncio.to_thread(reached.wait, PATIENCE)
        result = await soon(other.predict("twice", max_tokens=50))
        assert len(result.tokens) == 50
        assert stalled.stats.predicted_tokens == 0
        release.set()
        assert len((await soon(stalled)).tokens) == 5


async def test_a_blocked_filter_stalls_only_its_own_sequence(tiny_model: Model) -> None:
    reached, release = threading.Event(), threading.Event()

    def block(tokens: list[int]) -> list[int]:
        reached.set()
        assert release.wait(PATIENCE)
        return tokens

    penalty = llamactor.RepeatPenalty(1.1, punish_tokens_filter=block)
    stalled = tiny_model.complete("once", repeat_penalty=penalty, max_tokens=5)
    assert await asyncio.to_thread(reached.wait, PATIENCE)
    assert len((await soon(tiny_model.complete("twice", max_tokens=50))).tokens) == 50
    release.set()
    assert len((await soon(stalled)).tokens) == 5


async def test_the_higher_priority_has_the_next_turn(small: Model, gate: Gate) -> None:
    first = small.complete("once", logits_processor=gate, max_tokens=1)
    await gate.reached()
    turns: list[int] = []

    def start(priority: int) -> Prediction:
        def note(tokens: list[int], logits: Any) -> None:
            turns.append(priority)

        return small.complete("twice", priority=priority, logits_processor=note, max_tokens=2)

    rest = [start(priority) for priority in (0, -5, 7, 3)]
    gate.open()
    await soon(asyncio.gather(first.result(), *(each.result() for each in rest)))
    assert turns == [7, 7, 3, 3, 0, 0, -5, -5]


async def test_deterministic_generations_are_evaluated_alone(tiny_model: Model) -> None:
    async with (
        tiny_model.create_context(context_size=1024, sequences=3, threads=1) as context,
        context.sequence() as one,
        context.sequence() as two,
        context.sequence() as three,
    ):
        options: dict[str, Any] = {"deterministic": True, "max_tokens": 50}
        together = [each.predict("once", **options) for each in (one, two, three)]
        results = await asyncio.gather(*(prediction.result() for prediction in together))
        # The prompt, then 49 tokens: the last one is not evaluated.
        assert context.stats.batches == 3 * 50
    assert {result.stats.cached_tokens for result in results} == {0}
    assert len({tuple(result.tokens) for result in results}) == 1


async def test_a_deadline_fails_it_and_keeps_the_partial(tiny_model: Model) -> None:
    prediction = tiny_model.complete(
        "once", deadline=0.3 * TIME_SCALE, ignore_eos=True, overflow="rolling_window"
    )
    pieces: list[str] = []
    with pytest.raises(DeadlineExceededError) as failure:
        await soon(into(pieces, prediction))
    partial = failure.value.partial
    assert partial is not None
    assert partial.content == prediction.text == "".join(pieces) != ""
    assert len(partial.tokens) == prediction.stats.predicted_tokens
    assert partial.stop_reason is None
    with pytest.raises(DeadlineExceededError):
        await prediction


async def into(items: list[Any], source: AsyncIterable[Any]) -> None:
    """Gather what comes, so that it is there even if the source fails."""
    async for item in source:
        items.append(item)  # noqa: PERF401


async def test_a_deadline_counts_while_waiting_for_a_sequence(small: Model, gate: Gate) -> None:
    first = small.complete("once", logits_processor=gate, max_tokens=1)
    await gate.reached()
    second = small.complete("twice", deadline=0.05)
    with pytest.raises(DeadlineExceededError):
        await soon(second)
    assert second.stats.predicted_tokens == 0
    gate.open()
    assert (await soon(first)).stop_reason == "max_tokens"


async def test_a_deadline_far_away_does_nothing(scripted: Model) -> None:
    assert (await scripted.complete("@", deadline=1e6)).content == "abcd"


@pytest.mark.parametrize("max_pending", [1, 50, None])
async def test_max_pending_bounds_what_nobody_reads(
    small: Model, gate: Gate, max_pending: int | None
) -> None:
    first = small.complete("first", logits_processor=gate, max_tokens=1)
    lazy = small.complete("once", max_pending=max_pending, max_tokens=100)
    reader = aiter(lazy)  # before its first token, since it waits for the only sequence
    gate.open()
    await soon(first)
    # One that waits has the sequence as soon as the other pauses, or ends.
    await soon(small.complete("twice", max_tokens=1))
    ahead = 100 if max_pending is None else max_pending + 1
    assert lazy.stats.predicted_tokens == ahead
    assert lazy.done is (max_pending is None)
    pieces = [piece async for piece in reader]
    assert "".join(pieces) == (await lazy).content
    assert lazy.stats.predicted_tokens == 100


# --- a full context ------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", [None, "stop_at_limit"])
async def test_a_full_context_ends_the_answer(small: Model, overflow: Any) -> None:
    result = await small.complete("once", overflow=overflow)
    assert result.stop_reason == "context_full"
    assert 120 <= result.stats.total_tokens <= 129
    assert result.context_shift is None


@pytest.mark.parametrize("overflow", ["rolling_window", "truncate_middle"])
async def test_a_window_goes_on_past_the_limit(small: Model, overflow: Any) -> None:
    prediction = small.complete("once", overflow=overflow, max_tokens=400)
    events = await read(prediction)
    result = await prediction
    assert (len(result.tokens), result.stop_reason) == (400, "max_tokens")
    assert told(events) == (result.content, result.tokens)
    assert result.context_shift is not None
    shifts = [event.dropped for event in events if isinstance(event, ContextShifted)]
    assert sum(shifts) == result.context_shift.dropped == result.stats.shifted_tokens
    assert result.stats.shifted_tokens >= 400 - 128


async def test_a_prompt_too_long_is_refused_unless_it_may_be_cut(small: Model) -> None:
    prompt = byte_tokens("x" * 200)
    for overflow in (None, "stop_at_limit"):
        options: dict[str, Any] = {"overflow": overflow}
        prediction = small.complete(prompt, **options)
        with pytest.raises(ContextOverflowError, match="200"):
            await prediction
    for overflow in ("rolling_window", "truncate_middle"):
        options = {"overflow": overflow, "max_tokens": 5}
        result = await small.complete(prompt, **options)
        assert len(result.tokens) == 5
        assert result.context_shift is not None
        assert result.context_shift.dropped == 200 - result.stats.prompt_tokens
        assert result.stats.shifted_tokens == result.context_shift.dropped


async def test_a_cut_keeps_the_ends_or_the_tail(tiny_model: Model) -> None:
    # A quarter of the context is kept free for the answer.
    prompt = byte_tokens("a" + "b" * 100 + "c" * 100)
    async with tiny_model.create_context(context_size=128, sequences=1, threads=1) as context:
        kept: dict[str, list[int]] = {}
        for overflow in ("rolling_window", "truncate_middle"):
            async with context.sequence() as sequence:
                options: dict[str, Any] = {"overflow": overflow, "max_tokens": 30}
                result = await sequence.predict(prompt, **options)
                kept[overflow] = sequence.tokens[: result.stats.prompt_tokens]
    b, c = byte_tokens("bc")
    assert kept["rolling_window"][-90:] == [c] * 90
    assert b not in kept["rolling_window"][1:]
    assert kept["truncate_middle"].count(b) > 20
    assert kept["truncate_middle"].count(c) > 20


# --- options and results as values ---------------------------------------------------------------


async def test_options_come_as_one_value_and_keywords_win(scripted: Model) -> None:
    options = GenerationOptions(max_tokens=3, response_prefix="so: ", stop="c")
    result = await scripted.complete("@", options=options)
    assert (result.content, result.stop_reason) == ("so: ab", "stop_string")
    result = await scripted.complete("@", options=options, max_tokens=1)
    assert (result.content, result.stop_reason) == ("so: a", "max_tokens")
    result = await scripted.complete("@", options=options, stop=None, max_tokens=None)
    assert (result.content, result.stop_reason) == ("so: abcd", "eos")


async def test_models_and_sequences_take_the_same_options(tiny_model: Model) -> None:
    options = GenerationOptions(max_tokens=3, temperature=2.0, seed=4)
    async with tiny_model.create_context(context_size=256, sequences=2, threads=1) as context:
        results = [
            await tiny_model.complete("once", options=options),
        ]
        async with context.sequence() as sequence:
            results.append(await sequence.predict("once", options=options))
    assert len({tuple(result.tokens) for result in results}) == 1
    assert {result.seed for result in results} == {4}


async def test_results_are_frozen(scripted: Model) -> None:
    prediction = scripted.complete("@", logprobs=1)
    result = await prediction
    assert isinstance(result, PredictionResult)
    assert result.logprobs is not None
    values: list[msgspec.Struct] = [result, result.stats, result.logprobs[0]]
    values += await read(prediction)
    values.append(GenerationOptions())
    for value in values:
        name = value.__struct_fields__[0]
        with pytest.raises(AttributeError):
            setattr(value, name, None)
