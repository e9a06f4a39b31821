"""Rounds: one prediction goes on with prompt after prompt, until its driver concludes."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from llamactor import (
    AssistantMessage,
    ClosedError,
    Event,
    Finished,
    Model,
    Prediction,
    PredictionResult,
    PromptProgress,
    RoundEnd,
    RoundStart,
    TextDelta,
    ToolCall,
    ToolMessage,
)
from llamactor.chat.rounds import Rounds
from llamactor.chat.tools import Tool, Toolbox, ToolUse
from llamactor.options import generation_options, native_options
from llamactor.prediction import PredictionStats, defer_prediction
from tests.contexts import prompt, soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.conftest import Gate


class Driver:
    """A prediction whose rounds a test begins and concludes by hand."""

    def __init__(self, model: Model, max_pending: int | None = 1024) -> None:
        home = model._home()
        self.model = home.model
        self.settled: list[PredictionResult] = []
        self.prediction: Prediction
        self.prediction, self.deferred = defer_prediction(
            home.context, model, max_pending, lambda result, _: self.settled.append(result)
        )

    def begin(self, n_prompt: int = 9, *, more: bool = True, **options: Any) -> bool:
        """Begin a round; `options` are those of generation."""
        native = native_options(generation_options({"seed": 3, **options}), self.model)
        return self.deferred.start(prompt(n_prompt), native, more=more)

    async def ended(self, rounds: int) -> PredictionResult:
        """Wait for the end of that many rounds and return the last one."""
        await until(lambda: self.deferred.rounds == rounds)
        last = self.deferred.last_round()
        assert last is not None
        return last


@pytest.fixture
async def driver(tiny_model: Model) -> AsyncIterator[Driver]:
    driver = Driver(tiny_model)
    yield driver
    driver.prediction.cancel()


async def three_rounds(driver: Driver) -> list[PredictionResult]:
    rounds = []
    for i in range(3):
        driver.deferred.tell(RoundStart(i))
        assert driver.begin(9 + i, max_tokens=4)
        rounds.append(await driver.ended(i + 1))
        driver.deferred.tell(RoundEnd(i))
    return rounds


def shown(events: list[Event]) -> list[str]:
    """Rounds and texts, with deltas of one text joined."""
    told: list[str] = []
    for event in events:
        match event:
            case RoundStart(index):
                told += [f"<{index}>", ""]
            case RoundEnd(index):
                told += [f"</{index}>", ""]
            case TextDelta(text):
                told[-1] += text
    return [one for one in told if one]


# --- one after the other --------------------------------------------------------------------------


@pytest.mark.every_loop
async def test_rounds_join_to_one_prediction(driver: Driver) -> None:
    rounds = await three_rounds(driver)
    assert not driver.prediction.done
    driver.deferred.conclude()
    result = await soon(driver.prediction)
    assert result.content == "".join(one.content for one in rounds) == driver.prediction.text
    assert result.tokens == [token for one in rounds for token in one.tokens]
    assert len(result.tokens) == 12
    assert result.stop_reason == rounds[-1].stop_reason == "max_tokens"
    assert driver.settled == [result]


async def test_the_last_round_may_be_the_end_at_once(driver: Driver) -> None:
    driver.begin(max_tokens=3)
    await driver.ended(1)
    driver.begin(max_tokens=3, more=False)
    assert len((await soon(driver.prediction)).tokens) == 6
    assert not driver.begin()


async def test_a_driver_may_say_why_it_concludes(driver: Driver) -> None:
    driver.begin(max_tokens=3)
    await driver.ended(1)
    driver.deferred.conclude("tool_calls")
    assert (await soon(driver.prediction)).stop_reason == "tool_calls"
    with pytest.raises(ValueError, match="boredom"):
        driver.deferred.conclude("boredom")  # type: ignore[arg-type]


async def test_concluding_while_a_round_runs_has_no_effect(driver: Driver, gate: Gate) -> None:
    driver.begin(max_tokens=3, logits_processor=gate)
    await gate.reached()
    driver.deferred.conclude()
    assert not driver.begin()
    gate.open()
    assert len((await driver.ended(1)).tokens) == 3


async def test_what_was_evaluated_serves_the_next_round(driver: Driver) -> None:
    driver.begin(40, max_tokens=4)
    first = await driver.ended(1)
    driver.begin(40, max_tokens=4)
    second = await driver.ended(2)
    assert (first.stats.cached_tokens, second.stats.cached_tokens) == (0, 39)
    assert second.tokens == first.tokens


async def test_what_rounds_take_adds_up(driver: Driver) -> None:
    rounds = [one.stats for one in await three_rounds(driver)]
    during = driver.prediction.stats
    driver.deferred.conclude()
    result = (await soon(driver.prediction)).stats
    for stats in (during, result):
        for name in ("prompt_tokens", "cached_tokens", "predicted_tokens", "total_tokens"):
            assert getattr(stats, name) == sum(getattr(one, name) for one in rounds)
        for name in ("queue_time", "prefill_time", "decode_time"):
            total = sum(getattr(one, name) for one in rounds)
            assert getattr(stats, name) == pytest.approx(total)
        assert stats.time_to_first_token == rounds[0].time_to_first_token
        assert stats.tokens_per_second == pytest.approx(9 / stats.decode_time)
    working = result.queue_time + result.prefill_time + result.decode_time
    assert working <= during.total_time <= result.total_time == driver.prediction.stats.total_time


async def test_log_probabilities_and_the_seed_are_those_of_all_rounds(driver: Driver) -> None:
    for i in range(2):
        driver.begin(max_tokens=3, logprobs=0, seed=7 + i)
        last = await driver.ended(i + 1)
        assert [one.token for one in last.logprobs or ()] == last.tokens
    driver.deferred.conclude()
    result = await soon(driver.prediction)
    assert [one.token for one in result.logprobs or ()] == result.tokens
    assert result.seed == 7


async def test_a_prefix_belongs_to_the_round_that_has_it(driver: Driver) -> None:
    driver.begin(max_tokens=2, response_prefix="one: ")
    first = await driver.ended(1)
    driver.begin(max_tokens=2)
    second = await driver.ended(2)
    assert first.content.startswith("one: ")
    assert not second.content.startswith("one: ")
    assert driver.prediction.text == first.content + second.content


# --- readers --------------------------------------------------------------------------------------


async def all_of(events: Any) -> list[Any]:
    return [event async for event in events]


async def test_readers_early_and_late_get_the_same(driver: Driver) -> None:
    early = asyncio.create_task(all_of(driver.prediction.events()))
    words = asyncio.create_task(all_of(driver.prediction))
    waiting = asyncio.create_task(driver.prediction.result())
    rounds = await three_rounds(driver)
    driver.deferred.conclude()
    result = await soon(waiting)
    told = shown(await soon(early))
    expected = [part for i, one in enumerate(rounds) for part in (f"<{i}>", one.content, f"</{i}>")]
    assert told == expected
    late = await soon(all_of(driver.prediction.events()))
    assert shown(late) == expected
    assert late[-1] == Finished(result)
    assert "".join(await soon(words)) == result.content
    assert {event.total for event in late if isinstance(event, PromptProgress)} == {9, 10, 11}


async def test_deltas_never_reach_over_the_end_of_a_round(driver: Driver) -> None:
    rounds = await three_rounds(driver)
    driver.deferred.conclude()
    events = await soon(all_of(driver.prediction.events()))
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert [event.tokens for event in deltas] == [one.tokens for one in rounds]


async def test_what_is_told_after_the_end_reaches_nobody(driver: Driver) -> None:
    driver.begin(max_tokens=2)
    await driver.ended(1)
    driver.deferred.conclude()
    await soon(driver.prediction)
    driver.deferred.tell(RoundEnd(0))
    events = await soon(all_of(driver.prediction.events()))
    assert isinstance(events[-1], Finished)
    assert RoundEnd(0) not in events


async def test_a_note_wakes_who_waits_for_events(driver: Driver) -> None:
    driver.begin(max_tokens=2)
    await driver.ended(1)
    events = driver.prediction.events()
    while not isinstance(await soon(anext(events)), TextDelta):
        pass
    waiting = asyncio.create_task(anext(events))
    await asyncio.sleep(0)
    driver.deferred.tell(RoundEnd(0))
    assert await soon(waiting) == RoundEnd(0)


# --- back-pressure --------------------------------------------------------------------------------


async def test_a_reader_that_lags_pauses_later_rounds_too(tiny_model: Model) -> None:
    driver = Driver(tiny_model, max_pending=4)
    reader = aiter(driver.prediction)
    driver.begin(max_tokens=4)
    await driver.ended(1)
    driver.begin(max_tokens=50)
    await until(lambda: driver.prediction.stats.predicted_tokens == 5)
    await asyncio.sleep(0.05)
    assert driver.prediction.stats.predicted_tokens == 5
    rest = asyncio.create_task(all_of(reader))
    await driver.ended(2)
    driver.deferred.conclude()
    assert len("".join(await soon(rest))) == len(driver.prediction.text)


async def test_a_round_that_ends_while_readers_lag_does_not_hold_up_the_next(
    tiny_model: Model,
) -> None:
    driver = Driver(tiny_model, max_pending=4)
    reader = aiter(driver.prediction)
    driver.begin(max_tokens=5)
    await driver.ended(1)
    assert await soon(anext(reader))
    driver.begin(max_tokens=3)
    await driver.ended(2)
    driver.deferred.conclude()
    assert len((await soon(driver.prediction)).tokens) == 8


# --- cancelling -----------------------------------------------------------------------------------


async def by_cancel(driver: Driver) -> None:
    driver.prediction.cancel()


async def by_a_thread(driver: Driver) -> None:
    await asyncio.to_thread(driver.prediction.cancel)


async def by_the_only_waiter(driver: Driver) -> None:
    waiter = asyncio.create_task(driver.prediction.result())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def by_leaving_the_block(driver: Driver) -> None:
    async with driver.prediction:
        pass


WAYS = [by_cancel, by_a_thread, by_the_only_waiter, by_leaving_the_block]


@pytest.mark.parametrize("way", WAYS)
async def test_a_cancel_between_rounds_ends_it_at_once(
    driver: Driver, way: Callable[[Driver], Any]
) -> None:
    driver.begin(max_tokens=3)
    last = await driver.ended(1)
    await way(driver)
    assert driver.prediction.done
    assert not driver.begin()
    result = await soon(driver.prediction)
    assert (result.stop_reason, result.content) == ("cancelled", last.content)
    assert driver.deferred.rounds == 1


@pytest.mark.parametrize("way", WAYS)
async def test_a_cancel_in_a_later_round_ends_it_with_what_there_is(
    driver: Driver, gate: Gate, way: Callable[[Driver], Any]
) -> None:
    driver.begin(max_tokens=3)
    first = await driver.ended(1)
    driver.begin(max_tokens=9, logits_processor=gate)
    for _ in range(3):
        await gate.reached()
        gate.allow()
    await gate.reached()
    await way(driver)
    gate.open()
    result = await soon(driver.prediction)
    assert result.stop_reason == "cancelled"
    assert result.tokens[:3] == first.tokens
    assert 3 + 3 <= len(result.tokens) < 3 + 9


async def test_a_prediction_dropped_between_rounds_is_cancelled(tiny_model: Model) -> None:
    driver = Driver(tiny_model)
    driver.begin(max_tokens=3)
    await driver.ended(1)
    driver.prediction.cancel  # noqa: B018 -- it was used, so that nobody warns
    driver.prediction.events()
    del driver.prediction
    await until(lambda: bool(driver.settled))
    assert driver.settled[0].stop_reason == "cancelled"


async def test_cancels_at_any_moment_end_it_for_good(tiny_model: Model) -> None:
    for moment in range(40):
        driver = Driver(tiny_model)
        canceller = threading.Timer(moment * 0.0005, driver.prediction.cancel)
        canceller.start()
        rounds = 0
        while driver.begin(max_tokens=2):
            rounds += 1
            await until(lambda: driver.deferred.rounds >= rounds or driver.prediction.done)  # noqa: B023
        result = await soon(driver.prediction)
        assert result.stop_reason == "cancelled"
        assert 2 * (driver.deferred.rounds - 1) <= len(result.tokens) <= 2 * driver.deferred.rounds
        await asyncio.to_thread(canceller.join)


# --- failures -------------------------------------------------------------------------------------


async def test_a_round_that_fails_is_the_end(driver: Driver) -> None:
    def broken(tokens: list[int], logits: memoryview[float]) -> None:
        raise ZeroDivisionError

    driver.begin(max_tokens=3)
    first = await driver.ended(1)
    driver.begin(max_tokens=3, logits_processor=broken)
    with pytest.raises(ZeroDivisionError) as failed:
        await soon(driver.prediction)
    assert failed.value.partial.content == first.content  # type: ignore[attr-defined]
    assert not driver.begin()


async def test_a_driver_may_fail_between_rounds(driver: Driver) -> None:
    driver.begin(max_tokens=3)
    first = await driver.ended(1)
    driver.deferred.fail(KeyError("tool"))
    with pytest.raises(KeyError) as failed:
        await soon(driver.prediction)
    assert failed.value.partial.content == first.content  # type: ignore[attr-defined]


async def test_a_driver_that_cannot_complete_the_result_keeps_nobody_waiting(
    driver: Driver,
) -> None:
    def fails(result: PredictionResult) -> PredictionResult:
        raise KeyError("messages")

    driver.deferred.on_result(fails)
    driver.begin(max_tokens=3)
    last = await driver.ended(1)
    driver.deferred.conclude()
    with pytest.raises(KeyError, match="messages") as failed:
        await soon(driver.prediction)
    partial = failed.value.partial  # type: ignore[attr-defined]
    assert (partial.content, partial.stop_reason) == (last.content, None)
    assert driver.settled == [partial]


async def test_closing_the_context_between_rounds_refuses_the_next(tiny_model: Model) -> None:
    driver = Driver(tiny_model)
    driver.begin(max_tokens=3)
    await driver.ended(1)
    await tiny_model.aclose()
    with pytest.raises(ClosedError):
        driver.begin()
    driver.prediction.cancel()


# --- how far the rounds of a turn are -------------------------------------------------------------

TOOL = Tool("t", handler=lambda: None)
USER = AssistantMessage("Is it?")


def result(tokens: int, stop_reason: Any = "tool_calls") -> PredictionResult:
    return PredictionResult(
        content="",
        tokens=[0] * tokens,
        logprobs=None,
        stop_reason=stop_reason,
        stop_string=None,
        stats=PredictionStats(),
        seed=0,
        context_shift=None,
    )


def asking(ident: str = "1", content: str = "") -> AssistantMessage:
    return AssistantMessage(content, tool_calls=(ToolCall(ident, "t"),))


ANSWERED = ToolMessage("5", "1", "t")


def rounds(max_tokens: int | None = None, **changes: Any) -> Rounds:
    return Rounds(ToolUse(tools=Toolbox([TOOL]), **changes), max_tokens)


def test_there_are_rounds_only_where_the_program_carries_out_calls() -> None:
    assert rounds().may_follow
    assert not rounds(choice="none").may_follow
    bare = ToolUse(tools=Toolbox([{"name": "t"}]))
    assert not Rounds(bare, None).may_follow
    assert not Rounds(ToolUse(tools=Toolbox()), None).may_follow


def test_what_must_be_called_must_be_called_once() -> None:
    state = rounds(choice="required")
    assert state.choice([USER]) == "required"
    state.end(result(1), asking())
    state.settle((ANSWERED,))
    assert state.choice([USER]) == "auto"
    assert rounds(choice="none").choice([USER]) == "none"


def test_the_last_round_has_no_tools() -> None:
    state = rounds(max_rounds=2)
    assert [tool["function"]["name"] for tool in state.definitions] == ["t"]
    state.end(result(1), asking())
    assert state.definitions == ()
    assert state.choice([USER, asking(), ANSWERED]) == "none"
    assert state.choice([USER]) is None


def test_tokens_count_over_all_rounds() -> None:
    state = rounds(max_tokens=5)
    state.end(result(3), asking())
    assert state.left == 2
    state.end(result(3), asking())
    assert state.left == 0


def test_a_round_adds_what_it_said_and_what_came_of_it() -> None:
    state = rounds()
    state.end(result(1), asking())
    assert state.settle((ANSWERED,)) == (asking(), ANSWERED)
    assert state.made == (asking(), ANSWERED)
    assert (state.calls, state.ended) == (1, 1)


def test_calls_cut_off_by_a_cancel_were_not_made() -> None:
    state = rounds()
    state.end(result(1), asking(content="I look it up."))
    assert state.said(None, "cancelled") == [AssistantMessage("I look it up.")]
    state = rounds()
    state.end(result(1), asking())
    assert state.said(None, "cancelled") == []


def test_results_are_followed_by_an_answer_unless_the_program_is_to_answer() -> None:
    state = rounds()
    state.end(result(1), asking())
    state.settle((ANSWERED,))
    assert state.said(None, "cancelled")[-1] == AssistantMessage()
    assert state.said(None, "max_tokens")[-1] == AssistantMessage()
    assert state.said(None, "tool_calls")[-1] == ANSWERED


def test_an_id_that_a_model_uses_again_is_another_call() -> None:
    told, asked = ToolCall("0", "told"), ToolCall("0", "asked")
    first = AssistantMessage("", tool_calls=(told,))
    for calls, pending in (
        ((told, asked), (asked,)),
        ((told, told), (told,)),
        ((told, asked, asked), (asked, asked)),
    ):
        messages = (
            first,
            ToolMessage("5", "0", "told"),
            AssistantMessage("", tool_calls=calls[1:]),
        )
        ended = msgspec.structs.replace(result(3), tool_calls=calls, messages=messages)
        assert ended.pending_calls == pending
