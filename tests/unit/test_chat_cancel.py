"""Cancelling and closing a chat session, wherever something waits, and what is left then."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

from llamactor import (
    AssistantMessage,
    ChatSession,
    ClosedError,
    Model,
    Prediction,
    SystemMessage,
    UserMessage,
)
from llamactor.context_shift import ShiftRequest, ShiftResult
from tests.contexts import soon, until, waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import Gate

SYSTEM = "You are a helpful assistant."
HELLO = "Hi, my name is Ada."
NAME = "What is my name?"
SUM = "What is 2+3?"

Operation = Callable[[ChatSession], Awaitable[Any]]


@pytest.fixture
async def session(tinychat: Model) -> AsyncIterator[ChatSession]:
    """A session that has said nothing yet."""
    async with tinychat.chat(system_prompt=SYSTEM) as session:
        yield session


def users(session: ChatSession) -> list[str]:
    return [message.content for message in session.history if isinstance(message, UserMessage)]


async def cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel a task and see it end so."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(task)


async def goes_on(session: ChatSession) -> None:
    """Pass if a further prompt is answered and recorded."""
    result = await soon(session.prompt(SUM))
    assert session.history[-2] == UserMessage(SUM)
    assert session.history[-1].content == result.content != ""


def tasks() -> set[str]:
    """The names of the drivers that are alive."""
    names = {task.get_name() for task in asyncio.all_tasks()}
    return {name for name in names if name.startswith("llamactor")}


# --- cancelling a prompt --------------------------------------------------------------------------


async def by_cancel(prediction: Prediction) -> None:
    prediction.cancel()


async def by_cancel_from_a_thread(prediction: Prediction) -> None:
    await asyncio.to_thread(prediction.cancel)


async def by_cancelling_the_waiter(prediction: Prediction) -> None:
    await cancelled(await waiting(prediction.result()))


async def by_leaving_its_block(prediction: Prediction) -> None:
    async with prediction:
        pass


async def by_a_deadline_of_the_waiter(prediction: Prediction) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await prediction


WAYS = [
    by_cancel,
    by_cancel_from_a_thread,
    by_cancelling_the_waiter,
    by_leaving_its_block,
    by_a_deadline_of_the_waiter,
]


@pytest.mark.every_loop
@pytest.mark.parametrize("cancel", WAYS)
async def test_a_prompt_cancelled_while_it_waits_was_never_made(
    session: ChatSession, gate: Gate, cancel: Callable[[Prediction], Awaitable[None]]
) -> None:
    first = session.prompt(HELLO, logits_processor=gate)
    second = session.prompt("Never mind.")
    third = session.prompt(NAME)
    await gate.reached()
    await soon(cancel(second))
    assert (await soon(second)).content == ""  # at once, though the first still runs
    assert not first.done
    gate.open()
    await soon(third)
    assert users(session) == [HELLO, NAME]


@pytest.mark.parametrize("cancel", WAYS)
async def test_a_prompt_cancelled_at_the_call_was_never_made(
    session: ChatSession, cancel: Callable[[Prediction], Awaitable[None]]
) -> None:
    prediction = session.prompt(HELLO)
    await soon(cancel(prediction))
    result = await soon(prediction)
    assert result.stop_reason == "cancelled"
    assert (len(session.history) > 1) == bool(result.tokens)
    await goes_on(session)


@pytest.mark.every_loop
@pytest.mark.parametrize("cancel", WAYS)
async def test_a_prompt_cancelled_after_a_piece_is_recorded_as_far_as_it_came(
    session: ChatSession, gate: Gate, cancel: Callable[[Prediction], Awaitable[None]]
) -> None:
    prediction = session.prompt(HELLO, logits_processor=gate)
    gate.allow(3)
    await until(lambda: gate.arrived == 4)
    await soon(cancel(prediction))
    gate.open()
    result = await soon(prediction)
    assert result.stop_reason == "cancelled"
    assert result.tokens
    assert session.history == (
        SystemMessage(SYSTEM),
        UserMessage(HELLO),
        AssistantMessage(result.content, tokens=tuple(result.tokens)),
    )
    after = await soon(session.prompt(NAME))
    assert after.stats.cached_tokens >= result.stats.prompt_tokens + len(result.tokens) - 1


async def test_a_prompt_cancelled_before_its_first_piece_leaves_everything_as_it_was(
    session: ChatSession, gate: Gate
) -> None:
    before = session.history
    prediction = session.prompt(HELLO, logits_processor=gate, response_prefix="Nice")
    await gate.reached()
    prediction.cancel()
    gate.open()
    result = await soon(prediction)
    if not result.tokens:  # the first token may have been drawn before the cancel arrived
        assert session.history == before
    await goes_on(session)


async def test_a_prompt_without_recording_is_not_recorded_when_it_is_cancelled(
    session: ChatSession, gate: Gate
) -> None:
    before = session.history
    prediction = session.prompt(HELLO, logits_processor=gate, record=False)
    gate.allow(3)
    await until(lambda: gate.arrived == 4)
    prediction.cancel()
    gate.open()
    assert (await soon(prediction)).tokens
    assert session.history == before


async def test_a_prompt_is_cancelled_when_its_handle_is_dropped(
    session: ChatSession, gate: Gate
) -> None:
    prediction = session.prompt(HELLO, logits_processor=gate)
    iterator = aiter(prediction)
    gate.allow(3)
    await soon(anext(iterator))
    handle = weakref.ref(prediction)
    del prediction, iterator
    gc.collect()
    assert handle() is None
    gate.open()
    await goes_on(session)
    assert users(session)[0] == HELLO  # a piece had been produced


async def test_a_prompt_cancelled_while_a_strategy_thinks_lets_the_next_one_go(
    tinychat: Model,
) -> None:
    thinking, forever = asyncio.Event(), asyncio.Event()
    interrupted: list[bool] = []

    async def strategy(request: ShiftRequest) -> ShiftResult:
        thinking.set()
        try:
            await forever.wait()
        except asyncio.CancelledError:
            interrupted.append(True)
            raise
        return ShiftResult(request.messages)

    async with (
        tinychat.create_context(context_size=128, sequences=1, threads=1) as context,
        tinychat.chat(context=context) as session,
    ):
        prediction = session.prompt("word " * 200, overflow=strategy)
        await soon(thinking.wait())
        prediction.cancel()
        assert (await soon(prediction)).stop_reason == "cancelled"
        await goes_on(session)
        assert interrupted == [True]


async def test_cancelling_one_of_two_waiters_changes_nothing(
    session: ChatSession, gate: Gate
) -> None:
    prediction = session.prompt(HELLO, logits_processor=gate)
    one, two = await waiting(prediction.result()), await waiting(prediction.result())
    await cancelled(one)
    gate.open()
    assert (await soon(two)).stop_reason == "eos"


# --- cancelling everything else that waits --------------------------------------------------------

ONE = [UserMessage("one")]

CHANGES: dict[str, Operation] = {
    "set_history": lambda session: session.set_history(ONE),
    "reset": lambda session: session.reset(),
    "rewind": lambda session: session.rewind(),
    "delete_from": lambda session: session.delete_from(0),
    "fork": lambda session: session.fork(),
    "preload": lambda session: session.preload("What is my"),
    "preload_nothing": lambda session: session.preload(),
    "complete": lambda session: session.complete("What is my").result(),
    "prompt": lambda session: session.prompt(NAME).result(),
    "iterating_a_prompt": lambda session: anext(aiter(session.prompt(NAME))),
}


async def call(operation: Operation, session: ChatSession) -> Any:
    return await operation(session)


@pytest.mark.every_loop
@pytest.mark.parametrize("name", CHANGES)
async def test_cancelling_what_waits_its_turn_leaves_no_trace(
    session: ChatSession, gate: Gate, name: str
) -> None:
    prediction = session.prompt(HELLO, logits_processor=gate)
    await gate.reached()
    task = await waiting(call(CHANGES[name], session))
    assert not task.done()
    await cancelled(task)
    gate.open()
    await soon(prediction)
    assert users(session) == [HELLO]
    await goes_on(session)
    await until(lambda: not tasks())


TURNS = (*range(1000), *(1000 + n * n for n in range(1000)))


@pytest.mark.parametrize("name", CHANGES)
async def test_cancelling_at_any_step_leaves_the_session_whole(
    session: ChatSession, name: str
) -> None:
    """After so many turns of the loop, until it is through: first each, then ever more at once.

    How many turns pass while native threads work depends on what else the machine does.
    """
    await soon(session.prompt(HELLO))
    before = session.history
    for steps in TURNS:
        task = asyncio.create_task(call(CHANGES[name], session))
        for _ in range(steps):
            await asyncio.sleep(0)
        if task.done():
            break
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            if isinstance(result := await soon(task), ChatSession):
                await result.aclose()
        # Either nothing has happened, or all of it.
        await session.set_history(before)
        assert session.history == before
    else:
        pytest.fail("it never came to an end")
    if isinstance(result := await task, ChatSession):
        await result.aclose()
    await goes_on(session)
    await until(lambda: not tasks())


async def test_cancelling_a_preload_keeps_what_is_evaluated(session: ChatSession) -> None:
    text = "What is 2+3? " * 60
    task = await waiting(session.preload(text))
    await until(lambda: session.usage.predictions > 0 or bool(tasks()))
    await cancelled(task)
    await soon(session.prompt(text, max_tokens=1))
    assert len(session.history) == 3


# --- closing --------------------------------------------------------------------------------------


async def test_closing_fails_what_runs_and_what_waits(session: ChatSession, gate: Gate) -> None:
    running = session.prompt(HELLO, logits_processor=gate)
    queued = session.prompt(NAME)
    edit = await waiting(session.reset())
    gate.allow(2)
    await until(lambda: gate.arrived == 3)
    closing = await waiting(session.aclose())
    with pytest.raises(ClosedError, match="the chat session was closed"):
        await soon(queued)
    gate.open()
    with pytest.raises(ClosedError) as caught:
        await soon(running)
    assert caught.value.partial is not None
    assert caught.value.partial.tokens
    with pytest.raises(ClosedError):
        await soon(edit)
    await soon(closing)
    assert session.history == (SystemMessage(SYSTEM),)
    await until(lambda: not tasks())


async def test_a_closed_session_refuses_everything_but_reading(session: ChatSession) -> None:
    await soon(session.prompt(HELLO))
    before = session.history
    await session.aclose()
    await session.aclose()
    assert session.closed
    for operation in CHANGES.values():
        with pytest.raises(ClosedError):
            await operation(session)
    assert session.history == session.context_window == before
    assert "closed" in repr(session)


async def test_cancelling_the_closing_does_not_stop_it(session: ChatSession, gate: Gate) -> None:
    running = session.prompt(HELLO, logits_processor=gate)
    await gate.reached()
    await cancelled(await waiting(session.aclose()))
    gate.open()
    with pytest.raises(ClosedError):
        await soon(running)
    with pytest.raises(ClosedError):
        _ = session.prompt(NAME)


async def test_closing_the_context_fails_the_prompts(tinychat: Model, gate: Gate) -> None:
    context = await tinychat.create_context(context_size=256, sequences=1, threads=1)
    session = tinychat.chat(context=context)
    running = session.prompt(HELLO, logits_processor=gate)
    queued = session.prompt(NAME)
    await gate.reached()
    closing = await waiting(context.aclose())
    gate.open()
    for prediction in (running, queued):
        with pytest.raises(ClosedError):
            await soon(prediction)
    await soon(closing)
    assert session.closed
    with pytest.raises(ClosedError):
        _ = session.prompt(NAME)
    await session.aclose()


async def test_a_session_cannot_be_made_with_what_is_closed(tinychat: Model) -> None:
    async with tinychat.create_context(context_size=64, sequences=1, threads=1) as context:
        pass
    with pytest.raises(ClosedError):
        tinychat.chat(context=context)


# --- lifetimes ------------------------------------------------------------------------------------


async def test_a_forgotten_session_goes_without_a_warning(tinychat: Model) -> None:
    session = tinychat.chat(system_prompt=SYSTEM)
    await soon(session.prompt(HELLO))
    await until(lambda: not tasks())
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None


async def test_a_prediction_outlives_the_name_of_its_session(tinychat: Model, gate: Gate) -> None:
    prediction = tinychat.chat(system_prompt=SYSTEM).prompt(HELLO, logits_processor=gate)
    gc.collect()
    gate.open()
    assert (await soon(prediction)).stop_reason == "eos"


async def test_nothing_internal_holds_the_handle(session: ChatSession, gate: Gate) -> None:
    first = session.prompt(HELLO, logits_processor=gate)
    await gate.reached()
    queued = session.prompt(NAME)
    queued.cancel()
    handles = [weakref.ref(first), weakref.ref(queued)]
    first.cancel()
    del first, queued
    assert [handle() for handle in handles] == [None, None]
    gate.open()


async def test_no_task_is_left_after_a_prompt(session: ChatSession) -> None:
    for _ in range(3):
        await soon(session.prompt(HELLO))
    await until(lambda: not tasks())


async def test_closing_forgets_what_the_chat_left(tinychat: Model) -> None:
    """Cells stay as a prefix for others, but nothing of a closed chat is put aside."""
    async with tinychat.create_context(context_size=256, sequences=1, threads=1) as context:
        for _ in range(8):
            async with tinychat.chat(context=context, system_prompt=SYSTEM) as session:
                await soon(session.prompt(HELLO))
        assert context.stats.parked_states == 0


# --- loops ----------------------------------------------------------------------------------------


async def test_a_session_belongs_to_the_loop_it_was_made_in(session: ChatSession) -> None:
    def elsewhere(operation: Operation) -> BaseException | None:
        caught: list[BaseException] = []

        def run() -> None:
            try:
                asyncio.run(call(operation, session))
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return caught[0] if caught else None

    operations = [*CHANGES.values(), lambda session: session.aclose()]
    for operation in operations:
        error = await asyncio.to_thread(elsewhere, operation)
        assert isinstance(error, RuntimeError)
        assert "event loop" in str(error)
    await goes_on(session)


async def test_a_session_needs_a_running_loop(tinychat: Model) -> None:
    def make() -> str:
        with pytest.raises(RuntimeError, match="needs a running asyncio event loop") as caught:
            tinychat.chat()
        return str(caught.value)

    assert "a chat session" in await asyncio.to_thread(make)


async def test_history_and_handle_can_be_read_from_any_thread(session: ChatSession) -> None:
    await soon(session.prompt(HELLO))
    assert len(await asyncio.to_thread(lambda: session.history)) == 3
    assert (await asyncio.to_thread(lambda: session.usage)).predictions == 1
