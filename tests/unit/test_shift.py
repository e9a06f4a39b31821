"""What stays in a chat's context, decided from token counts."""

from __future__ import annotations

import asyncio
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llamactor import (
    AssistantMessage,
    ContextOverflowError,
    Message,
    Model,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from llamactor.chat import shift
from llamactor.chat.shift import (
    Chooser,
    Chosen,
    Kept,
    LastMessages,
    MessageSize,
    ModelTexts,
    Role,
    Room,
    ShiftRequest,
    ShiftResult,
    Strategy,
    Window,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

T = TypeVar("T")

DROPPING: list[Strategy] = [
    shift.erase_oldest(),
    shift.truncate_middle(),
    shift.rolling_window(),
    shift.last_messages(5),
]
"""All strategies that make room."""


def named(strategy: Strategy) -> str:
    return strategy.name


# --- a chat whose tokens one can count by eye -----------------------------------------------------

GLUE = 4
"""Tokens round each message: header, role, newline, end."""
TOOLS = 30
"""Tokens of the tools, which stand in front of the first message, whichever that is."""
HEADER = 3
"""Tokens of the answer's header."""

MARKS: dict[Role, int] = {"system": 1, "user": 2, "assistant": 3, "tool": 4}


@dataclass
class Rendering:
    tokens: list[int]
    ends: list[int]


class Chat:
    """Writes one token per character; what shift.py asks of templates and tokenizers."""

    def __init__(self) -> None:
        self.renderings = 0

    async def render(self, messages: tuple[Message, ...]) -> Rendering:
        self.renderings += 1
        tokens, ends = [5] * TOOLS, []
        for message in messages:
            mark = MARKS[shift.role_of(message)]
            text = [ord(char) for char in message.content]
            calls = getattr(message, "tool_calls", ())
            tokens += [mark, mark, *text, *[6] * 20 * len(calls), 0, 0]
            ends.append(len(tokens))
        return Rendering(tokens + [7] * HEADER, ends)

    async def count(self, text: str) -> int:
        return len(text)

    async def tail(self, text: str, n: int) -> str:
        return text[-n:]


def now(work: Coroutine[Any, Any, T]) -> T:
    """The value of a coroutine that never has to wait."""
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise AssertionError("it waited")


def choose(
    strategy: Strategy | shift.CustomStrategy,
    history: Sequence[Message],
    context_size: int = 512,
    *,
    previous: Window | None = None,
    answer: int | None = None,
) -> Chosen[Rendering]:
    chat = Chat()
    chooser = Chooser(chat.render, chat, context_size)
    return now(chooser.choose(strategy, tuple(history), previous=previous, answer=answer))


def texts_of(chosen: Chosen[Rendering]) -> list[str]:
    return [message.content for message in chosen.window.messages]


def conversation(turns: int, length: int = 30) -> list[Message]:
    """A system prompt and turns of two messages; every text has a letter of its own."""
    messages: list[Message] = [SystemMessage("S" * 40)]
    for i in range(turns):
        letter = chr(ord("a") + i % 26)
        messages += [UserMessage(letter * length), AssistantMessage(letter.upper() * length)]
    return messages


# --- conversations at random ----------------------------------------------------------------------

texts = st.integers(0, 60)


def size(role: Role, text: int, glue: int = GLUE) -> MessageSize:
    return MessageSize(role, text + glue, text)


@st.composite
def a_round(draw: st.DrawFn) -> list[MessageSize]:
    results = draw(st.integers(0, 2))
    return [size("assistant", draw(texts)), *[size("tool", draw(texts)) for _ in range(results)]]


@st.composite
def a_turn(draw: st.DrawFn) -> list[MessageSize]:
    rounds = draw(st.lists(a_round(), max_size=3))
    return [size("user", draw(texts)), *[message for each in rounds for message in each]]


@st.composite
def a_chat(draw: st.DrawFn) -> list[MessageSize]:
    """System prompt or not, a greeting or not, turns with tool calls, perhaps a prompt at last."""
    system = [size("system", draw(texts)) for _ in range(draw(st.integers(0, 2)))]
    greeting = [size("assistant", draw(texts)) for _ in range(draw(st.integers(0, 1)))]
    turns = draw(st.lists(a_turn(), min_size=1, max_size=8))
    messages = [*system, *greeting, *[message for turn in turns for message in turn]]
    return messages + [size("user", draw(texts))] * draw(st.integers(0, 1))


def total(plan: Sequence[Kept], sizes: Sequence[MessageSize], overhead: int) -> int:
    left = [(sizes[kept.index], kept.last) for kept in plan]
    return overhead + sum(s.tokens - (0 if last is None else s.text - last) for s, last in left)


def kept_text(plan: Sequence[Kept], sizes: Sequence[MessageSize]) -> list[int]:
    """Per message, how much of it is left: -1 for nothing, else tokens of text."""
    left = [-1] * len(sizes)
    for kept in plan:
        left[kept.index] = sizes[kept.index].text if kept.last is None else kept.last
    return left


def as_messages(sizes: Sequence[MessageSize]) -> tuple[Message, ...]:
    kinds: dict[Role, type[Message]] = {
        "system": SystemMessage,
        "user": UserMessage,
        "assistant": AssistantMessage,
        "tool": ToolMessage,
    }
    return tuple(kinds[s.role](content=chr(97 + i % 26) * s.text) for i, s in enumerate(sizes))


def question_of(sizes: Sequence[MessageSize], index: int) -> int | None:
    """The user message that a message belongs to."""
    return next((i for i in range(index, -1, -1) if sizes[i].role == "user"), None)


chats = a_chat()
overheads = st.integers(0, 50)
limits = st.integers(1, 900)
strategies = st.sampled_from(DROPPING)


def planned(
    strategy: Strategy, sizes: list[MessageSize], overhead: int, limit: int
) -> tuple[Kept, ...]:
    """The plan for a limit; one below what cannot go is no case of `plan`."""
    assume(limit >= shift.least_tokens(sizes, overhead))
    return strategy.plan(sizes, overhead, Room(limit, limit * 3 // 4))


@given(strategies, chats, overheads, limits)
def test_a_plan_never_exceeds_the_limit(
    strategy: Strategy, sizes: list[MessageSize], overhead: int, limit: int
) -> None:
    assert total(planned(strategy, sizes, overhead, limit), sizes, overhead) <= limit


@given(strategies, chats, overheads, limits)
def test_a_plan_keeps_the_system_prompt_whole_and_everything_in_order(
    strategy: Strategy, sizes: list[MessageSize], overhead: int, limit: int
) -> None:
    plan = planned(strategy, sizes, overhead, limit)
    head = next((i for i, s in enumerate(sizes) if s.role != "system"), len(sizes))
    assert plan[:head] == tuple(Kept(i) for i in range(head))
    indices = [kept.index for kept in plan]
    assert indices == sorted(set(indices))


@given(strategies, chats, overheads, limits)
def test_a_plan_leaves_no_answer_without_its_question_and_no_result_without_its_call(
    strategy: Strategy, sizes: list[MessageSize], overhead: int, limit: int
) -> None:
    left = {kept.index for kept in planned(strategy, sizes, overhead, limit)}
    for i in left:
        question = question_of(sizes, i)
        assert question is None or question in left
        if sizes[i].role == "tool":
            call = max(j for j in range(i) if sizes[j].role == "assistant")
            assert call in left


@given(strategies, chats, overheads, limits)
def test_a_plan_keeps_the_newest_prompt_and_something_of_its_text(
    strategy: Strategy, sizes: list[MessageSize], overhead: int, limit: int
) -> None:
    left = kept_text(planned(strategy, sizes, overhead, limit), sizes)
    newest = question_of(sizes, len(sizes) - 1)
    assert newest is not None
    assert left[newest] >= min(sizes[newest].text, shift.LEAST_TEXT)
    assert left[-1] >= 0


@given(strategies, chats, overheads, limits)
def test_whole_turns_or_none_but_for_the_newest(
    strategy: Strategy, sizes: list[MessageSize], overhead: int, limit: int
) -> None:
    left = {kept.index for kept in planned(strategy, sizes, overhead, limit)}
    newest = question_of(sizes, len(sizes) - 1)
    assert newest is not None
    for i in range(newest):
        question = question_of(sizes, i)
        assert question is None or (i in left) == (question in left)


@given(strategies, chats, overheads, limits, st.integers(0, 300))
def test_a_higher_limit_never_keeps_less(
    strategy: Strategy, sizes: list[MessageSize], overhead: int, limit: int, more: int
) -> None:
    lower = kept_text(planned(strategy, sizes, overhead, limit), sizes)
    higher = kept_text(planned(strategy, sizes, overhead, limit + more), sizes)
    assert all(a <= b for a, b in zip(lower, higher, strict=True))


@given(strategies, chats, overheads)
def test_nothing_goes_where_everything_fits(
    strategy: Strategy, sizes: list[MessageSize], overhead: int
) -> None:
    everything = overhead + sum(s.tokens for s in sizes)
    plan = strategy.plan(sizes, overhead, Room(everything, everything))
    assert plan == tuple(Kept(i) for i in range(len(sizes)))


@given(chats, overheads, limits)
def test_erase_oldest_takes_nothing_newer_before_all_that_is_older(
    sizes: list[MessageSize], overhead: int, limit: int
) -> None:
    plan = planned(shift.erase_oldest(), sizes, overhead, limit)
    head = sum(s.role == "system" for s in sizes)
    newest = question_of(sizes, len(sizes) - 1)
    assert newest is not None
    older = [kept for kept in plan[head:] if kept.index < newest]
    assert [kept.index for kept in older] == list(range(newest - len(older), newest))
    cut = [kept.last is not None for kept in older if sizes[kept.index].text > shift.LEAST_TEXT]
    assert cut == sorted(cut, reverse=True)


@given(chats, overheads, limits)
def test_truncate_middle_keeps_the_first_turn_while_only_the_middle_has_to_go(
    sizes: list[MessageSize], overhead: int, limit: int
) -> None:
    plan = planned(shift.truncate_middle(), sizes, overhead, limit)
    head = sum(s.role == "system" for s in sizes)
    first, *others = shift._parts([s.role for s in sizes], head, "user")
    pinned = overhead + sum(sizes[i].tokens for i in [*range(head), *first])
    if others and pinned + sum(sizes[i].tokens for i in others[-1]) <= limit:
        assert plan[head : head + len(first)] == tuple(Kept(i) for i in first)


@given(chats, overheads, limits)
def test_a_rolling_window_holds_at_least_what_erase_oldest_leaves(
    sizes: list[MessageSize], overhead: int, limit: int
) -> None:
    erased = kept_text(planned(shift.erase_oldest(), sizes, overhead, limit), sizes)
    rolled = kept_text(planned(shift.rolling_window(), sizes, overhead, limit), sizes)
    assert all(a <= b for a, b in zip(erased, rolled, strict=True))


@given(chats, overheads)
def test_what_cannot_go_is_exactly_what_is_left_at_the_lowest_limit(
    sizes: list[MessageSize], overhead: int
) -> None:
    least = shift.least_tokens(sizes, overhead)
    for strategy in DROPPING:
        plan = strategy.plan(sizes, overhead, Room(least, least))
        assert total(plan, sizes, overhead) <= least


# --- room -----------------------------------------------------------------------------------------


@given(st.integers(4, 5000), st.one_of(st.none(), st.integers(0, 9000)), st.integers(0, 300))
def test_room_grows_with_the_context_and_always_leaves_a_token_for_the_answer(
    context_size: int, answer: int | None, more: int
) -> None:
    room = Room.within(context_size, answer)
    wider = Room.within(context_size + more, answer)
    assert context_size // 2 <= room.limit < context_size
    assert room.limit <= wider.limit
    assert room.target <= wider.target


def test_an_answer_gets_what_it_wants_up_to_a_quarter_of_the_context() -> None:
    assert Room.within(512, 20).limit == 492
    assert Room.within(512, 400).limit == 384
    assert Room.within(512, None).limit == 448
    assert Room.within(512, 400, least=500).limit == 500


def test_without_room_for_an_answer_the_error_says_the_numbers_and_what_would_work() -> None:
    with pytest.raises(ContextOverflowError, match="take 512 tokens, and the context has 512") as e:
        Room.within(512, 20, least=512)
    assert "larger context_size" in str(e.value)


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", DROPPING, ids=named)
@given(chats, st.integers(60, 700), st.one_of(st.none(), st.integers(1, 300)))
def test_a_chosen_window_fits_with_tools_that_move_and_ends_after_few_renderings(
    strategy: Strategy, sizes: list[MessageSize], context_size: int, answer: int | None
) -> None:
    chat = Chat()
    chooser = Chooser(chat.render, chat, context_size)
    history = as_messages(sizes)
    try:
        chosen = now(chooser.choose(strategy, history, answer=answer))
    except ContextOverflowError:
        assert shift.least_tokens(sizes, TOOLS + HEADER) >= context_size
        return
    finally:
        assert chat.renderings <= 1 + shift.MAX_PLANS
    assert len(chosen.rendered.tokens) < context_size
    again = now(chooser.choose(strategy, history, previous=chosen.window, answer=answer))
    assert again.window.messages == chosen.window.messages


@pytest.mark.parametrize("strategy", DROPPING, ids=named)
@given(st.lists(a_turn(), min_size=3, max_size=25), st.integers(0, 40))
def test_turn_by_turn_no_window_exceeds_the_context(
    strategy: Strategy, turns: list[list[MessageSize]], system: int
) -> None:
    history: tuple[Message, ...] = (SystemMessage("S" * system),)
    window = None
    for turn in turns:
        prompt, *answers = as_messages(turn)
        history = (*history, prompt)
        chosen = choose(strategy, history, 256, previous=window, answer=30)
        assert len(chosen.rendered.tokens) < 256
        assert chosen.window.messages[0] == history[0]
        assert chosen.window.messages[-1].content == prompt.content
        window, history = chosen.window, (*history, *answers)


def shifts_over(strategy: Strategy, turns: int, context_size: int = 1024) -> list[int]:
    """Which turns of a long chat shift."""
    history, window, shifted = conversation(0), None, []
    for i in range(turns):
        history += [UserMessage("u" * 30)]
        chosen = choose(strategy, history, context_size, previous=window, answer=60)
        if chosen.dropped:
            shifted.append(i)
        window = chosen.window
        history += [AssistantMessage("v" * 30)]
    return shifted


@pytest.mark.parametrize("strategy", DROPPING[:3], ids=named)
def test_after_a_shift_the_next_turns_need_none(strategy: Strategy) -> None:
    shifted = shifts_over(strategy, 60)
    gaps = [b - a for a, b in pairwise(shifted)]
    assert len(shifted) > 5
    assert min(gaps) >= 3


def test_between_shifts_a_prompt_begins_with_the_one_before() -> None:
    history, window, before = conversation(12), None, [0]
    for i in range(20):
        history += [UserMessage(f"question {i}")]
        chosen = choose(shift.erase_oldest(), history, 512, previous=window)
        tokens = chosen.rendered.tokens[:-HEADER]
        if not chosen.dropped and window is not None:
            assert tokens[: len(before)] == before
        window, before = chosen.window, tokens
        history += [AssistantMessage(f"answer {i}")]


def test_the_oldest_turns_go_whole_down_to_three_quarters_of_the_room() -> None:
    history: list[Message] = [*conversation(10), UserMessage("now")]
    chosen = choose(shift.erase_oldest(), history, 512, answer=12)
    assert len(chosen.rendered.tokens) <= 375
    assert texts_of(chosen)[0] == "S" * 40
    assert texts_of(chosen)[1:3] == ["g" * 30, "G" * 30]
    assert texts_of(chosen)[-1] == "now"
    assert chosen.dropped == 6 * 2 * 34


def test_the_turn_before_the_newest_is_cut_rather_than_dropped() -> None:
    story: list[Message] = [
        UserMessage("Tell me a story."),
        AssistantMessage("b" * 400 + "the end."),
    ]
    history: list[Message] = [*conversation(2), *story, UserMessage("Go on.")]
    chosen = choose(shift.erase_oldest(), history, 512, answer=12)
    assert texts_of(chosen)[:2] == ["S" * 40, "Tell me a story."]
    assert texts_of(chosen)[2].endswith("bbb" + "the end.")
    assert len(chosen.rendered.tokens) == 375


def test_truncate_middle_keeps_the_first_turn() -> None:
    history: list[Message] = [*conversation(10), UserMessage("now")]
    chosen = choose(shift.truncate_middle(), history, 512, answer=12)
    assert texts_of(chosen)[:4] == ["S" * 40, "a" * 30, "A" * 30, "h" * 30]


def test_a_rolling_window_cuts_the_oldest_turn_that_is_left() -> None:
    history: list[Message] = [*conversation(10, length=50), UserMessage("now")]
    chosen = choose(shift.rolling_window(), history, 512, answer=12)
    assert len(chosen.rendered.tokens) == 375
    assert texts_of(chosen)[1:3] == ["h" * 32, "H" * 35]


def test_the_last_messages_begin_with_a_user_s() -> None:
    history: list[Message] = [*conversation(10), UserMessage("now")]
    chosen = choose(shift.last_messages(4), history, 4096)
    assert texts_of(chosen) == ["S" * 40, "j" * 30, "J" * 30, "now"]
    assert texts_of(choose(shift.last_messages(99), history, 4096)) == [m.content for m in history]
    assert texts_of(choose(shift.last_messages(1), history, 4096)) == ["S" * 40, "now"]


def test_the_last_messages_hold_the_newest_turn_whole() -> None:
    calls = AssistantMessage(tool_calls=(ToolCall("1", "add"),))
    turn: list[Message] = [UserMessage("now"), calls, ToolMessage("3"), calls, ToolMessage("7")]
    chosen = choose(shift.last_messages(2), [*conversation(3), *turn], 4096)
    assert chosen.window.messages == (SystemMessage("S" * 40), *turn)


def test_a_long_loop_of_tools_loses_its_oldest_rounds_but_not_its_question() -> None:
    calls = [AssistantMessage(tool_calls=(ToolCall(str(i), "add"),)) for i in range(20)]
    rounds: list[Message] = [
        m for i, call in enumerate(calls) for m in (call, ToolMessage(f"result {i}" * 3))
    ]
    chosen = choose(shift.erase_oldest(), [SystemMessage("S"), UserMessage("add"), *rounds], 512)
    kept = chosen.window.messages
    assert kept[:2] == (SystemMessage("S"), UserMessage("add"))
    assert kept[2:] == tuple(rounds[-len(kept[2:]) :])
    assert len(kept) > 4


def test_a_huge_tool_result_is_cut_rather_than_the_question() -> None:
    call = AssistantMessage(tool_calls=(ToolCall("1", "read"),))
    history: list[Message] = [
        UserMessage("read it"),
        call,
        ToolMessage("x" * 5000 + "the end", "1", "read"),
    ]
    chosen = choose(shift.erase_oldest(), history, 512)
    assert len(chosen.rendered.tokens) == 448
    assert chosen.window.messages[:2] == (UserMessage("read it"), call)
    assert chosen.window.messages[2].content.endswith("xxx" + "the end")
    assert chosen.window.messages[2] == ToolMessage(texts_of(chosen)[2], "1", "read")


def test_a_prompt_longer_than_the_context_keeps_its_end() -> None:
    history: list[Message] = [*conversation(3), UserMessage("y" * 9000 + "?")]
    chosen = choose(shift.erase_oldest(), history, 512, answer=12)
    assert len(chosen.rendered.tokens) == 500
    assert texts_of(chosen)[0] == "S" * 40
    assert texts_of(chosen)[1].endswith("y?")


def test_an_answer_that_was_cut_forgets_its_tokens() -> None:
    answer = AssistantMessage("z" * 900, tokens=tuple(range(900)), content_start=1)
    history: list[Message] = [
        UserMessage("go on"),
        AssistantMessage("z" * 900),
        UserMessage("more"),
        answer,
    ]
    chosen = choose(shift.erase_oldest(), history, 512)
    cut = chosen.window.messages[-1]
    assert isinstance(cut, AssistantMessage)
    assert (cut.tokens, cut.content_start) == (None, 0)


def test_a_system_prompt_that_fills_the_context_is_an_error_and_not_a_loop() -> None:
    history: list[Message] = [SystemMessage("S" * 600), UserMessage("hi")]
    for strategy in DROPPING:
        with pytest.raises(ContextOverflowError, match=r"take \d+ tokens, and the context has 512"):
            choose(strategy, history, 512)


def test_an_answer_gets_less_room_before_a_prompt_is_refused() -> None:
    history: list[Message] = [SystemMessage("S" * 440), UserMessage("what is the name of this?")]
    chosen = choose(shift.erase_oldest(), history, 512, answer=100)
    assert texts_of(chosen) == ["S" * 440, "what is the name of this?"]
    assert len(chosen.rendered.tokens) == 506


def test_stop_at_limit_drops_nothing() -> None:
    history: list[Message] = [*conversation(5), UserMessage("u" * 10)]
    size = len(now(Chat().render(tuple(history))).tokens)
    chosen = choose(shift.stop_at_limit(), history, size + 1, answer=100)
    assert (chosen.window.messages, chosen.dropped) == (tuple(history), 0)
    with pytest.raises(ContextOverflowError, match=f"has {size} tokens and at most {size - 1} fit"):
        choose(shift.stop_at_limit(), history, size, answer=100)


def test_in_a_larger_context_everything_comes_back() -> None:
    history: list[Message] = [*conversation(10), UserMessage("now")]
    small = choose(shift.erase_oldest(), history, 512)
    large = choose(shift.erase_oldest(), history, 4096, previous=small.window)
    assert large.window.messages == tuple(history)


def test_a_window_of_a_history_that_has_become_shorter_counts_for_nothing() -> None:
    history = conversation(10)
    window = choose(shift.erase_oldest(), [*history, UserMessage("now")], 512).window
    chosen = choose(shift.erase_oldest(), history[:3], 512, previous=window)
    assert chosen.window.messages == tuple(history[:3])


def test_a_history_without_any_turn_is_rendered_as_it_is() -> None:
    assert choose(shift.erase_oldest(), [SystemMessage("S")]).window.covers == 1
    assert choose(shift.last_messages(2), [SystemMessage("S")]).window.covers == 1
    assert choose(shift.erase_oldest(), []).window.messages == ()


# --- strategies of the user's own -----------------------------------------------------------------


LONG = [*conversation(10), UserMessage("now")]


async def test_a_custom_strategy_gets_the_true_limit_and_an_exact_count() -> None:
    seen: list[ShiftRequest] = []

    async def summarise(request: ShiftRequest) -> ShiftResult:
        seen.append(request)
        kept = (request.messages[0], UserMessage("in short: a to j"), request.messages[-1])
        assert await request.count(kept) <= request.limit
        return ShiftResult(kept)

    chosen = choose(summarise, LONG, 512, answer=12)
    assert texts_of(chosen) == ["S" * 40, "in short: a to j", "now"]
    (request,) = seen
    assert (request.limit, request.target) == (500, 375)
    assert request.messages == request.history == tuple(LONG)
    assert request.sizes[1:] == (*[34] * 20, 7)
    assert request.sizes[0] == TOOLS + 44  # what stands in front of the first message counts to it
    assert request.overhead == HEADER
    assert await request.count(request.messages) == sum(request.sizes) + request.overhead
    assert await request.texts.tail("abc", 2) == "bc"


def test_a_summary_stays_in_the_window_until_the_next_shift() -> None:
    async def summarise(request: ShiftRequest) -> ShiftResult:
        return ShiftResult((request.messages[0], UserMessage("in short"), request.messages[-1]))

    first = choose(summarise, LONG, 512)
    later = [*LONG, AssistantMessage("fine"), UserMessage("and then?")]
    second = choose(summarise, later, 512, previous=first.window)
    assert texts_of(second) == ["S" * 40, "in short", "now", "fine", "and then?"]
    assert second.dropped == 0


def test_a_custom_strategy_may_answer_with_dicts_or_ask_one_of_ours() -> None:
    async def ours(request: ShiftRequest) -> ShiftResult:
        return await shift.truncate_middle()(request)

    assert texts_of(choose(ours, LONG)) == texts_of(choose(shift.truncate_middle(), LONG))

    async def dicts(request: ShiftRequest) -> ShiftResult:
        return ShiftResult([{"role": "user", "content": "all"}])  # type: ignore[arg-type]

    assert texts_of(choose(dicts, LONG)) == ["all"]


async def keeps_everything(request: ShiftRequest) -> ShiftResult:
    return ShiftResult(request.messages)


async def raises(request: ShiftRequest) -> ShiftResult:
    raise ZeroDivisionError("no idea")


async def returns_a_list(request: ShiftRequest) -> ShiftResult:
    return list(request.messages)  # type: ignore[return-value]


async def drops_the_prompt(request: ShiftRequest) -> ShiftResult:
    return ShiftResult(request.messages[:3])


def is_not_async(request: ShiftRequest) -> Any:
    return ShiftResult(request.messages[-1:])


@pytest.mark.parametrize(
    ("strategy", "complaint"),
    [
        (keeps_everything, "keeps_everything left 764 tokens where 448 fit"),
        (raises, "raises failed with ZeroDivisionError: no idea"),
        (returns_a_list, "returns_a_list failed with TypeError: it returned a list"),
        (drops_the_prompt, "the newest message, of the user, must stay the last"),
        (is_not_async, "is_not_async failed with TypeError"),
    ],
)
def test_a_custom_strategy_that_fails_is_named_and_replaced(
    strategy: shift.CustomStrategy, complaint: str
) -> None:
    with pytest.warns(RuntimeWarning, match=complaint) as warned:
        chosen = choose(strategy, LONG)
    assert "erase_oldest was used instead" in str(warned[0].message)
    assert texts_of(chosen) == texts_of(choose(shift.erase_oldest(), LONG))


def test_a_custom_strategy_is_not_asked_while_everything_fits() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(raises, LONG, 4096).window.messages == tuple(LONG)


async def test_cancelling_a_custom_strategy_is_no_failure_of_it() -> None:
    chat, entered = Chat(), asyncio.Event()

    async def ponders(request: ShiftRequest) -> ShiftResult:
        entered.set()
        await asyncio.get_running_loop().create_future()
        return ShiftResult(request.messages)

    chooser = Chooser(chat.render, chat, 512)
    task = asyncio.create_task(chooser.choose(ponders, tuple(LONG)))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_an_overflow_is_a_name_a_strategy_or_an_async_function() -> None:
    assert shift.check_overflow(None) == shift.erase_oldest()
    assert shift.check_overflow("rolling_window") == shift.rolling_window()
    assert shift.check_overflow(shift.last_messages(3)) == LastMessages(3)
    assert shift.check_overflow(raises) is raises
    with pytest.raises(ValueError, match="'stop_at_limit'"):
        shift.check_overflow("stop")
    for wrong in (3, ShiftResult, b"rolling_window"):
        with pytest.raises(TypeError, match="overflow must be"):
            shift.check_overflow(wrong)
    with pytest.raises(ValueError, match="at least 1"):
        shift.last_messages(0)


def test_while_an_answer_is_written_the_core_does_the_nearest_thing() -> None:
    native = [shift.native_overflow(strategy) for strategy in DROPPING]
    assert native == ["rolling_window", "truncate_middle", "rolling_window", "rolling_window"]
    assert shift.native_overflow(shift.stop_at_limit()) == "stop_at_limit"
    assert shift.native_overflow(raises) == "rolling_window"


# --- texts of a real model ------------------------------------------------------------------------


async def test_a_model_cuts_texts_at_whole_characters(tiny_model: Model) -> None:
    native_texts = ModelTexts(tiny_model._native)
    text = "the old boat 😀 came — home, привет 日本語"
    count = await native_texts.count(text)
    assert count == tiny_model.count_tokens(text)
    for n in range(1, count + 1):
        tail = await native_texts.tail(text, n)
        assert text.endswith(tail)
        assert tiny_model.count_tokens(tail) <= n
    assert await native_texts.tail(text, count) == text


async def test_a_long_text_is_cut_off_the_loop(tiny_model: Model) -> None:
    native_texts = ModelTexts(tiny_model._native)
    text = "one two three " * 20_000
    tail = await native_texts.tail(text, 500)
    assert text.endswith(tail)
    assert 490 <= await native_texts.count(tail) <= 500


# --- cells ----------------------------------------------------------------------------------------


def without(cells: Sequence[int], ranges: Sequence[tuple[int, int]]) -> list[int]:
    gone = {i for start, end in ranges for i in range(start, end)}
    return [cell for i, cell in enumerate(cells) if i not in gone]


@given(
    st.lists(st.integers(0, 3), max_size=200),
    st.lists(st.integers(0, 3), max_size=200),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=3),
)
def test_erasing_ranges_never_shortens_the_common_prefix(
    cells: list[int], tail: list[int], gaps: list[tuple[int, int]]
) -> None:
    wanted = without(cells, gaps) + tail
    ranges = shift.erased_ranges(cells, wanted)
    assert all(start < end <= len(cells) for start, end in ranges)
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))
    before = shift.common_prefix(cells, wanted)
    after = shift.common_prefix(without(cells, ranges), wanted)
    assert after >= before + shift.LEAST_MOVED * len(ranges)


@given(st.data())
def test_a_pure_removal_leaves_only_what_is_new_to_evaluate(data: st.DataObject) -> None:
    cells = data.draw(st.permutations(range(150)))
    start = data.draw(st.integers(0, 60))
    end = data.draw(st.integers(start + 1, 120))
    wanted = [*cells[:start], *cells[end:], *range(200, 210)]
    assert shift.erased_ranges(cells, wanted) == [(start, end)]


@given(st.lists(st.integers(0, 5), max_size=80), st.lists(st.integers(0, 5), max_size=80))
def test_the_common_prefix_is_what_a_loop_finds(one: list[int], other: list[int]) -> None:
    pairs = zip(one, other, strict=False)
    expected = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    assert shift.common_prefix(one, other) == expected


def test_a_shift_of_whole_turns_is_one_range() -> None:
    history: list[Message] = [*conversation(10), UserMessage("now")]
    old = choose(shift.erase_oldest(), history, 4096)
    new = choose(shift.erase_oldest(), history, 512, answer=12)
    ranges = shift.erased_ranges(old.rendered.tokens, new.rendered.tokens)
    assert len(ranges) == 1
    assert ranges[0][1] - ranges[0][0] == new.dropped
    assert without(old.rendered.tokens, ranges) == new.rendered.tokens


def test_what_stands_in_the_gap_cannot_be_moved_round() -> None:
    cells, wanted = list(range(100)), [*range(20), 500, 501, *range(60, 100)]
    assert shift.erased_ranges(cells, wanted) == []
