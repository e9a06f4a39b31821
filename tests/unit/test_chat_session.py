"""A chat session: what is said, remembered, shared, edited; in which order, and what fails."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor import (
    AssistantMessage,
    ChatSession,
    ClosedError,
    ContextOverflowError,
    ContextShifted,
    DeadlineExceededError,
    Finished,
    Message,
    Model,
    PromptProgress,
    SystemMessage,
    TextDelta,
    UnsupportedError,
    UserMessage,
)
from llamactor.context_shift import ShiftRequest, ShiftResult
from tests.conftest import TINYCHAT
from tests.contexts import soon, until, waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from llamactor.chat.messages import MessageLike
    from tests.conftest import Gate

SYSTEM = "You are a helpful assistant."
HELLO = "Hi, my name is Ada."
NAME = "What is my name?"
CAPITAL = "What is the capital of France?"


@pytest.fixture
async def session(tinychat: Model) -> AsyncIterator[ChatSession]:
    """A session that has said nothing yet."""
    async with tinychat.chat(system_prompt=SYSTEM) as session:
        yield session


def said(session: ChatSession) -> list[str]:
    return [message.content for message in session.history]


def users(session: ChatSession) -> list[str]:
    return [message.content for message in session.history if isinstance(message, UserMessage)]


def last(session: ChatSession) -> AssistantMessage:
    message = session.history[-1]
    assert isinstance(message, AssistantMessage)
    return message


def broken(tokens: list[int], logits: memoryview[float]) -> None:
    """A logits processor that fails at the third token."""
    if len(tokens) == 2:
        raise ZeroDivisionError


# --- turns --------------------------------------------------------------------------------------


@pytest.mark.every_loop
async def test_what_was_said_in_one_turn_is_known_in_the_next(session: ChatSession) -> None:
    await soon(session.prompt(HELLO))
    await soon(session.prompt(CAPITAL))
    assert "Ada" in (await soon(session.prompt(NAME))).content


async def test_each_turn_enters_the_history_with_its_tokens(session: ChatSession) -> None:
    result = await soon(session.prompt(HELLO))
    assert session.history == (
        SystemMessage(SYSTEM),
        UserMessage(HELLO),
        AssistantMessage(result.content, tokens=tuple(result.tokens)),
    )
    assert session.context_window == session.history


async def test_a_turn_is_recorded_before_anybody_hears_of_its_end(session: ChatSession) -> None:
    async for event in session.prompt(HELLO).events():
        if isinstance(event, Finished):
            assert said(session) == [SYSTEM, HELLO, event.result.content]


async def test_a_turn_evaluates_only_what_is_new(session: ChatSession) -> None:
    held = 0
    for text in (HELLO, CAPITAL, NAME, CAPITAL, NAME):
        stats = (await soon(session.prompt(text))).stats
        assert stats.cached_tokens == held
        held = stats.prompt_tokens + stats.predicted_tokens
    assert session.usage.predictions == 5
    assert session.usage.prompt_tokens - session.usage.cached_tokens < 200


async def test_a_prompt_that_nobody_awaits_is_recorded_too(session: ChatSession) -> None:
    prediction = session.prompt(HELLO)
    await until(lambda: prediction.done)
    await until(lambda: len(session.history) == 3)


async def test_a_prompt_that_nobody_awaits_may_end_while_other_news_of_it_is_told(
    session: ChatSession, gate: Gate
) -> None:
    prediction = session.prompt(HELLO, logits_processor=gate)
    await gate.reached()

    def end() -> None:
        prediction._state.on_round = None
        gate.open()
        while not prediction.done:
            time.sleep(0.001)  # the loop stands still: it hears of the end later

    prediction._state.on_round = end
    prediction._state.on_news()
    assert prediction.done
    assert said(session) == [SYSTEM]
    assert "Ada" in (await soon(session.prompt(NAME))).content
    assert users(session) == [HELLO, NAME]


async def test_a_prompt_without_recording_leaves_no_trace(session: ChatSession) -> None:
    await soon(session.prompt(HELLO))
    before, revision = session.history, session.revision
    assert "Ada" in (await soon(session.prompt(NAME, record=False))).content
    assert (session.history, session.revision) == (before, revision)
    assert "Ada" in (await soon(session.prompt(NAME))).content
    assert len(session.history) == len(before) + 2


async def test_more_sessions_than_sequences_talk_at_once(tinychat: Model) -> None:
    names = ["Ada", "Bob", "Carl", "Dora", "Emil", "Fred", "Gina", "Hugo", "Ivan", "Judy"]
    sessions = [tinychat.chat(system_prompt=SYSTEM) for _ in names]

    async def talk(session: ChatSession, name: str) -> bool:
        await session.prompt(f"Hi, my name is {name}.")
        return name in (await session.prompt(NAME)).content

    pairs = zip(sessions, names, strict=True)
    known = await soon(asyncio.gather(*(talk(session, name) for session, name in pairs)))
    assert sum(known) >= 8  # what the model itself gets right
    for session in sessions:
        await session.aclose()


# --- order --------------------------------------------------------------------------------------


async def test_prompts_run_in_the_order_of_the_calls(session: ChatSession, gate: Gate) -> None:
    first = session.prompt(HELLO, logits_processor=gate)
    second = session.prompt(NAME)
    await gate.reached()
    assert second.stats.prompt_tokens == 0
    gate.open()
    assert "Ada" in (await soon(second)).content
    assert first.done
    assert users(session) == [HELLO, NAME]


async def test_both_handles_can_be_read_at_once(session: ChatSession) -> None:
    one, two = session.prompt(HELLO), session.prompt(NAME)
    texts = await soon(asyncio.gather(one.result(), two.result()))
    assert [text.content for text in texts] == [m.content for m in session.history[2::2]]


async def test_an_edit_waits_for_the_prompts_before_it(session: ChatSession, gate: Gate) -> None:
    prediction = session.prompt(HELLO, logits_processor=gate)
    edit = await waiting(session.set_history([UserMessage("a"), AssistantMessage("b")]))
    await gate.reached()
    assert not edit.done()
    gate.open()
    await soon(prediction)
    assert said(session) == [SYSTEM, HELLO, prediction.text]
    await soon(edit)
    assert said(session) == ["a", "b"]


async def test_a_prompt_called_before_an_edit_goes_first(session: ChatSession) -> None:
    prediction = session.prompt(HELLO)
    await soon(session.reset())
    assert prediction.done
    assert said(session) == [SYSTEM]


async def test_a_prompt_called_after_an_edit_sees_it(session: ChatSession, gate: Gate) -> None:
    first = session.prompt(HELLO, logits_processor=gate)
    edit = await waiting(session.reset())
    second = session.prompt(NAME)
    gate.open()
    await soon(asyncio.gather(first.result(), edit, second.result()))
    assert users(session) == [NAME]


async def test_edits_run_in_the_order_of_the_calls(session: ChatSession) -> None:
    await asyncio.gather(
        session.set_history([{"role": "user", "content": "one"}]),
        session.set_history([{"role": "user", "content": "two"}]),
        session.rewind(0),
    )
    assert said(session) == ["two"]


# --- completing and preloading ------------------------------------------------------------------


async def test_a_completion_goes_on_with_the_user_s_text(session: ChatSession) -> None:
    await soon(session.prompt(HELLO))
    completion = await soon(session.complete("What is my", max_tokens=2))
    assert completion.content.startswith(" ")
    assert "What" not in completion.content


async def test_a_completion_leaves_no_trace(session: ChatSession, tinychat: Model) -> None:
    await soon(session.prompt(HELLO))
    before, revision = session.history, session.revision
    await soon(session.complete("What is", max_tokens=4))
    assert (session.history, session.revision) == (before, revision)
    result = await soon(session.prompt(NAME))
    async with tinychat.chat(history=before) as other:
        expected = await soon(other.prompt(NAME))
    assert result.stats.prompt_tokens == expected.stats.prompt_tokens
    assert result.content == expected.content


async def test_a_running_completion_yields_to_a_prompt(session: ChatSession, gate: Gate) -> None:
    completion = session.complete("My name is", logits_processor=gate)
    gate.allow()
    await gate.reached()
    prediction = session.prompt(HELLO)
    gate.open()
    assert (await soon(completion)).stop_reason == "cancelled"
    await soon(prediction)
    assert users(session) == [HELLO]


async def test_a_waiting_completion_yields_to_a_prompt(session: ChatSession, gate: Gate) -> None:
    first = session.prompt(HELLO, logits_processor=gate)
    completion = session.complete("What is")
    second = session.prompt(NAME)
    assert (await soon(completion)).content == ""
    assert not first.done
    gate.open()
    await soon(second)
    assert users(session) == [HELLO, NAME]


async def test_a_completion_called_after_a_prompt_waits_for_it(session: ChatSession) -> None:
    prediction = session.prompt(HELLO)
    completion = session.complete("What is my", max_tokens=1)
    assert (await soon(completion)).stop_reason == "max_tokens"
    assert prediction.done
    assert completion.stats.cached_tokens >= prediction.stats.total_tokens


@pytest.mark.parametrize("edit", ["reset", "rewind", "set_history", "delete_from"])
async def test_a_running_completion_yields_to_an_edit(
    session: ChatSession, gate: Gate, edit: str
) -> None:
    completion = session.complete("My name is", logits_processor=gate)
    await gate.reached()
    arguments: dict[str, Any] = {"rewind": 0, "set_history": [], "delete_from": 0}
    change = await waiting(
        getattr(session, edit)(*([arguments[edit]] if edit in arguments else []))
    )
    gate.open()
    assert (await soon(completion)).stop_reason == "cancelled"
    await soon(change)


async def test_a_completion_has_a_limit_of_its_own(session: ChatSession) -> None:
    completion = await soon(session.complete("Hello", ignore_eos=True))
    assert completion.stats.predicted_tokens == 256


async def test_a_preloaded_prompt_evaluates_little(session: ChatSession) -> None:
    await soon(session.prompt(HELLO))
    await soon(session.preload(NAME))
    before = session.history
    stats = (await soon(session.prompt(NAME))).stats
    assert stats.prompt_tokens - stats.cached_tokens <= 8  # the end of the turn, the next header
    assert session.history[: len(before)] == before


async def test_without_text_the_history_is_preloaded(tinychat: Model) -> None:
    history = [{"role": "user", "content": HELLO}, {"role": "assistant", "content": "Hi, Ada!"}]
    async with tinychat.chat(system_prompt=SYSTEM, history=history) as session:
        await soon(session.preload())
        stats = (await soon(session.prompt(NAME))).stats
        words = tinychat.count_tokens(NAME)
        assert stats.prompt_tokens - stats.cached_tokens <= words + 8
        assert len(session.history) == 5


async def test_an_empty_session_preloads_what_every_prompt_begins_with(
    session: ChatSession, tinychat: Model
) -> None:
    await soon(session.preload())
    assert (await soon(session.prompt(HELLO))).stats.cached_tokens >= tinychat.count_tokens(SYSTEM)


async def test_a_preload_yields_to_a_prompt(session: ChatSession, gate: Gate) -> None:
    first = session.prompt(HELLO, logits_processor=gate)
    preload = await waiting(session.preload("What is my name, and"))
    second = session.prompt(NAME)
    await soon(preload)  # it never came to run
    assert not first.done
    gate.open()
    await soon(second)


async def test_a_preload_that_does_not_fit_says_so(tinychat: Model) -> None:
    async with tinychat.chat(overflow="stop_at_limit") as session:
        with pytest.raises(ContextOverflowError):
            await soon(session.preload("word " * 2000))
        assert session.history == ()


# --- what fails ---------------------------------------------------------------------------------


async def test_a_failed_turn_leaves_everything_as_it_was(session: ChatSession) -> None:
    await soon(session.prompt(HELLO))
    before, window, revision = session.history, session.context_window, session.revision
    with pytest.raises(ZeroDivisionError) as caught:
        await soon(session.prompt(NAME, logits_processor=broken))
    assert caught.value.partial.tokens  # type: ignore[attr-defined]
    assert (session.history, session.context_window) == (before, window)
    assert session.revision == revision
    result = await soon(session.prompt(NAME))
    assert "Ada" in result.content
    assert result.stats.cached_tokens > result.stats.prompt_tokens / 2


async def test_a_turn_that_fails_before_it_begins_was_never_made(session: ChatSession) -> None:
    before = session.history
    failing = session.prompt("word " * 2000, overflow="stop_at_limit")
    waiting_behind = session.prompt(HELLO)
    with pytest.raises(ContextOverflowError):
        await soon(failing)
    await soon(waiting_behind)
    assert session.history[: len(before)] == before
    assert users(session) == [HELLO]


async def test_a_deadline_counts_while_it_waits_its_turn(session: ChatSession, gate: Gate) -> None:
    first = session.prompt(HELLO, logits_processor=gate)
    await gate.reached()
    second = session.prompt(NAME, deadline=0.01)
    with pytest.raises(DeadlineExceededError, match=r"0\.01 s"):
        await soon(second)
    gate.open()
    await soon(first)
    assert users(session) == [HELLO]


async def test_wrong_options_are_refused_at_the_call(session: ChatSession) -> None:
    for call in (session.prompt, session.complete):
        with pytest.raises(TypeError, match="unknown generation option 'temprature'"):
            _ = call("Hi", temprature=1)  # type: ignore[call-arg]
        with pytest.raises(ValueError, match="temperature"):
            _ = call("Hi", temperature=-1)
        with pytest.raises(TypeError, match="content must be a str"):
            _ = call(5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="one token"):
            _ = call("Hi", logit_bias={"three whole words": 1.0})
    options: list[dict[str, Any]] = [{"record": 1}, {"on_message": 1}, {"overflow": 1}]
    for wrong in (*options, {"tools": 1}, {"tools": [1]}):
        with pytest.raises(TypeError):
            _ = session.prompt("Hi", **wrong)
    assert "Paris" in (await soon(session.prompt(CAPITAL))).content  # nobody stands in the line
    assert session.usage.predictions == 1


async def test_a_session_is_refused_what_makes_no_sense(tinychat: Model) -> None:
    with pytest.raises(TypeError, match="unknown generation option 'system'"):
        tinychat.chat(system="x")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="history begins with a system message already"):
        tinychat.chat(system_prompt="x", history=[SystemMessage("y")])
    with pytest.raises(TypeError, match=r"history\[0\]"):
        tinychat.chat(history=["x"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="overflow must be one of"):
        tinychat.chat(overflow="forget")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="template_kwargs"):
        tinychat.chat(template_kwargs={1: 2})  # type: ignore[dict-item]


async def test_a_model_that_cannot_generate_cannot_chat(tiny_model_path: Path) -> None:
    async with llamactor.load_model(tiny_model_path, vocab_only=True) as model:
        with pytest.raises(UnsupportedError):
            model.chat()
        with pytest.raises(UnsupportedError):
            _ = model.respond("Hi")


# --- options ------------------------------------------------------------------------------------


async def test_a_prompt_s_options_are_laid_over_the_session_s(tinychat: Model) -> None:
    async with tinychat.chat(max_tokens=3, logprobs=0) as session:
        first = await soon(session.prompt(HELLO))
        second = await soon(session.prompt(NAME, max_tokens=2))
        third = await soon(
            session.prompt(NAME, options=llamactor.GenerationOptions(max_tokens=4), top_k=1)
        )
    assert [len(result.tokens) for result in (first, second, third)] == [3, 2, 4]
    assert first.logprobs is not None
    assert second.logprobs is not None
    assert third.logprobs is None


async def test_a_session_can_be_made_with_a_context_or_a_sequence(tinychat: Model) -> None:
    async with (
        tinychat.create_context(context_size=256, sequences=2, threads=1) as context,
        context.sequence() as sequence,
    ):
        for target in (context, sequence):
            async with ChatSession(target) as session:
                assert "Paris" in (await soon(session.prompt(CAPITAL))).content
        async with tinychat.chat(context=context) as session:
            assert "Paris" in (await soon(session.prompt(CAPITAL))).content
        assert context.stats.evaluated_tokens > 0


async def test_initial_messages_come_after_the_system_prompt(tinychat: Model) -> None:
    greeting = AssistantMessage("Nice to meet you, Ada!")
    history: list[MessageLike] = [{"role": "user", "content": HELLO}, greeting]
    async with tinychat.chat(system_prompt=SYSTEM, history=history) as session:
        assert said(session) == [SYSTEM, HELLO, greeting.content]
        assert "Ada" in (await soon(session.prompt(NAME))).content


async def test_a_response_prefix_comes_first_and_is_part_of_the_turn(
    session: ChatSession, tinychat: Model
) -> None:
    prediction = session.prompt(CAPITAL, response_prefix="The capital of")
    pieces = [piece async for piece in prediction]
    result = await prediction
    assert pieces[0].startswith("The capital of")
    assert "".join(pieces) == result.content == last(session).content
    tokens = last(session).tokens
    assert tokens is not None
    assert tinychat.detokenize(tokens) == result.content
    stats = (await soon(session.prompt(NAME))).stats
    assert stats.cached_tokens == result.stats.prompt_tokens + len(result.tokens)


async def test_a_stop_string_is_in_neither_content_nor_tokens(
    session: ChatSession, tinychat: Model
) -> None:
    await soon(session.prompt(HELLO))
    result = await soon(session.prompt(NAME, stop="is"))
    assert result.stop_string == "is"
    tokens = last(session).tokens
    assert tokens is not None
    assert tinychat.detokenize(tokens) == last(session).content == result.content


async def test_trimmed_white_space_is_in_neither_content_nor_tokens(
    session: ChatSession, tinychat: Model
) -> None:
    bias: dict[int | str, Any] = {"\n": 100.0}
    trimmed = session.prompt(CAPITAL, trim_trailing_whitespace=True, logit_bias=bias, max_tokens=5)
    assert (await soon(trimmed)).content == ""
    assert last(session).tokens == ()


async def test_events_come_in_order(session: ChatSession) -> None:
    prediction = session.prompt(HELLO, response_prefix="Nice")
    kinds = [type(event) async for event in prediction.events()]
    assert kinds[-1] is Finished
    first_text = kinds.index(TextDelta)
    assert PromptProgress in kinds
    assert set(kinds[first_text + 1 : -1]) <= {TextDelta, PromptProgress}


# --- reasoning ----------------------------------------------------------------------------------

THINK = "What is 12 + 30? /think"
TEMPLATE = (TINYCHAT.parent / "chat_template.jinja").read_text(encoding="utf-8")
"""Of a model that thinks when asked to; what it has thought in earlier turns is left out."""


@pytest.fixture
async def thinker(tinychat: Model) -> AsyncIterator[ChatSession]:
    """A session whose template marks thoughts."""
    async with tinychat.chat(chat_template=TEMPLATE) as session:
        yield session


async def test_thoughts_are_kept_apart_from_the_answer(
    thinker: ChatSession, tinychat: Model
) -> None:
    prediction = thinker.prompt(THINK)
    pieces = [piece async for piece in prediction]
    result = await prediction
    assert "".join(pieces) == result.content
    assert result.reasoning
    assert "think>" not in result.content + result.reasoning
    answer = last(thinker)
    assert (answer.content, answer.reasoning) == (result.content, result.reasoning)
    assert answer.tokens == tuple(result.tokens)
    assert tinychat.detokenize(answer.tokens[answer.content_start :]) == result.content


async def test_a_thought_of_an_earlier_turn_is_not_shown_again(
    thinker: ChatSession, tinychat: Model
) -> None:
    first = (await soon(thinker.prompt(THINK))).stats
    thought = last(thinker).content_start
    stats = (await soon(thinker.prompt(CAPITAL))).stats
    assert stats.cached_tokens == first.prompt_tokens
    assert stats.prompt_tokens < first.total_tokens - thought + 30


async def test_the_template_may_begin_the_thought(tinychat: Model) -> None:
    names = {"enable_thinking": True}
    async with tinychat.chat(chat_template=TEMPLATE, template_kwargs=names) as session:
        result = await soon(session.prompt(THINK))
        assert result.reasoning
        assert last(session).reasoning == result.reasoning
        assert "think>" not in result.content + result.reasoning
        await soon(session.prompt(CAPITAL))


async def test_a_thought_has_a_budget(thinker: ChatSession) -> None:
    result = await soon(thinker.prompt(THINK, reasoning_budget=5))
    assert [segment.forced for segment in result.segments] == [True]
    assert len(result.segments[0].tokens) <= 5 + 8  # with the tags
    await soon(thinker.prompt(CAPITAL))


async def test_a_stop_after_a_thought_is_in_neither_content_nor_tokens(
    thinker: ChatSession, tinychat: Model
) -> None:
    result = await soon(thinker.prompt(THINK, stop="="))
    assert result.stop_string == "="
    assert result.reasoning
    answer = last(thinker)
    assert answer.tokens is not None
    assert tinychat.detokenize(answer.tokens[answer.content_start :]) == answer.content
    await soon(thinker.prompt(CAPITAL))


async def test_a_response_prefix_may_begin_the_thought(
    thinker: ChatSession, tinychat: Model
) -> None:
    prefix = "<think>\n10 + 30 = 40."
    result = await soon(thinker.prompt(THINK, response_prefix=prefix))
    assert result.reasoning is not None
    assert result.reasoning.startswith("10 + 30 = 40.")
    assert prefix not in result.content
    answer = last(thinker)
    assert answer.tokens is not None
    assert tinychat.detokenize(answer.tokens).startswith(prefix)
    assert tinychat.detokenize(answer.tokens[answer.content_start :]) == answer.content
    await soon(thinker.prompt(CAPITAL))


async def test_an_answer_cut_in_its_thought_is_recorded_as_far_as_it_came(
    thinker: ChatSession,
) -> None:
    result = await soon(thinker.prompt(THINK, max_tokens=8))
    assert result.content == ""
    answer = last(thinker)
    assert (answer.content, answer.reasoning) == ("", result.reasoning)
    assert answer.content_start == 8
    await soon(thinker.prompt(CAPITAL))


# --- on_message ---------------------------------------------------------------------------------


async def test_the_function_hears_of_each_message_that_enters(tinychat: Model) -> None:
    heard: list[Message] = []
    async with tinychat.chat(system_prompt=SYSTEM, on_message=heard.append) as session:
        await soon(session.prompt(HELLO))
        assert tuple(heard) == session.history[1:]
        await soon(session.prompt(NAME, record=False))
        await soon(session.complete("What", max_tokens=1))
        await soon(session.rewind())
        assert len(heard) == 2
        own: list[Message] = []
        await soon(session.prompt(CAPITAL, on_message=own.append))
        assert (len(heard), len(own)) == (2, 2)


async def test_what_the_function_raises_fails_nothing(session: ChatSession) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    def failing(message: Message) -> None:
        raise ZeroDivisionError

    await soon(session.prompt(HELLO, on_message=failing))
    assert len(session.history) == 3
    assert [type(complaint["exception"]) for complaint in complaints] == [ZeroDivisionError] * 2


# --- editing ------------------------------------------------------------------------------------


@pytest.fixture
async def talk(session: ChatSession) -> ChatSession:
    """A session after three turns."""
    for text in (HELLO, CAPITAL, NAME):
        await soon(session.prompt(text))
    return session


async def test_rewinding_takes_turns_back_and_returns_them(talk: ChatSession) -> None:
    before = talk.history
    assert await talk.rewind(2) == before[3:]
    assert talk.history == before[:3]
    assert await talk.rewind(0) == ()
    assert await talk.rewind() == before[1:3]
    with pytest.raises(ValueError, match="the history has 0 turns"):
        await talk.rewind()


async def test_deleting_from_a_message_takes_all_after_it(talk: ChatSession) -> None:
    before = talk.history
    assert await talk.delete_from(4) == before[4:]
    with pytest.raises(ValueError, match="the history has 4 messages"):
        await talk.delete_from(5)
    assert await talk.delete_from(4) == ()
    assert await talk.delete_from(0) == before[:4]
    assert talk.history == ()


async def test_resetting_keeps_the_system_prompt(talk: ChatSession) -> None:
    await talk.reset()
    assert said(talk) == [SYSTEM]
    assert "Ada" not in (await soon(talk.prompt(NAME))).content


async def test_a_history_can_be_replaced(talk: ChatSession) -> None:
    await talk.set_history(
        [
            {"role": "user", "content": "Hi, my name is Bob."},
            {"role": "assistant", "content": "Nice to meet you, Bob!"},
        ]
    )
    assert "Bob" in (await soon(talk.prompt(NAME))).content
    with pytest.raises(TypeError, match=r"history\[0\]"):
        await talk.set_history([3])  # type: ignore[list-item]
    assert len(talk.history) == 4


async def test_after_rewinding_what_stays_is_still_cached(talk: ChatSession) -> None:
    await talk.rewind()
    stats = (await soon(talk.prompt(NAME))).stats
    assert stats.cached_tokens == stats.prompt_tokens - 1


async def test_a_fork_goes_its_own_way(talk: ChatSession, tinychat: Model) -> None:
    async with await talk.fork() as fork:
        assert fork.history == talk.history
        result = await soon(fork.prompt(NAME))
        assert "Ada" in result.content
        assert result.stats.cached_tokens > result.stats.prompt_tokens / 2
        assert len(fork.history) == len(talk.history) + 2
        await talk.reset()
        assert "Ada" in (await soon(fork.prompt(NAME))).content


async def test_a_fork_has_the_settings(tinychat: Model) -> None:
    heard: list[Message] = []
    async with tinychat.chat(max_tokens=2, on_message=heard.append) as session:
        async with await session.fork() as fork:
            assert len((await soon(fork.prompt(CAPITAL))).tokens) == 2
        assert len(heard) == 2


async def test_a_fork_waits_for_the_prompts_before_it(session: ChatSession, gate: Gate) -> None:
    prediction = session.prompt(HELLO, logits_processor=gate)
    fork = await waiting(session.fork())
    gate.open()
    async with await soon(fork) as other:
        assert prediction.done
        assert other.history == session.history


async def test_the_revision_grows_with_every_change(session: ChatSession) -> None:
    seen = [session.revision]
    for work in (session.prompt(HELLO).result, session.rewind, session.reset):
        await soon(work())
        seen.append(session.revision)
    assert seen == sorted(set(seen))


# --- shifting -----------------------------------------------------------------------------------

N_TURNS = 30
LONG = "What is 2+3? " * 8
"""Fits into the small context, but not with everything before it."""


@pytest.fixture
async def small(tinychat: Model) -> AsyncIterator[llamactor.Context]:
    """A context that five or six turns fill."""
    async with tinychat.create_context(context_size=160, sequences=2, threads=1) as context:
        yield context


@pytest.mark.parametrize("overflow", [None, "truncate_middle", "rolling_window", "erase_oldest"])
async def test_a_long_talk_goes_on_in_a_small_context(
    tinychat: Model, small: llamactor.Context, overflow: Any
) -> None:
    shifts = 0
    async with tinychat.chat(context=small, system_prompt=SYSTEM, overflow=overflow) as session:
        for i in range(N_TURNS):
            result = await soon(session.prompt(f"What is {i % 5}+3?", max_tokens=20))
            assert result.stats.prompt_tokens < small.context_size
            assert session.context_window[0] == SystemMessage(SYSTEM)
            shifts += result.context_shift is not None
        assert len(session.history) == 1 + 2 * N_TURNS
        assert session.context_window[-2:] == session.history[-2:]
        assert len(session.context_window) < 20
    assert 1 <= shifts < N_TURNS / 2


async def test_a_shift_is_an_event_and_in_the_result(
    tinychat: Model, small: llamactor.Context
) -> None:
    async with tinychat.chat(context=small, system_prompt=SYSTEM) as session:
        for _ in range(N_TURNS):
            prediction = session.prompt(CAPITAL, max_tokens=10)
            events = [event async for event in prediction.events()]
            shift = (await prediction).context_shift
            dropped = [event.dropped for event in events if isinstance(event, ContextShifted)]
            assert sum(dropped) == (0 if shift is None else shift.dropped)
            if dropped:
                return
    pytest.fail("nothing was ever dropped")


async def test_after_a_shift_the_next_turn_evaluates_only_what_is_new(
    tinychat: Model, small: llamactor.Context
) -> None:
    async with tinychat.chat(context=small, system_prompt=SYSTEM) as session:
        shifted = False
        for _ in range(N_TURNS):
            result = await soon(session.prompt(CAPITAL, max_tokens=10))
            stats = result.stats
            if shifted:
                assert stats.prompt_tokens - stats.cached_tokens < 30
                assert result.context_shift is None
                return
            shifted = result.context_shift is not None
    pytest.fail("nothing was ever dropped")


async def test_rewinding_into_a_shift_gives_the_window_up(
    tinychat: Model, small: llamactor.Context
) -> None:
    async with tinychat.chat(context=small, system_prompt=SYSTEM) as session:
        while session.context_window == session.history:
            await soon(session.prompt(CAPITAL, max_tokens=10))
        await session.rewind(len(session.history) // 2 - 2)
        assert session.context_window == session.history
        await soon(session.prompt(CAPITAL, max_tokens=10))


async def test_a_failed_turn_shifts_nothing(tinychat: Model, small: llamactor.Context) -> None:
    async with tinychat.chat(context=small, system_prompt=SYSTEM) as session:
        for text in (HELLO, CAPITAL, NAME):
            await soon(session.prompt(text, max_tokens=10))
        before = session.context_window
        with pytest.raises(ZeroDivisionError):
            await soon(session.prompt(LONG, logits_processor=broken))
        assert session.context_window == before == session.history


async def test_an_unrecorded_turn_shifts_nothing(tinychat: Model, small: llamactor.Context) -> None:
    async with tinychat.chat(context=small, system_prompt=SYSTEM) as session:
        for text in (HELLO, CAPITAL, NAME):
            await soon(session.prompt(text, max_tokens=10))
        before = session.context_window
        result = await soon(session.prompt(LONG, record=False, max_tokens=10))
        assert result.context_shift is not None
        assert session.context_window == before == session.history


async def test_a_strategy_may_ask_the_model(tinychat: Model, small: llamactor.Context) -> None:
    asked: list[str] = []

    async def summarise(request: ShiftRequest) -> ShiftResult:
        asked.append((await tinychat.respond(CAPITAL)).content)
        return ShiftResult((SystemMessage("It was about sums."), request.messages[-1]))

    async with tinychat.chat(context=small, overflow=summarise) as session:
        while not asked:
            await soon(session.prompt(CAPITAL, max_tokens=10))
        assert session.context_window[0] == SystemMessage("It was about sums.")
        assert session.context_window[-2:] == session.history[-2:]


@pytest.mark.parametrize("use", ["prompt", "fork", "reset"])
async def test_a_strategy_cannot_use_the_session_that_waits_for_it(
    tinychat: Model, small: llamactor.Context, use: str
) -> None:
    async def confused(request: ShiftRequest) -> ShiftResult:
        await (chat.prompt("Sum this up.") if use == "prompt" else getattr(chat, use)())
        return ShiftResult(request.messages[-1:])

    async with tinychat.chat(context=small, overflow=confused) as chat:
        with pytest.warns(RuntimeWarning, match="cannot use the session that waits for it"):
            await soon(chat.prompt(LONG * 3, max_tokens=10))
        assert len(chat.history) == 2


# --- answering without a session ----------------------------------------------------------------


async def test_a_model_answers_a_text_or_messages(tinychat: Model) -> None:
    assert "Paris" in (await soon(tinychat.respond(CAPITAL))).content
    hello = {"role": "user", "content": HELLO}
    history: list[MessageLike] = [
        hello,
        AssistantMessage("Nice to meet you, Ada!"),
        UserMessage(NAME),
    ]
    first = await soon(tinychat.respond(history))
    assert "Ada" in first.content
    again = await soon(tinychat.respond(history))
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1


async def test_without_a_session_nothing_is_dropped_unless_asked(tinychat: Model) -> None:
    long: list[Message] = [UserMessage(CAPITAL), AssistantMessage("It is Paris.")] * 100
    long.append(UserMessage(CAPITAL))
    with pytest.raises(ContextOverflowError):
        await soon(tinychat.respond(long))
    result = await soon(tinychat.respond(long, overflow="rolling_window"))
    assert result.context_shift is not None
    assert "Paris" in result.content


async def test_there_must_be_something_to_answer(tinychat: Model) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        _ = tinychat.respond([])
    with pytest.raises(TypeError, match=r"messages\[0\]"):
        _ = tinychat.respond([1])  # type: ignore[list-item]
    async with tinychat.create_context(context_size=64, sequences=1, threads=1):
        await tinychat.aclose()
    with pytest.raises(ClosedError):
        _ = tinychat.respond("Hi")
