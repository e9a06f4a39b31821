"""Predictions, bullet by bullet: starting, interest, replay, back-pressure, outcomes."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import pytest

import llamactor
from llamactor import Prediction, Sequence
from tests.conftest import PATIENCE, Gate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

pytestmark = pytest.mark.every_loop

T = TypeVar("T")

FEW = 200
"""More tokens than a cancelled generation may still make, fewer than an endless one makes."""


@pytest.fixture
async def sequence(tiny_model: llamactor.Model) -> AsyncIterator[Sequence]:
    """The only sequence of a context: a second prediction on it waits for the first."""
    async with (
        tiny_model.create_context(context_size=2048, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        yield sequence


async def soon(awaitable: Awaitable[T]) -> T:
    """Wait, but not for ever."""
    async with asyncio.timeout(PATIENCE):
        return await awaitable


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition` holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 -- nothing announces it
            await asyncio.sleep(0.001)


async def ended(prediction: Prediction) -> None:
    """Wait for the end without being interest."""
    await until(lambda: prediction.done)


async def elsewhere(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `work` on another loop in another thread."""
    return await asyncio.to_thread(lambda: asyncio.run(work()))


async def started(sequence: Sequence, gate: Gate, **options: Any) -> Prediction:
    """A generation that has made one token and stands before the second."""
    prediction = sequence.predict("once", logits_processor=gate, **options)
    await gate.reached()
    gate.allow()
    await gate.reached()
    return prediction


async def stops(sequence: Sequence, gate: Gate) -> None:
    """Pass if the generation behind `gate` ends early, so that the next one has its turn."""
    gate.open()
    await soon(sequence.predict("next", max_tokens=1))
    assert gate.arrived < FEW


async def collect(prediction: Prediction) -> list[str]:
    return [text async for text in prediction]


# --- starting, and the loop it belongs to ---------------------------------------------------------


async def test_a_prediction_starts_when_created(sequence: Sequence, gate: Gate) -> None:
    prediction = sequence.predict("once", logits_processor=gate, max_tokens=1)
    await gate.reached()
    gate.open()
    assert (await soon(prediction)).stop_reason == "max_tokens"


async def test_creating_a_prediction_without_a_running_loop_is_refused(
    tiny_model: llamactor.Model,
) -> None:
    with pytest.raises(RuntimeError, match="running asyncio event loop"):
        _ = await asyncio.to_thread(tiny_model.complete, "once")


async def test_another_loop_may_neither_await_nor_iterate_nor_enter(sequence: Sequence) -> None:
    prediction = sequence.predict("once", max_tokens=1)
    await soon(prediction)

    async def await_it() -> None:
        await prediction

    async def iterate_it() -> None:
        async for _ in prediction:
            pass

    async def enter_it() -> None:
        async with prediction:
            pass

    for use in (await_it, iterate_it, enter_it):
        with pytest.raises(RuntimeError, match="bound to the event loop"):
            await elsewhere(use)


async def test_an_iterator_of_another_loop_is_refused(sequence: Sequence) -> None:
    iterator = aiter(sequence.predict("once", max_tokens=1))

    async def read() -> None:
        await anext(iterator)

    with pytest.raises(RuntimeError, match="bound to the event loop"):
        await elsewhere(read)


async def test_cancel_stats_and_text_work_from_any_thread(sequence: Sequence, gate: Gate) -> None:
    prediction = await started(sequence, gate)
    stats = await asyncio.to_thread(lambda: prediction.stats)
    assert stats.predicted_tokens >= 1
    assert await asyncio.to_thread(lambda: prediction.text) == prediction.text
    await asyncio.to_thread(prediction.cancel)
    gate.open()
    assert (await soon(prediction)).stop_reason == "cancelled"


async def test_several_loops_in_several_threads_predict_at_once(
    tiny_model: llamactor.Model,
) -> None:
    together = threading.Barrier(3)

    async def work() -> list[str]:
        await asyncio.to_thread(together.wait, PATIENCE)
        predictions = [tiny_model.complete(f"once {i}", max_tokens=40) for i in range(3)]
        pieces = await asyncio.gather(*map(collect, predictions))
        contents = [(await prediction).content for prediction in predictions]
        assert contents == ["".join(texts) for texts in pieces]
        return contents

    results = await soon(asyncio.gather(*(elsewhere(work) for _ in range(3))))
    assert all(len(contents) == 3 and all(contents) for contents in results)


# --- iterating and awaiting -----------------------------------------------------------------------


async def test_pieces_join_to_the_content(sequence: Sequence) -> None:
    prediction = sequence.predict("once", max_tokens=50)
    texts = await soon(collect(prediction))
    result = await prediction
    assert "".join(texts) == result.content == str(result) == prediction.text
    assert len(result.tokens) == result.stats.predicted_tokens == 50
    assert result.stop_reason == "max_tokens"


async def test_the_first_piece_comes_before_the_last_token(sequence: Sequence, gate: Gate) -> None:
    prediction = sequence.predict("once", logits_processor=gate, max_tokens=30)
    iterator = aiter(prediction)
    gate.allow(20)
    assert await soon(anext(iterator))
    assert not prediction.done
    gate.open()
    assert (await soon(prediction)).stop_reason == "max_tokens"


async def test_awaiting_a_finished_prediction_gives_the_same_result_without_suspending(
    sequence: Sequence,
) -> None:
    prediction = sequence.predict("once", max_tokens=3)
    first = await soon(prediction)
    waiting = prediction.result()
    with pytest.raises(StopIteration) as stop:
        waiting.send(None)
    assert stop.value.value is first
    assert await prediction is first


async def test_any_number_of_waiters_get_the_same_result(sequence: Sequence) -> None:
    prediction = sequence.predict("once", max_tokens=20)
    results = await soon(asyncio.gather(*(prediction.result() for _ in range(5))))
    assert all(result is results[0] for result in results)


async def test_result_is_a_coroutine_for_tasks_and_groups(sequence: Sequence) -> None:
    prediction = sequence.predict("once", max_tokens=5)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(prediction.result())
        done, _ = await asyncio.wait([group.create_task(prediction.result())])
    assert task.result() is done.pop().result()


async def test_events_end_with_the_result(sequence: Sequence) -> None:
    prediction = sequence.predict("once", max_tokens=20)
    events = [event async for event in prediction.events()]
    deltas = [event for event in events if isinstance(event, llamactor.TextDelta)]
    result = await prediction
    assert events[-1] == llamactor.Finished(result)
    assert "".join(delta.text for delta in deltas) == result.content
    assert [token for delta in deltas for token in delta.tokens] == result.tokens


async def test_a_second_task_on_one_iterator_gets_an_error_not_a_turn(
    sequence: Sequence, gate: Gate
) -> None:
    prediction = await started(sequence, gate)
    iterator = aiter(prediction)
    await until(lambda: bool(prediction.text))
    await anext(iterator)
    waiting = asyncio.ensure_future(anext(iterator))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="another task"):
        await anext(iterator)
    waiting.cancel()


# --- interest -------------------------------------------------------------------------------------


async def test_cancelling_the_only_waiter_cancels(sequence: Sequence, gate: Gate) -> None:
    prediction = await started(sequence, gate)
    waiter = asyncio.create_task(prediction.result())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    gate.open()
    result = await soon(prediction)
    assert result.stop_reason == "cancelled"
    assert result.content == prediction.text


async def test_cancelling_one_of_two_waiters_leaves_it_running(
    sequence: Sequence, gate: Gate
) -> None:
    prediction = await started(sequence, gate, max_tokens=10)
    leaving = asyncio.create_task(prediction.result())
    staying = asyncio.create_task(prediction.result())
    await asyncio.sleep(0)
    leaving.cancel()
    gate.open()
    assert (await soon(staying)).stop_reason == "max_tokens"


async def test_a_timeout_keeps_the_partial_answer(sequence: Sequence, gate: Gate) -> None:
    prediction = await started(sequence, gate)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await prediction
    gate.open()
    result = await soon(prediction)
    assert result.stop_reason == "cancelled"
    assert result.stats.predicted_tokens >= 1


async def test_an_anyio_scope_cancels_too(sequence: Sequence, gate: Gate) -> None:
    prediction = await started(sequence, gate)
    with anyio.move_on_after(0.01) as scope:
        await prediction
    assert scope.cancelled_caught
    gate.open()
    assert (await soon(prediction)).stop_reason == "cancelled"


async def test_break_drops_the_iterator_and_cancels(sequence: Sequence, gate: Gate) -> None:
    prediction = sequence.predict("once", logits_processor=gate)
    gate.allow(20)
    async for _ in prediction:
        break
    gate.open()
    assert (await soon(prediction)).stop_reason == "cancelled"
    assert gate.arrived < FEW


async def test_an_exception_in_the_loop_body_cancels(sequence: Sequence, gate: Gate) -> None:
    prediction = sequence.predict("once", logits_processor=gate)
    gate.allow(20)

    async def fail() -> None:
        async for _ in prediction:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    gate.open()
    assert (await soon(prediction)).stop_reason == "cancelled"


async def test_the_end_of_the_reading_task_cancels(sequence: Sequence, gate: Gate) -> None:
    prediction = await started(sequence, gate)

    async def read() -> None:
        async for _ in prediction:
            pass

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    gate.open()
    assert (await soon(prediction)).stop_reason == "cancelled"


async def test_a_second_reader_keeps_it_alive_when_the_first_breaks(
    sequence: Sequence, gate: Gate
) -> None:
    prediction = sequence.predict("once", logits_processor=gate, max_tokens=40)
    second = aiter(prediction)
    gate.allow(20)
    async for _ in prediction:
        break
    gate.open()
    texts = [text async for text in second]
    result = await prediction
    assert result.stop_reason == "max_tokens"
    assert "".join(texts) == result.content


async def test_break_inside_async_with_goes_on(sequence: Sequence, gate: Gate) -> None:
    gate.allow(20)
    async with sequence.predict("once", logits_processor=gate, max_tokens=40) as prediction:
        async for _ in prediction:
            break
        gate.open()
        assert (await soon(prediction)).stop_reason == "max_tokens"


async def test_leaving_the_block_cancels_at_once_without_waiting(
    sequence: Sequence, gate: Gate
) -> None:
    prediction = await started(sequence, gate)
    block = prediction.__aexit__(None, None, None)
    _ = await prediction.__aenter__()
    with pytest.raises(StopIteration):
        block.send(None)  # it never suspends
    gate.open()
    assert (await soon(prediction)).stop_reason == "cancelled"


async def test_leaving_the_block_never_raises(sequence: Sequence) -> None:
    async with sequence.predict("once", max_tokens=1) as prediction:
        await soon(prediction)
    async with prediction:
        pass
    await sequence.aclose()
    async with prediction:
        pass


async def test_one_never_read_runs_until_finished(sequence: Sequence) -> None:
    prediction = sequence.predict("once", max_tokens=30, max_pending=1)
    await until(lambda: prediction.done)
    assert (await prediction).stop_reason == "max_tokens"


async def test_dropping_the_last_reference_cancels(sequence: Sequence, gate: Gate) -> None:
    prediction = await started(sequence, gate)
    iterator = aiter(prediction)
    del prediction, iterator
    await stops(sequence, gate)


async def test_dropping_the_last_reference_in_another_thread_cancels(
    sequence: Sequence, gate: Gate
) -> None:
    prediction = await started(sequence, gate)
    references = [prediction, aiter(prediction)]
    del prediction
    await asyncio.to_thread(references.clear)
    await stops(sequence, gate)


async def test_one_dropped_unfinished_and_never_used_is_warned_of(
    sequence: Sequence, gate: Gate
) -> None:
    prediction = await started(sequence, gate)
    with pytest.warns(RuntimeWarning, match="never read, awaited or cancelled"):
        del prediction
    await stops(sequence, gate)


async def test_one_dropped_finished_is_not_warned_of(sequence: Sequence) -> None:
    prediction = sequence.predict("once", max_tokens=1)
    await ended(prediction)
    del prediction
    gc.collect()


async def test_a_cancelled_anext_loses_nothing(sequence: Sequence, gate: Gate) -> None:
    prediction = sequence.predict("once", logits_processor=gate, max_tokens=30)
    iterator = aiter(prediction)
    texts: list[str] = []

    async def poll() -> None:
        while True:
            texts.append(await asyncio.wait_for(anext(iterator), 0.002))

    for _ in range(30):
        with pytest.raises(TimeoutError):
            await poll()
        gate.allow()
    texts.extend([text async for text in iterator])
    result = await prediction
    assert result.stop_reason == "max_tokens"
    assert "".join(texts) == result.content


async def test_shield_protects(sequence: Sequence, gate: Gate) -> None:
    prediction = await started(sequence, gate, max_tokens=10)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncio.shield(prediction)
    gate.open()
    assert (await soon(prediction)).stop_reason == "max_tokens"


async def test_an_iterator_is_a_plain_object_that_holds_the_prediction(sequence: Sequence) -> None:
    prediction = sequence.predict("once", max_tokens=5)
    alive = weakref.ref(prediction)
    iterator = aiter(prediction)
    assert not hasattr(iterator, "aclose")
    del prediction
    texts = [text async for text in iterator]
    assert texts
    assert alive() is not None
    del iterator
    assert alive() is None


async def test_nothing_internal_holds_the_handle(sequence: Sequence, gate: Gate) -> None:
    prediction = await started(sequence, gate)
    prediction.cancel()
    alive = weakref.ref(prediction)
    del prediction
    assert alive() is None
    await stops(sequence, gate)


# --- replay ---------------------------------------------------------------------------------------


async def test_iterating_starts_at_the_first_piece_at_any_time(sequence: Sequence) -> None:
    prediction = sequence.predict("once", max_tokens=40)
    early = await soon(collect(prediction))
    late = await collect(prediction)
    assert "".join(early) == "".join(late)
    assert len(late) == 1, "what exists already arrives joined"


async def test_events_of_a_finished_prediction_are_merged(sequence: Sequence) -> None:
    prediction = sequence.predict("once", max_tokens=40)
    result = await soon(prediction)
    events = [event async for event in prediction.events()]
    deltas = [event for event in events if isinstance(event, llamactor.TextDelta)]
    assert [(delta.text, delta.tokens) for delta in deltas] == [(result.content, result.tokens)]


async def test_several_readers_read_the_same_text(sequence: Sequence) -> None:
    prediction = sequence.predict("once", max_tokens=100)
    readings = await soon(asyncio.gather(*(collect(prediction) for _ in range(4))))
    assert {"".join(texts) for texts in readings} == {(await prediction).content}


async def test_iteration_lets_the_loop_run(sequence: Sequence) -> None:
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count_turns())
    texts = await soon(collect(sequence.predict("once", max_tokens=1000)))
    counter.cancel()
    assert turns >= len(texts) / 64


async def test_an_exhausted_iterator_stays_exhausted(sequence: Sequence) -> None:
    iterator = aiter(sequence.predict("once", max_tokens=2))
    assert [text async for text in iterator]
    for _ in range(3):
        with pytest.raises(StopAsyncIteration):
            await anext(iterator)


# --- back-pressure --------------------------------------------------------------------------------


async def paused_at(prediction: Prediction, model: llamactor.Model) -> int:
    """The tokens of a prediction that rests: others run far while it makes none."""
    while True:
        before = prediction.stats.predicted_tokens
        await soon(model.complete("a clock", max_tokens=300))
        if prediction.stats.predicted_tokens == before:
            return before


async def test_a_stalled_reader_pauses_the_sequence(
    tiny_model: llamactor.Model, gate: Gate
) -> None:
    prediction = tiny_model.complete("once", max_tokens=1000, max_pending=16, logits_processor=gate)
    iterator = aiter(prediction)
    gate.open()
    tokens = await paused_at(prediction, tiny_model)
    assert 16 <= tokens < 100
    first = await soon(anext(iterator))
    assert tokens + 16 <= await paused_at(prediction, tiny_model) < 200
    assert not prediction.done
    texts = [first, *[text async for text in iterator]]
    result = await prediction
    assert result.stats.predicted_tokens == 1000
    assert "".join(texts) == result.content


async def test_a_fast_reader_beside_a_stalled_one_keeps_it_going(
    tiny_model: llamactor.Model,
) -> None:
    prediction = tiny_model.complete("once", max_tokens=500, max_pending=16)
    stalled = aiter(prediction)
    text = "".join(await soon(collect(prediction)))
    assert (await prediction).stats.predicted_tokens == 500
    assert "".join([piece async for piece in stalled]) == text


async def test_somebody_awaiting_the_result_keeps_it_going(tiny_model: llamactor.Model) -> None:
    prediction = tiny_model.complete("once", max_tokens=500, max_pending=16)
    _stalled = aiter(prediction)
    await paused_at(prediction, tiny_model)
    assert (await soon(prediction)).stats.predicted_tokens == 500


async def test_no_limit_of_pending_tokens_never_pauses(tiny_model: llamactor.Model) -> None:
    prediction = tiny_model.complete("once", max_tokens=500, max_pending=None)
    _stalled = aiter(prediction)
    await until(lambda: prediction.done)


async def test_a_reader_that_gave_up_waiting_lags_again(tiny_model: llamactor.Model) -> None:
    gate = Gate()
    prediction = tiny_model.complete("once", max_tokens=1000, max_pending=16, logits_processor=gate)
    iterator = aiter(prediction)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(iterator), 0.001)
    gate.open()
    assert await paused_at(prediction, tiny_model) < 100
    prediction.cancel()


# --- cancelled ------------------------------------------------------------------------------------


async def test_cancelled_predictions_end_normally_with_the_text_so_far(
    sequence: Sequence, gate: Gate
) -> None:
    prediction = await started(sequence, gate)
    prediction.cancel()
    prediction.cancel()
    gate.open()
    texts = await soon(collect(prediction))
    result = await prediction
    assert result.stop_reason == "cancelled"
    assert "".join(texts) == result.content
    assert result.stats.predicted_tokens == len(result.tokens) >= 1


async def test_cancel_after_the_end_changes_nothing(sequence: Sequence) -> None:
    prediction = sequence.predict("once", max_tokens=2)
    result = await soon(prediction)
    prediction.cancel()
    assert await prediction is result
    assert result.stop_reason == "max_tokens"


async def test_a_prediction_cancelled_in_the_queue_ends_empty(
    sequence: Sequence, gate: Gate
) -> None:
    running = await started(sequence, gate)
    queued = sequence.predict("next")
    queued.cancel()
    running.cancel()
    gate.open()
    result = await soon(queued)
    assert (result.stop_reason, result.content, result.tokens) == ("cancelled", "", [])
    assert (await soon(running)).stop_reason == "cancelled"


# --- failures -------------------------------------------------------------------------------------


async def test_closing_the_sequence_fails_its_prediction_every_time_with_the_partial(
    sequence: Sequence, gate: Gate
) -> None:
    prediction = await started(sequence, gate)
    await until(lambda: bool(prediction.text))
    await sequence.aclose()
    gate.open()
    for _ in range(2):
        with pytest.raises(llamactor.ClosedError) as failure:
            await soon(prediction)
        assert failure.value.partial is not None
        assert failure.value.partial.content == prediction.text != ""
    for _ in range(2):
        iterator = aiter(prediction)
        assert await anext(iterator) == prediction.text
        with pytest.raises(llamactor.ClosedError):
            await anext(iterator)


async def test_closing_the_model_fails_its_predictions(
    tiny_model: llamactor.Model, gate: Gate
) -> None:
    prediction = tiny_model.complete("once", logits_processor=gate)
    await gate.reached()
    closing = asyncio.create_task(tiny_model.aclose())
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(llamactor.ClosedError):
        await soon(prediction)
    await soon(closing)


async def test_an_error_of_a_callback_is_the_failure(sequence: Sequence) -> None:
    def processor(tokens: list[int], logits: memoryview[float]) -> None:
        raise ZeroDivisionError("mine")

    prediction = sequence.predict("once", logits_processor=processor)
    with pytest.raises(ZeroDivisionError, match="mine"):
        await soon(prediction)
    assert (await soon(sequence.predict("next", max_tokens=1))).stop_reason == "max_tokens"


async def test_argument_errors_raise_at_the_call(sequence: Sequence) -> None:
    with pytest.raises(ValueError, match="temperature"):
        _ = sequence.predict("once", temperature=-1)
    with pytest.raises(TypeError, match="temperature"):
        _ = sequence.predict("once", temprature=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="empty"):
        _ = sequence.predict("")


async def test_a_prompt_too_long_fails_at_the_await(sequence: Sequence) -> None:
    prediction = sequence.predict([20] * 3000)
    with pytest.raises(llamactor.ContextOverflowError, match="3000"):
        await soon(prediction)


async def test_a_failure_nobody_retrieves_goes_to_the_exception_handler(
    sequence: Sequence,
) -> None:
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    prediction = sequence.predict([20] * 3000)
    await ended(prediction)
    del prediction
    gc.collect()
    await until(lambda: bool(reports))
    assert isinstance(reports[0]["exception"], llamactor.ContextOverflowError)


async def test_a_failure_somebody_retrieved_is_not_reported(sequence: Sequence) -> None:
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    prediction = sequence.predict([20] * 3000)
    with pytest.raises(llamactor.ContextOverflowError):
        await soon(prediction)
    del prediction
    gc.collect()
    await asyncio.sleep(0)
    assert reports == []
