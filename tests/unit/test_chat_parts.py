"""The pure parts of a session: the line it serves callers in, its history, the tokens of a text."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamactor import AssistantMessage, Message, SystemMessage, UserMessage
from llamactor.chat.history import History, leading_system
from llamactor.chat.line import Line
from llamactor.chat.shift import Window
from llamactor.chat.turn import cut_tokens
from tests.contexts import waiting

if TYPE_CHECKING:
    import llamactor

# --- the line -----------------------------------------------------------------------------------


async def test_callers_are_served_one_at_a_time_in_the_order_of_their_calls() -> None:
    line, served, inside = Line(), list[int](), 0

    async def call(number: int) -> None:
        nonlocal inside
        async with places[number]:
            inside += 1
            assert inside == 1
            served.append(number)
            await asyncio.sleep(0)
            inside -= 1

    places = [line.join() for _ in range(5)]
    await asyncio.gather(*(call(number) for number in (3, 0, 4, 2, 1)))
    assert served == [0, 1, 2, 3, 4]


async def test_who_is_alone_does_not_wait() -> None:
    line = Line()
    for _ in range(3):
        async with line.join():
            pass


async def test_cancelling_a_waiter_leaves_the_line() -> None:
    line = Line()
    first, second, third = line.join(), line.join(), line.join()
    task = await waiting(second.__aenter__())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    first.leave()
    async with third:
        pass


async def test_leaving_twice_serves_nobody_twice() -> None:
    line = Line()
    first, second, third = line.join(), line.join(), line.join()
    first.leave()
    first.leave()
    await second.reached()
    task = await waiting(third.reached())
    assert not task.done()
    second.leave()
    await task


async def test_a_failure_inside_lets_the_next_one_in() -> None:
    line = Line()
    with pytest.raises(ZeroDivisionError):
        async with line.join():
            raise ZeroDivisionError
    async with line.join():
        pass


# --- the history --------------------------------------------------------------------------------

KINDS = st.sampled_from([SystemMessage, UserMessage, AssistantMessage])
MESSAGES: st.SearchStrategy[Message] = st.builds(lambda kind, text: kind(text), KINDS, st.text())
SOME = st.lists(MESSAGES, max_size=6).map(tuple)


def windowed(messages: tuple[Message, ...], window: tuple[Message, ...], covers: int) -> History:
    return History(messages, Window(window, covers, 512))


@given(SOME, SOME)
def test_without_a_window_everything_is_shown(
    one: tuple[Message, ...], more: tuple[Message, ...]
) -> None:
    history = History(one).added(*more)
    assert history.shown == history.messages == one + more


@given(SOME, SOME, SOME)
def test_what_is_added_is_shown_after_the_window(
    one: tuple[Message, ...], window: tuple[Message, ...], more: tuple[Message, ...]
) -> None:
    history = windowed(one, window, len(one)).added(*more)
    assert history.shown == window + more
    assert history.messages == one + more


@given(SOME, SOME, SOME, st.data())
def test_cutting_keeps_a_window_that_covers_only_what_stays(
    one: tuple[Message, ...],
    window: tuple[Message, ...],
    more: tuple[Message, ...],
    data: st.DataObject,
) -> None:
    history = windowed(one, window, len(one)).added(*more)
    length = data.draw(st.integers(0, len(history.messages)))
    cut = history.cut(length)
    assert cut.messages == history.messages[:length]
    kept = length >= len(one)
    assert cut.shown == (window + more[: length - len(one)] if kept else cut.messages)


@given(SOME)
def test_a_window_of_everything_is_none(messages: tuple[Message, ...]) -> None:
    assert History(messages).shifted(Window(messages, len(messages), 512)).window is None


@given(SOME)
def test_turns_begin_where_the_user_speaks(messages: tuple[Message, ...]) -> None:
    turns = History(messages).turns
    assert [i in turns for i in range(len(messages))] == [
        isinstance(message, UserMessage) for message in messages
    ]


@given(SOME)
def test_leading_system_messages_are_a_beginning(messages: tuple[Message, ...]) -> None:
    head = leading_system(messages)
    assert messages[: len(head)] == head
    assert all(isinstance(message, SystemMessage) for message in head)
    assert len(head) == len(messages) or not isinstance(messages[len(head)], SystemMessage)


# --- the tokens of a text -----------------------------------------------------------------------

TEXTS = ("Hello there!\n\n", "naïve 🦙👩‍👩‍👧 text", "  spaces  ", "a", "", "x = {1: '二'}\n\t ")


@pytest.mark.parametrize("text", TEXTS)
async def test_the_tokens_of_a_beginning_are_those_of_the_whole(
    tinychat: llamactor.Model, text: str
) -> None:
    native = tinychat._native
    tokens = native.tokenize(text, add_bos=False, special=False)
    for length in range(len(text) + 1):
        start = text[:length]
        cut = cut_tokens(native, tokens, start)
        assert cut is not None
        assert native.detokenize(cut, special=False) == start
        shared = [a == b for a, b in zip(cut, tokens, strict=False)]
        # Whole tokens stay; only one that reaches beyond the beginning is written anew.
        whole = next((i for i, same in enumerate(shared) if not same), len(cut))
        assert len(native.detokenize(tokens[: whole + 1], special=False)) >= length


async def test_tokens_without_text_at_the_end_go(tinychat: llamactor.Model) -> None:
    native = tinychat._native
    tokens = native.tokenize("Hi<|im_end|>", add_bos=False, special=True)
    assert tinychat.tokens.eot in tokens or tinychat.tokens.eos in tokens
    assert cut_tokens(native, tokens, "Hi") == tokens[:-1]


async def test_tokens_of_another_text_are_no_help(tinychat: llamactor.Model) -> None:
    native = tinychat._native
    tokens = native.tokenize("Hello", add_bos=False, special=False)
    assert cut_tokens(native, tokens, "Help") is None
