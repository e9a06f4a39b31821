"""Contexts: their size, waiting for a sequence, giving it back, closing, counters."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

import llamactor
from llamactor import ClosedError, Context, Model, Sequence, UnsupportedError
from tests.conftest import PATIENCE, Gate
from tests.contexts import prompt, soon, until, waiting
from tests.models import tiny_encoder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def context(tiny_model: Model) -> AsyncIterator[Context]:
    """A context of 1,024 cells with two sequences."""
    async with tiny_model.create_context(context_size=1024, sequences=2, threads=1) as context:
        yield context


@pytest.fixture
async def narrow(tiny_model: Model) -> AsyncIterator[Context]:
    """A context with one sequence."""
    async with tiny_model.create_context(context_size=1024, sequences=1, threads=1) as context:
        yield context


# --- size and kinds -------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "sequences"), [(1, 1), (7, 3), (1000, 2), (4096, 256)])
async def test_a_context_has_the_size_that_was_asked_for(
    tiny_model: Model, size: int, sequences: int
) -> None:
    async with tiny_model.create_context(
        context_size=size, sequences=sequences, threads=1
    ) as context:
        assert (context.context_size, context.sequences) == (size, sequences)
        assert context.stats.cells_total == size
        assert context.stats.sequences_total == sequences


async def test_a_split_cache_divides_the_cells_among_the_sequences(tiny_model: Model) -> None:
    async with tiny_model.create_context(
        context_size=1024, sequences=4, kv_unified=False, threads=1
    ) as context:
        assert context.context_size == 256
        assert context.stats.cells_total == 1024


async def test_a_context_can_be_awaited_or_entered(tiny_model: Model) -> None:
    context = await tiny_model.create_context(context_size=64, sequences=1)
    assert not context.closed
    await context.aclose()
    async with tiny_model.create_context(context_size=64, sequences=1) as context:
        assert not context.closed
    assert context.closed


async def test_an_encoder_only_model_refuses_to_generate(tmp_path: Path) -> None:
    async with llamactor.load_model(tiny_encoder(tmp_path / "bert.gguf")) as model:
        with pytest.raises(UnsupportedError, match="cannot generate"):
            _ = model.complete("once")
        with pytest.raises(UnsupportedError, match="encoder"):
            await model.create_context(context_size=64)
        assert model.tokenize("once")


async def test_a_vocabulary_alone_refuses_to_generate(tiny_model_path: Path) -> None:
    async with llamactor.load_model(tiny_model_path, vocab_only=True) as model:
        with pytest.raises(UnsupportedError, match="vocab_only"):
            _ = model.complete("once")
        with pytest.raises(UnsupportedError, match="vocab_only"):
            await model.create_context(context_size=64)


# --- waiting for a sequence -----------------------------------------------------------------------


async def test_callers_are_served_in_the_order_they_came(narrow: Context) -> None:
    served: list[int] = []

    async def use(number: int) -> None:
        async with narrow.sequence():
            served.append(number)

    holder = await narrow.sequence()
    tasks = [await waiting(use(number)) for number in range(20)]
    assert narrow.stats.sequences_waiting == 20
    assert served == []
    await holder.aclose()
    await soon(asyncio.gather(*tasks))
    assert served == list(range(20))
    assert narrow.stats.sequences_waiting == 0


async def test_waiting_ends_with_a_timeout_error(narrow: Context) -> None:
    async with narrow.sequence():
        with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
            await narrow.sequence(timeout=0.01)
        with pytest.raises(TimeoutError, match="1 sequences"):
            async with narrow.sequence(timeout=0):
                pass
        assert narrow.stats.sequences_waiting == 0
    async with narrow.sequence(timeout=PATIENCE):
        pass


async def test_a_cancelled_caller_leaves_the_queue_to_the_others(narrow: Context) -> None:
    holder = await narrow.sequence()
    first = await waiting(narrow._acquire(None))
    second = await waiting(narrow._acquire(None))
    assert narrow.stats.sequences_waiting == 2
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert narrow.stats.sequences_waiting == 1
    await holder.aclose()
    await (await soon(second)).aclose()


async def test_a_sequence_granted_to_a_cancelled_caller_goes_back(narrow: Context) -> None:
    for _ in range(20):
        holder = await narrow.sequence()
        caller = await waiting(narrow._acquire(None))
        await holder.aclose()
        caller.cancel()
        outcome = (await asyncio.gather(caller, return_exceptions=True))[0]
        if isinstance(outcome, Sequence):  # it was quicker than the cancel
            await outcome.aclose()
        async with narrow.sequence(timeout=PATIENCE):
            pass
    await until(lambda: narrow.stats.sequences_active == 0)


async def test_try_sequence_never_waits(context: Context) -> None:
    first, second = context.try_sequence(), context.try_sequence()
    assert first is not None
    assert second is not None
    assert first.id != second.id
    assert context.stats.sequences_active == 2
    assert context.try_sequence() is None
    await first.aclose()
    await second.aclose()


async def test_a_closed_sequence_is_free_at_once(narrow: Context) -> None:
    for _ in range(100):
        sequence = narrow.try_sequence()
        assert sequence is not None
        await sequence.aclose()
        assert narrow.stats.sequences_active == 0


async def test_a_sequence_is_free_when_its_prediction_was_awaited(narrow: Context) -> None:
    for _ in range(50):
        async with narrow.sequence(timeout=0) as sequence:
            await soon(sequence.predict("once", max_tokens=2))


async def test_aclose_is_idempotent(narrow: Context) -> None:
    sequence = await narrow.sequence()
    for _ in range(3):
        await sequence.aclose()
    assert sequence.closed
    first, second = narrow.try_sequence(), narrow.try_sequence()
    assert first is not None
    assert second is None, "it was given back once, not three times"
    await first.aclose()


async def test_more_predictions_than_sequences_all_finish(tiny_model_path: Path) -> None:
    async with llamactor.load_model(
        tiny_model_path, context_size=1024, sequences=3, threads=1
    ) as model:
        predictions = [model.complete(prompt(20, i), max_tokens=10 + i) for i in range(40)]
        results = await soon(asyncio.gather(*(each.result() for each in predictions)))
    assert [len(result.tokens) for result in results] == [10 + i for i in range(40)]
    assert all(result.stats.prompt_tokens == 20 for result in results)


async def test_predictions_without_a_sequence_of_their_own_share_the_queue(
    tiny_model_path: Path, gate: Gate
) -> None:
    async with llamactor.load_model(
        tiny_model_path, context_size=1024, sequences=1, threads=1
    ) as model:
        order: list[int] = []

        async def run(number: int) -> None:
            await model.complete("once", max_tokens=1)
            order.append(number)

        first = model.complete("once", logits_processor=gate, max_tokens=2)
        await gate.reached()
        tasks = [await waiting(run(number)) for number in range(10)]
        gate.open()
        await soon(first)
        await soon(asyncio.gather(*tasks))
        assert order == list(range(10))


# --- the loop it belongs to, and being forgotten --------------------------------------------------


async def test_a_context_serves_any_loop_but_a_sequence_only_its_own(context: Context) -> None:
    async def elsewhere(sequence: Sequence) -> int:
        with pytest.raises(RuntimeError, match="bound to the event loop"):
            await sequence.prefill("once")
        with pytest.raises(RuntimeError, match="bound to the event loop"):
            _ = sequence.predict("once")
        async with context.sequence() as own:
            return await own.prefill("once upon")

    async with context.sequence() as sequence:
        assert await asyncio.to_thread(lambda: asyncio.run(elsewhere(sequence))) > 0


async def test_a_forgotten_sequence_warns_and_goes_back(narrow: Context) -> None:
    sequence = await narrow.sequence()
    await sequence.prefill(prompt(10))
    with pytest.warns(ResourceWarning, match="unclosed <Sequence 0 open>"):
        del sequence
    async with narrow.sequence(timeout=PATIENCE):
        pass


async def test_a_forgotten_context_warns(tiny_model: Model) -> None:
    context = await tiny_model.create_context(context_size=64, sequences=1)
    assert not context.closed
    with pytest.warns(ResourceWarning, match="unclosed <Context of 64 tokens"):
        del context


# --- closing --------------------------------------------------------------------------------------


async def refuses_everything(sequence: Sequence, tmp_path: Path) -> None:
    """Pass if nothing can be asked of a closed sequence any more."""
    for work in (
        sequence.prefill("once"),
        sequence.score([20]),
        sequence.clear(),
        sequence.fork(),
        sequence.fork(timeout=None),
        sequence.erase([]),
        sequence.shift(0, 0),
        sequence.save(tmp_path / "state"),
    ):
        with pytest.raises(ClosedError):
            await soon(work)
    with pytest.raises(ClosedError):
        await soon(sequence.predict("once", max_tokens=1))
    assert not (tmp_path / "state").exists()


async def test_a_closed_sequence_refuses_everything(narrow: Context, tmp_path: Path) -> None:
    sequence = await narrow.sequence()
    await sequence.aclose()
    await refuses_everything(sequence, tmp_path)


async def test_a_closed_context_refuses_everything(tiny_model: Model, tmp_path: Path) -> None:
    context = await tiny_model.create_context(context_size=64, sequences=2)
    sequence = await context.sequence()
    await context.aclose()
    await context.aclose()
    assert context.closed
    assert sequence.closed
    with pytest.raises(ClosedError):
        await context.sequence()
    with pytest.raises(ClosedError):
        await context.sequence(timeout=0)
    with pytest.raises(ClosedError):
        context.try_sequence()
    await refuses_everything(sequence, tmp_path)
    await sequence.aclose()


async def test_closing_a_context_fails_those_who_wait(tiny_model: Model, gate: Gate) -> None:
    context = await tiny_model.create_context(context_size=256, sequences=1, threads=1)
    sequence = await context.sequence()
    running = sequence.predict("once", logits_processor=gate)
    behind = sequence.predict("twice")
    await gate.reached()
    caller = await waiting(context._acquire(None))
    fork = await waiting(sequence.fork(timeout=None))
    closing = await waiting(context.aclose())
    gate.open()
    await soon(closing)
    for work in (running, behind, caller, fork):
        with pytest.raises(ClosedError):
            await soon(work)
    await sequence.aclose()


async def test_closing_the_model_closes_its_contexts(tiny_model_path: Path) -> None:
    model = await llamactor.load_model(tiny_model_path, context_size=256, threads=1)
    context = await model.create_context(context_size=256, sequences=1, threads=1)
    sequence = await context.sequence()
    prediction = sequence.predict("once")
    await until(lambda: prediction.stats.predicted_tokens > 3)
    await soon(model.aclose())
    assert context.closed
    assert sequence.closed
    with pytest.raises(ClosedError) as failure:
        await prediction
    assert failure.value.partial is not None
    assert len(failure.value.partial.tokens) > 3
    await sequence.aclose()
    await context.aclose()


# --- counters -------------------------------------------------------------------------------------


async def test_a_new_context_has_counted_nothing(context: Context) -> None:
    stats = context.stats
    assert stats.cells_free == stats.cells_total == 1024
    assert stats.cells_used == stats.batches == stats.evaluated_tokens == 0
    assert stats.occupancy == 0


async def test_counters_say_what_was_evaluated(context: Context) -> None:
    async with context.sequence() as sequence:
        await soon(sequence.predict(prompt(100), max_tokens=11))
        stats = context.stats
        assert (stats.prompt_tokens, stats.decoded_tokens) == (100, 10)
        assert stats.evaluated_tokens == 110
        assert stats.cells_used == 110
        assert stats.cells_free == 1024 - 110
        assert stats.occupancy == pytest.approx(110 / 1024)
        assert stats.micro_batches >= stats.batches >= 11
        assert stats.decode_time > 0
        assert stats.cached_tokens == stats.copied_tokens == stats.shifted_tokens == 0
        await soon(sequence.predict([*sequence.tokens, *prompt(5)], max_tokens=1))
        stats = context.stats
        assert (stats.prompt_tokens, stats.cached_tokens) == (105, 110)
        assert stats.cells_used == 115


async def test_what_was_awaited_has_been_counted(narrow: Context) -> None:
    async with narrow.sequence() as sequence:
        for round_ in range(100):
            await sequence.clear()
            assert narrow.stats.cells_used == 0
            await sequence.prefill(prompt(50, round_))
            assert narrow.stats.cells_used == len(sequence.tokens) == 50
            await sequence.predict(prompt(60, round_), max_tokens=2)
            assert narrow.stats.cells_used == len(sequence.tokens) == 61


async def test_cells_stay_with_a_sequence_given_back_until_they_are_needed(
    context: Context,
) -> None:
    tokens = prompt(200)
    async with context.sequence() as sequence:
        await sequence.prefill(tokens)
    assert context.stats.cells_used == 200
    async with context.sequence() as sequence:
        assert await sequence.prefill(tokens) == 0
        assert context.stats.cells_used == 200
