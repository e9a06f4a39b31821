"""Chats that outgrow their context, with every strategy and every kind of memory."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor import (
    AssistantMessage,
    ChatSession,
    Context,
    ContextOverflowError,
    ContextShifted,
    Model,
    PredictionResult,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
    context_shift,
)
from llamactor.chat.shift import Room
from llamactor.context_shift import ShiftRequest, ShiftResult
from tests.contexts import soon
from tests.models import (
    tiny_hybrid,
    tiny_llama,
    tiny_recurrent,
    tiny_sliding_window,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

SIZE = 512
"""Tokens of the context of these chats."""

SYSTEM = "You are a helpful assistant."

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
]

A_ROUND = (
    UserMessage("What is 2+3?"),
    AssistantMessage(tool_calls=(ToolCall("1", "add", {"a": 2, "b": 3}),)),
    ToolMessage("5", "1", "add"),
    AssistantMessage("2+3 is 5."),
)
"""A turn with a call of a tool, as a loop of tools would leave it."""

WORDS = ("the", "old", "boat", "came", "home", "and", "nobody", "had", "thought", "to", "wait")


async def in_short(request: ShiftRequest) -> ShiftResult:
    """A strategy of somebody's own: a summary and what was said last."""
    messages = request.messages
    return ShiftResult((messages[0], UserMessage("We talked about boats."), messages[-1]))


async def gives_up(request: ShiftRequest) -> ShiftResult:
    raise NotImplementedError("this one never works")


DROPPING = [
    pytest.param("erase_oldest", id="erase_oldest"),
    pytest.param("truncate_middle", id="truncate_middle"),
    pytest.param("rolling_window", id="rolling_window"),
    pytest.param(context_shift.last_messages(7), id="last_messages"),
]


@pytest.fixture
async def context(tinychat: Model) -> AsyncIterator[Context]:
    async with tinychat.create_context(context_size=SIZE, sequences=2, threads=1) as context:
        yield context


class Talk:
    """Somebody who says things of random length, tools and answers of random length among them."""

    def __init__(self, session: ChatSession, seed: int) -> None:
        self.session = session
        self.draw = random.Random(seed)
        self.max_tokens = 0
        self.shifts = 0

    def text(self) -> str:
        """Mostly short, now and then longer than the context."""
        most = self.draw.choices([5, 20, 80, 700], [10, 8, 4, 0.3])[0]
        return " ".join(self.draw.choices(WORDS, k=self.draw.randint(1, most)))

    async def turn(self) -> PredictionResult:
        """One turn, and what must hold after any."""
        self.max_tokens = self.draw.choice([1, 3, 8, 20])
        history = len(self.session.history)
        result = await soon(self.session.prompt(self.text(), max_tokens=self.max_tokens))
        self.shifts += result.context_shift is not None
        assert result.stats.prompt_tokens < SIZE
        assert len(self.session.history) == history + 2
        window = self.session.context_window
        assert window[0] == self.session.history[0] == SystemMessage(SYSTEM)
        assert isinstance(window[1], UserMessage)
        return result

    async def turn_or_overflow(self) -> PredictionResult | None:
        """One turn, or None if it does not fit and nothing may go."""
        try:
            return await self.turn()
        except ContextOverflowError:
            return None

    async def turns(self, count: int) -> None:
        """As many turns."""
        for _ in range(count):
            await self.turn()

    async def call_a_tool(self) -> None:
        """Put a turn with a tool call into the history, as if it had been said."""
        system, *said = self.session.history
        await soon(self.session.set_history([system, *said[-20:], *A_ROUND]))


async def system_and_tools_are_in(context: Context, session: ChatSession, model: Model) -> None:
    """Pass if the window is rendered with system prompt and tools, and fits."""
    text = await soon(model.apply_chat_template(session.context_window, tools=TOOLS))
    assert SYSTEM in text
    assert '"add"' in text
    assert context.stats.cells_used <= SIZE


@pytest.mark.slow
@pytest.mark.parametrize("strategy", DROPPING)
async def test_300_turns_in_512_tokens_with_tools(
    tinychat: Model, context: Context, strategy: Any
) -> None:
    async with ChatSession(
        context, system_prompt=SYSTEM, tools=TOOLS, overflow=strategy
    ) as session:
        talk = Talk(session, seed=1)
        for i in range(300):
            await talk.turn()
            if i % 30 == 0:
                await system_and_tools_are_in(context, session, tinychat)
        assert talk.shifts > 30
    assert context.stats.sequences_active == 0


@pytest.mark.slow
async def test_300_turns_with_a_strategy_of_one_s_own(context: Context) -> None:
    async with ChatSession(
        context, system_prompt=SYSTEM, tools=TOOLS, overflow=in_short
    ) as session:
        talk = Talk(session, seed=2)
        with pytest.warns(RuntimeWarning, match="in_short left"):  # a prompt longer than all
            await talk.turns(300)
        assert talk.shifts > 30


@pytest.mark.slow
async def test_300_turns_with_a_limit_end_with_errors_that_change_nothing(context: Context) -> None:
    async with ChatSession(
        context, system_prompt=SYSTEM, tools=TOOLS, overflow="stop_at_limit"
    ) as session:
        talk, overflows = Talk(session, seed=3), 0
        for _ in range(300):
            before = session.history
            result = await talk.turn_or_overflow()
            if result is None:
                overflows += 1
                assert session.history == before
                await soon(session.reset())
            else:
                assert result.context_shift is None
                assert session.context_window == session.history
        assert overflows > 5


async def test_turns_with_tool_calls_go_whole(context: Context) -> None:
    async with ChatSession(context, system_prompt=SYSTEM, tools=TOOLS) as session:
        talk = Talk(session, seed=4)
        for i in range(30):
            if i % 3 == 0:
                await talk.call_a_tool()
            await talk.turn()
            window = session.context_window
            for before, message in pairwise(window):
                if isinstance(message, ToolMessage):
                    assert before == A_ROUND[1]
                if message == A_ROUND[1]:
                    assert before == A_ROUND[0]
        assert talk.shifts > 3


async def test_a_strategy_that_never_works_is_named_and_replaced(context: Context) -> None:
    async with ChatSession(context, system_prompt=SYSTEM, overflow=gives_up) as session:
        talk = Talk(session, seed=5)
        with pytest.warns(RuntimeWarning, match="gives_up failed with NotImplementedError"):
            await talk.turns(20)
        assert talk.shifts > 1


@pytest.mark.parametrize("strategy", DROPPING[:3])
async def test_no_turn_shifts_that_need_not(context: Context, strategy: Any) -> None:
    async with ChatSession(context, system_prompt=SYSTEM, overflow=strategy) as session:
        talk = Talk(session, seed=6)
        for _ in range(40):
            result = await talk.turn()
            limit = Room.within(SIZE, talk.max_tokens).limit
            if result.context_shift is None:
                assert result.stats.prompt_tokens <= limit
            else:
                assert result.stats.prompt_tokens + result.context_shift.dropped > limit
        assert talk.shifts > 3


async def test_a_shift_is_in_the_result_and_among_the_events(context: Context) -> None:
    async with ChatSession(context, system_prompt=SYSTEM) as session:
        for _ in range(30):
            prediction = session.prompt("x y z " * 12, max_tokens=4)
            events = [event async for event in prediction.events()]
            result = await prediction
            shifted = [event for event in events if isinstance(event, ContextShifted)]
            if result.context_shift is None:
                assert shifted == []
                continue
            assert sum(event.dropped for event in shifted) == result.context_shift.dropped > 0
            assert result.context_shift.kept > 0
            break
        else:
            pytest.fail("nothing shifted")


async def test_a_prompt_longer_than_the_context_is_answered_from_its_end(context: Context) -> None:
    async with ChatSession(context, system_prompt=SYSTEM) as session:
        text = "the old boat came home " * 500 + "My name is Ada."
        result = await soon(session.prompt(text, max_tokens=12))
        assert result.content
        assert session.history[1] == UserMessage(text)
        said = session.context_window[1].content
        assert len(said) < len(text)
        assert said.endswith("My name is Ada.")


async def test_a_system_prompt_longer_than_the_context_is_an_error_that_says_so(
    context: Context,
) -> None:
    async with ChatSession(context, system_prompt="Be kind. " * 500) as session:
        with pytest.raises(ContextOverflowError, match="the context has 512") as caught:
            await soon(session.prompt("Hi"))
        assert "larger context_size" in str(caught.value)
        assert len(session.history) == 1


@pytest.mark.parametrize("strategy", DROPPING)
async def test_an_answer_longer_than_the_context_shifts_while_it_is_written(
    tiny_model: Model, strategy: Any
) -> None:
    async with (
        tiny_model.create_context(context_size=SIZE, sequences=1, threads=1) as context,
        ChatSession(context, system_prompt=SYSTEM, overflow=strategy) as session,
    ):
        for i in range(4):
            result = await soon(session.prompt(f"Tell me story {i}.", max_tokens=600))
            assert result.stop_reason == "max_tokens"
            assert result.context_shift is not None
            assert len(session.history) == 3 + 2 * i
            assert session.context_window[0] == SystemMessage(SYSTEM)


async def test_an_answer_that_comes_to_the_limit_stops_there(tiny_model: Model) -> None:
    async with (
        tiny_model.create_context(context_size=SIZE, sequences=1, threads=1) as context,
        ChatSession(context, system_prompt=SYSTEM, overflow="stop_at_limit") as session,
    ):
        result = await soon(session.prompt("Tell me a story.", max_tokens=600))
        assert (result.stop_reason, result.context_shift) == ("context_full", None)
        with pytest.raises(ContextOverflowError):
            await soon(session.prompt("And then?"))


# --- cells ----------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], bool]] = {
    "plain": (tiny_llama, {}, True),
    "split": (tiny_llama, {"kv_unified": False}, True),
    "window": (tiny_sliding_window, {"swa_full": False}, False),
    "recurrent": (tiny_recurrent, {}, False),
    "hybrid": (tiny_hybrid, {}, False),
}
"""How a model is made and opened, and whether its cells can be moved."""


@pytest.mark.parametrize("kind", KINDS)
async def test_whatever_the_memory_a_chat_goes_on_and_moves_cells_where_it_can(
    models: Path, kind: str
) -> None:
    make, options, moves = KINDS[kind]
    path = models / f"{make.__name__}.gguf"
    if not path.exists():
        make(path)
    saved = []
    async with (
        llamactor.load_model(path, context_size=SIZE, sequences=1, threads=1, **options) as model,
        model.chat(system_prompt=SYSTEM) as session,
    ):
        for i in range(40):
            result = await soon(session.prompt(f"This is number {i} of them.", max_tokens=8))
            if result.context_shift is not None:
                saved.append(result.stats.cached_tokens - result.context_shift.kept)
    assert len(saved) > 3
    assert all(tokens > 100 if moves else tokens <= 0 for tokens in saved), saved
