"""Tools in chats: calls are carried out, the model is asked again, and what is remembered of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import pytest

import llamactor
from llamactor import (
    AssistantMessage,
    ChatSession,
    ClosedError,
    DeadlineExceededError,
    Event,
    Finished,
    GrammarError,
    Model,
    Prediction,
    RoundEnd,
    RoundStart,
    TextDelta,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallError,
    ToolCallStart,
    ToolExecutionError,
    ToolMessage,
    ToolResult,
    UserMessage,
)
from llamactor.chat.template import render_chat
from tests.conftest import TINYCHAT
from tests.contexts import soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from llamactor import Message, PredictionResult
    from llamactor.chat.tools import ToolLike
    from tests.conftest import Gate

QUESTION = "Is an apple more expensive than a banana?"
ANSWER = (
    "The price of apple is $6. The price of banana is $4. Yes, apple is more expensive than banana."
)
ONE = "What is the price of a mango?"
PRICES = {"apple": "$6", "banana": "$4", "mango": "$7"}
BARE: dict[str, Any] = {
    "name": "get_fruit_price",
    "description": "Get the price of a fruit",
    "parameters": {
        "type": "object",
        "properties": {"name": {"type": "string"}},
        "required": ["name"],
    },
}


@llamactor.tool
async def get_fruit_price(name: str) -> dict[str, str]:
    """Get the price of a fruit."""
    return {"name": name, "price": PRICES[name]}


def priced(handler: Any, **options: Any) -> Tool:
    """The same tool with another handler."""
    return Tool(**BARE, handler=handler, **options)


@pytest.fixture
async def session(tinychat: Model) -> AsyncIterator[ChatSession]:
    """A session that has said nothing yet."""
    async with tinychat.chat() as session:
        yield session


async def all_of(prediction: Prediction) -> list[Event]:
    return [event async for event in prediction.events()]


def kinds(messages: tuple[Message, ...]) -> list[str]:
    return [type(message).__name__.removesuffix("Message") for message in messages]


def asked(result: PredictionResult) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, call.arguments) for call in result.tool_calls]


def tasks() -> set[str]:
    """The names of what runs for us."""
    names = {task.get_name() for task in asyncio.all_tasks()}
    return {name for name in names if name.startswith("llamactor")}


BOTH = [("get_fruit_price", {"name": "apple"}), ("get_fruit_price", {"name": "banana"})]
LOOP = ["Assistant", "Tool", "Tool", "Assistant"]


# --- the loop -------------------------------------------------------------------------------------


@pytest.mark.every_loop
async def test_both_prices_are_asked_for_in_one_turn_and_read(session: ChatSession) -> None:
    result = await soon(session.prompt(QUESTION, tools=[get_fruit_price]))
    assert asked(result) == BOTH
    assert (result.content, result.rounds, result.stop_reason) == (ANSWER, 2, "eos")
    assert result.pending_calls == ()
    assert kinds(result.messages) == LOOP
    assert session.history == (UserMessage(QUESTION), *result.messages)


async def test_respond_and_act_do_the_same_without_a_session(tinychat: Model) -> None:
    chat = [{"role": "user", "content": QUESTION}]
    told: list[Message] = []
    tools = [get_fruit_price]
    asks: list[Callable[[], Prediction]] = [
        lambda: tinychat.respond(QUESTION, tools=tools, on_message=told.append),
        lambda: tinychat.act(chat, tools, on_message=told.append),
        lambda: tinychat.act(QUESTION, iter(tools), on_message=told.append),
    ]
    for ask in asks:
        result = await soon(ask())
        assert (result.content, asked(result), result.rounds) == (ANSWER, BOTH, 2)
        assert kinds(result.messages) == LOOP
        assert tuple(told) == result.messages
        told.clear()
    with pytest.raises(ValueError, match="tools must not be empty"):
        _ = tinychat.act(QUESTION, [])


async def test_a_handle_acts_as_its_model_does(tmp_path: Path) -> None:
    async with llamactor.Runtime(tmp_path) as runtime:
        handle = await runtime.load(TINYCHAT, context_size=1024, sequences=2, threads=1)
        for prediction in (
            handle.act(QUESTION, [get_fruit_price], max_rounds=5),
            handle.respond(QUESTION, tools=[get_fruit_price], parallel_tools=False),
            handle.chat(tools=[get_fruit_price]).prompt(QUESTION),
        ):
            assert (await soon(prediction)).content == ANSWER


async def test_the_tools_of_a_session_are_those_of_its_prompts(tinychat: Model) -> None:
    async with tinychat.chat(tools=[get_fruit_price]) as session:
        assert (await soon(session.prompt(QUESTION))).content == ANSWER
        assert (await soon(session.prompt(ONE, tool_choice="none"))).rounds == 1
        assert (await soon(session.prompt("Hello!", tools=[]))).tool_calls == ()
        async with await session.fork() as other:
            assert asked(await soon(other.prompt(ONE))) == [("get_fruit_price", {"name": "mango"})]


async def test_an_answer_without_calls_is_one_round(session: ChatSession) -> None:
    result = await soon(session.prompt("Hello!", tools=[get_fruit_price]))
    assert (result.rounds, result.tool_calls) == (1, ())
    assert kinds(result.messages) == ["Assistant"]
    assert result.content


async def test_events_tell_of_rounds_calls_and_results(session: ChatSession) -> None:
    events = await soon(all_of(session.prompt(QUESTION, tools=[get_fruit_price])))
    calls = [event.call for event in events if isinstance(event, ToolCallEnd)]
    starts = [event for event in events if isinstance(event, ToolCallStart)]
    assert [(call.name, call.arguments) for call in calls] == BOTH
    assert starts == [ToolCallStart(i, call.id or "", call.name) for i, call in enumerate(calls)]
    for index, call in enumerate(calls):
        parts = [
            event.arguments
            for event in events
            if isinstance(event, ToolCallDelta) and event.index == index
        ]
        assert json.loads("".join(parts)) == call.arguments
    results = [event for event in events if isinstance(event, ToolResult)]
    assert sorted(results, key=lambda one: calls.index(one.call)) == [
        ToolResult(call, json.dumps({**call.arguments, "price": PRICES[call.arguments["name"]]}))
        for call in calls
    ]
    borders = [event for event in events if isinstance(event, (RoundStart, RoundEnd))]
    assert borders == [RoundStart(0), RoundEnd(0), RoundStart(1), RoundEnd(1)]
    assert max(map(events.index, results)) < events.index(RoundStart(1))
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == ANSWER
    assert isinstance(events[-1], Finished)


async def test_a_late_reader_gets_the_same_events(session: ChatSession) -> None:
    prediction = session.prompt(QUESTION, tools=[get_fruit_price])
    early = await soon(all_of(prediction))
    late = await soon(all_of(prediction))
    told = (ToolCallStart, ToolCallEnd, ToolResult, RoundStart, RoundEnd, Finished)
    assert [one for one in late if isinstance(one, told)] == [
        one for one in early if isinstance(one, told)
    ]
    assert "".join([text async for text in prediction]) == ANSWER


async def test_a_handler_starts_while_the_model_still_writes(session: ChatSession) -> None:
    started = threading.Event()

    async def handler(name: str) -> str:
        started.set()
        return PRICES[name]

    def waits_for_the_first(tokens: list[int], logits: memoryview[float]) -> None:
        if session._home.model.detokenize(tokens, special=True).endswith("</tool_call>"):
            assert started.wait(30), "the handler waits for the end of the round"

    prediction = session.prompt(
        QUESTION, tools=[priced(handler)], logits_processor=waits_for_the_first
    )
    assert asked(await soon(prediction)) == BOTH


async def test_the_next_turn_evaluates_only_what_is_new(session: ChatSession) -> None:
    await soon(session.prompt(QUESTION, tools=[get_fruit_price]))
    held = len(session._state.cells)
    stats = (await soon(session.prompt(ONE, tools=[get_fruit_price], max_rounds=99))).stats
    assert stats.cached_tokens >= held
    assert session.usage.predictions == 2


# --- at the same time, and failures ---------------------------------------------------------------


async def test_two_handlers_run_at_the_same_time(session: ChatSession) -> None:
    here, both = 0, asyncio.Event()

    async def meets(name: str) -> str:
        nonlocal here
        here += 1
        if here == 2:
            both.set()
        await both.wait()
        return PRICES[name]

    assert (await soon(session.prompt(QUESTION, tools=[priced(meets)]))).content == ANSWER


async def test_without_parallel_tools_one_follows_the_other(session: ChatSession) -> None:
    order: list[str] = []

    async def notes(name: str) -> str:
        order.append(f"{name} begins")
        await asyncio.sleep(0.01)
        order.append(f"{name} ends")
        return PRICES[name]

    prediction = session.prompt(QUESTION, tools=[priced(notes)], parallel_tools=False)
    assert (await soon(prediction)).content == ANSWER
    assert order == ["apple begins", "apple ends", "banana begins", "banana ends"]


async def sold_out(name: str) -> str:
    if name == "banana":
        raise LookupError("bananas are sold out")
    return PRICES[name]


async def test_the_model_is_told_of_a_handler_that_failed(session: ChatSession) -> None:
    prediction = session.prompt(QUESTION, tools=[priced(sold_out)], max_rounds=2)
    events = await soon(all_of(prediction))
    failed = [event for event in events if isinstance(event, ToolResult) and event.error]
    assert [type(event.error) for event in failed] == [ToolExecutionError]
    message = session.history[3]
    assert isinstance(message, ToolMessage)
    assert message.content == failed[0].content
    assert "bananas are sold out" in json.loads(message.content)["error"]
    assert isinstance(session.history[-1], AssistantMessage)


async def test_a_handler_that_failed_ends_the_prediction_if_it_is_to(session: ChatSession) -> None:
    await soon(session.prompt("Hello!"))
    before = session.history
    prediction = session.prompt(QUESTION, tools=[priced(sold_out)], on_tool_error="raise")
    with pytest.raises(ToolExecutionError, match="bananas are sold out") as failed:
        await soon(prediction)
    assert failed.value.call.arguments == {"name": "banana"}
    assert isinstance(failed.value.__cause__, LookupError)
    assert failed.value.partial is not None
    assert session.history == before
    assert (await soon(session.prompt(ONE, tools=[get_fruit_price]))).content


async def test_a_failure_ends_a_round_that_is_still_written(session: ChatSession) -> None:
    failed = threading.Event()

    async def fails(name: str) -> str:
        asyncio.get_running_loop().call_later(0.05, failed.set)
        raise LookupError("closed")

    def waits(tokens: list[int], logits: memoryview[float]) -> None:
        if session._home.model.detokenize(tokens, special=True).endswith("</tool_call>"):
            assert failed.wait(30)

    prediction = session.prompt(
        QUESTION, tools=[priced(fails)], on_tool_error="raise", logits_processor=waits
    )
    with pytest.raises(ToolExecutionError, match="closed") as error:
        await soon(prediction)
    assert error.value.partial is not None
    assert len(error.value.partial.tool_calls) == 1


async def test_what_takes_too_long_is_told_to_the_model(session: ChatSession) -> None:
    async def hangs(name: str) -> str:
        await asyncio.Event().wait()
        return name

    result = await soon(session.prompt(ONE, tools=[priced(hangs, timeout=0.01)]))
    told = result.messages[1]
    assert "it took longer than 0.01 s" in json.loads(told.content)["error"]
    assert isinstance(result.messages[-1], AssistantMessage)


async def test_wrong_arguments_are_told_to_the_model(session: ChatSession) -> None:
    strict = {**BARE, "parameters": {**BARE["parameters"], "required": ["name", "day"]}}
    events = await soon(
        all_of(session.prompt(ONE, tools=[Tool(**strict, handler=len)], max_rounds=2))
    )
    (told,) = [event for event in events if isinstance(event, ToolResult)]
    assert isinstance(told.error, ToolCallError)
    assert "'day' is a required property" in json.loads(told.content)["error"]


# --- the guard ------------------------------------------------------------------------------------


async def test_the_model_sees_what_a_guard_has_edited(session: ChatSession) -> None:
    async def guard(call: ToolCall) -> dict[str, str] | None:
        return {"name": "apple"} if call.arguments == {"name": "mango"} else None

    result = await soon(session.prompt(ONE, tools=[get_fruit_price], guard=guard))
    told = result.messages[1].content
    assert told == '(called with {"name": "apple"} instead)\n{"name": "apple", "price": "$6"}'
    assert result.tool_calls[0].arguments == {"name": "mango"}
    assert "$6" in result.content


async def test_the_model_sees_what_a_guard_has_denied(session: ChatSession) -> None:
    def guard(call: ToolCall) -> bool | str:
        return call.arguments["name"] != "banana" or "bananas are secret"

    result = await soon(session.prompt(QUESTION, tools=[get_fruit_price], guard=guard))
    told = [one.content for one in result.messages if isinstance(one, ToolMessage)]
    assert json.loads(told[0])["price"] == "$6"
    assert json.loads(told[1])["error"] == "the call was denied: bananas are secret"


# --- calls that are returned ----------------------------------------------------------------------


async def test_calls_without_a_handler_are_returned(tinychat: Model) -> None:
    result = await soon(tinychat.respond(QUESTION, tools=[BARE]))
    assert (asked(result), result.stop_reason, result.rounds) == (BOTH, "tool_calls", 1)
    assert result.pending_calls == result.tool_calls
    assert result.messages == (
        AssistantMessage(tool_calls=result.tool_calls, tokens=tuple(result.tokens)),
    )
    answers = [
        ToolMessage(PRICES[call.arguments["name"]], call.id) for call in result.pending_calls
    ]
    chat: list[Message] = [UserMessage(QUESTION), *result.messages, *answers]
    again = await soon(tinychat.respond(chat, tools=[BARE]))
    assert (again.content, again.stop_reason) == (ANSWER, "eos")
    assert again.stats.cached_tokens > len(result.tokens)


async def test_a_returned_call_whose_arguments_cannot_be_read_says_so(tinychat: Model) -> None:
    transfer = {
        "name": "transfer",
        "parameters": {"type": "object", "properties": {"amount": {"type": "number"}}},
    }
    written = '<tool_call>\n{"name": "transfer", "arguments": {"amount": 1e999}}\n</tool_call>'
    prediction = tinychat.respond("?", tools=[transfer], logits_processor=Says(tinychat, written))
    ends = [one.call for one in await soon(all_of(prediction)) if isinstance(one, ToolCallEnd)]
    result = await soon(prediction)
    (call,) = result.tool_calls
    assert ends == [call]
    assert (call.name, call.arguments) == ("transfer", {})
    assert "1e999" in str(call.problem)
    assert result.pending_calls == (call,)


async def test_a_session_goes_on_when_the_program_has_answered(session: ChatSession) -> None:
    result = await soon(session.prompt(QUESTION, tools=[BARE]))
    assert result.stop_reason == "tool_calls"
    answers = [
        ToolMessage(PRICES[call.arguments["name"]], call.id) for call in result.pending_calls
    ]
    again = await soon(session.prompt(answers, tools=[BARE]))
    assert again.content == ANSWER
    assert kinds(session.history) == ["User", *LOOP]


async def test_a_call_without_a_handler_ends_the_loop(
    session: ChatSession, tinychat: Model
) -> None:
    clock = {"name": "get_time", "description": "Get the current time"}
    says = Says(tinychat, calls("mango") + "\n" + call_of("get_time"))
    tools: list[Any] = [get_fruit_price, clock]
    result = await soon(session.prompt("What time is it?", tools=tools, logits_processor=says))
    assert result.stop_reason == "tool_calls"
    assert [call.name for call in result.tool_calls] == ["get_fruit_price", "get_time"]
    assert [call.name for call in result.pending_calls] == ["get_time"]
    assert kinds(session.history) == ["User", "Assistant", "Tool"]
    answer = ToolMessage("12:30", result.pending_calls[0].id)
    again = await soon(session.prompt([answer], tools=[get_fruit_price, clock]))
    assert again.content
    assert again.pending_calls == ()


async def test_parsed_is_nothing_where_calls_are_returned(tinychat: Model) -> None:
    result = await soon(tinychat.respond(ONE, tools=[BARE], schema=None))
    assert (result.parsed, result.content) == (None, "")


# --- limits ---------------------------------------------------------------------------------------


class Says:
    """A logits processor with which a model says these texts, one in each round."""

    def __init__(self, model: Model, *texts: str) -> None:
        end = model.tokens.eot if model.tokens.eot is not None else model.tokens.eos
        self._scripts = [[*model.tokenize(text, special=True), end or 0] for text in texts]
        self.rounds = 0

    def __call__(self, tokens: list[int], logits: memoryview[float]) -> None:
        if not tokens:
            self.rounds += 1
        wanted = self._scripts[self.rounds - 1][len(tokens)]
        row = np.asarray(logits)
        row[:] = -1e9
        row[wanted] = 0


def call_of(tool: str, **arguments: str) -> str:
    """What a model writes to call a tool."""
    made = json.dumps({"name": tool, "arguments": arguments})
    return f"<tool_call>\n{made}\n</tool_call>"


def calls(*names: str) -> str:
    """What it writes to ask for the prices of these fruits."""
    return "\n".join(call_of("get_fruit_price", name=name) for name in names)


async def test_a_model_may_call_for_many_rounds(session: ChatSession, tinychat: Model) -> None:
    says = Says(tinychat, calls("apple"), calls("banana", "mango"), calls("apple"), "That is all.")
    result = await soon(session.prompt("?", tools=[get_fruit_price], logits_processor=says))
    assert (result.rounds, result.content, len(result.tool_calls)) == (4, "That is all.", 4)
    assert len({call.id for call in result.tool_calls}) == 4
    called_once, called_twice = ["Assistant", "Tool"], ["Assistant", "Tool", "Tool"]
    assert kinds(result.messages) == [
        *(*called_once, *called_twice),
        *(*called_once, "Assistant"),
    ]
    for answer in result.messages:
        if isinstance(answer, ToolMessage):
            assert answer.tool_call_id in {call.id for call in result.tool_calls}


async def test_content_joins_all_rounds(session: ChatSession, tinychat: Model) -> None:
    says = Says(tinychat, "I look. " + calls("apple"), "It is $6.")
    result = await soon(session.prompt("?", tools=[get_fruit_price], logits_processor=says))
    said = [one.content for one in result.messages if isinstance(one, AssistantMessage)]
    assert said[-1] == "It is $6."
    assert said[0].strip() == "I look."
    assert result.content == "".join(said)


async def test_rounds_are_capped_and_the_last_has_no_tools(
    session: ChatSession, tinychat: Model
) -> None:
    says = Says(tinychat, calls("apple"), calls("banana"), calls("mango"))
    prediction = session.prompt("?", tools=[get_fruit_price], max_rounds=3, logits_processor=says)
    result = await soon(prediction)
    assert (result.rounds, says.rounds) == (3, 3)
    assert [call.arguments["name"] for call in result.tool_calls] == ["apple", "banana"]
    assert result.content == calls("mango")  # just text
    assert result.stop_reason == "eos"


async def test_with_one_round_there_are_no_tools(session: ChatSession) -> None:
    result = await soon(session.prompt(QUESTION, tools=[get_fruit_price], max_rounds=1))
    assert (result.rounds, result.tool_calls) == (1, ())
    assert kinds(session.history) == ["User", "Assistant"]


async def test_tokens_are_counted_over_all_rounds(session: ChatSession, tinychat: Model) -> None:
    n_call = len(tinychat.tokenize(calls("apple"), special=True))
    for limit, said in ((n_call + 3, 3), (n_call, 0)):
        says = Says(tinychat, calls("apple"), "1 2 3 4 5 6 7 8 9")
        prediction = session.prompt(
            "?", tools=[get_fruit_price], max_tokens=limit, logits_processor=says
        )
        result = await soon(prediction)
        assert result.stop_reason == "max_tokens"
        assert len(result.tokens) == limit
        assert len(tinychat.tokenize(result.content)) <= said
        assert isinstance(session.history[-1], AssistantMessage)


async def test_what_must_be_called_is_called(session: ChatSession) -> None:
    result = await soon(
        session.prompt("Hello!", tools=[get_fruit_price], tool_choice="get_fruit_price")
    )
    assert {call.name for call in result.tool_calls} == {"get_fruit_price"}
    assert result.rounds > 1


async def test_a_deadline_counts_the_time_of_tools(session: ChatSession) -> None:
    ended = asyncio.Event()

    async def hangs(name: str) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return name

    with pytest.raises(DeadlineExceededError, match="while tools were carried out"):
        await soon(session.prompt(ONE, tools=[priced(hangs)], deadline=1.0))
    await soon(ended.wait())
    assert session.history == ()


async def test_a_deadline_does_not_wait_for_handlers_to_clean_up(session: ChatSession) -> None:
    may_end, ended = asyncio.Event(), asyncio.Event()

    async def lingers(name: str) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()
            ended.set()
        return name

    with pytest.raises(DeadlineExceededError, match="while tools were carried out"):
        await soon(session.prompt(ONE, tools=[priced(lingers)], deadline=1.0))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not ended.is_set()
    assert "llamactor-chat" in tasks()  # the next turn waits until they have ended
    may_end.set()
    await soon(ended.wait())
    assert (await soon(session.prompt("Hello!"))).content


# --- together with schemas ------------------------------------------------------------------------


class Verdict(msgspec.Struct):
    answer: Literal["yes", "no"]
    price: int


async def test_the_last_answer_obeys_the_schema(session: ChatSession) -> None:
    # This model says nothing in JSON as long as it may call instead.
    prediction = session.prompt(
        QUESTION, tools=[get_fruit_price], schema=Verdict, max_rounds=2, max_tokens=200
    )
    result = await soon(prediction)
    assert asked(result) == BOTH
    assert result.rounds == 2
    assert isinstance(result.parsed, Verdict)
    assert result.completed
    assert msgspec.json.decode(session.history[-1].content, type=Verdict) == result.parsed


async def test_thoughts_calls_and_a_schema_go_together(tinychat: Model) -> None:
    says = Says(
        tinychat,
        "I look it up.\n</think>\n\n" + calls("apple", "banana"),
        'Six is more.\n</think>{"answer":"yes","price":6}',
    )
    async with tinychat.chat(template_kwargs={"enable_thinking": True}) as session:
        prediction = session.prompt(
            QUESTION, tools=[get_fruit_price], schema=Verdict, logits_processor=says
        )
        result = await soon(prediction)
        assert result.parsed == Verdict("yes", 6)
        assert (result.rounds, asked(result)) == (2, BOTH)
        assert result.reasoning == "I look it up.Six is more."
        answers = [one for one in result.messages if isinstance(one, AssistantMessage)]
        assert [one.reasoning for one in answers] == ["I look it up.", "Six is more."]
        assert answers[-1].content == '{"answer":"yes","price":6}'


async def test_a_prefix_of_the_schema_s_own_leaves_no_room_for_calls(session: ChatSession) -> None:
    prediction = session.prompt(
        QUESTION,
        tools=[get_fruit_price],
        schema=Verdict,
        response_prefix='{"answer":',
        max_tokens=100,
    )
    result = await soon(prediction)
    assert result.content.startswith('{"answer":')
    assert isinstance(result.parsed, Verdict)
    assert (result.rounds, result.tool_calls) == (1, ())


async def test_what_is_called_obeys_the_parameters(session: ChatSession) -> None:
    @llamactor.tool
    def get_fruit_price(name: Literal["pear", "plum"], day: Literal["Monday"]) -> str:
        """Get the price of a fruit."""
        return "$6"

    result = await soon(session.prompt(QUESTION, tools=[get_fruit_price], max_rounds=2))
    assert result.tool_calls
    for call in result.tool_calls:
        assert call.arguments["name"] in {"pear", "plum"}
        assert call.arguments["day"] == "Monday"


def of_parameter(schema: Any, **definitions: Any) -> dict[str, Any]:
    """A definition of a tool with one parameter."""
    parameters = {"type": "object", "properties": {"x": schema}, "$defs": definitions}
    return {"name": "move", "description": "Move there.", "parameters": parameters}


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        (of_parameter({"allOf": [{"$ref": "#/$defs/a"}]}, a={"$ref": "#/$defs/a"}), "leads back"),
        (of_parameter({"$ref": "#/$defs/a"}, a={"anyOf": [{"$ref": "#/$defs/a"}]}), "leads back"),
        (of_parameter({"$ref": "elsewhere.json"}), "leads nowhere"),
        (of_parameter({"type": "any"}), 'type cannot be "any"'),
        (
            {"name": "move", "parameters": {"properties": {f"p{i}": {} for i in range(10_000)}}},
            "10000 properties at # are too many",
        ),
    ],
    ids=["itself", "alternatives", "elsewhere", "type", "many"],
)
@pytest.mark.parametrize("choice", ["auto", "required", "none"])
async def test_parameters_without_a_grammar_fail_the_prediction_and_name_the_tool(
    session: ChatSession, definition: dict[str, Any], reason: str, choice: str
) -> None:
    tools: list[ToolLike] = [get_fruit_price, definition]
    with pytest.raises(GrammarError, match=f'the tool "move": .*{reason}'):
        await soon(session.prompt(QUESTION, tools=tools, tool_choice=choice))
    assert (await soon(session.prompt(QUESTION, tools=[get_fruit_price]))).content == ANSWER


@pytest.mark.parametrize(
    "definition",
    [
        of_parameter({"type": "string", "pattern": "[a-z]+"}),
        of_parameter({"type": "string", "pattern": "^a)$"}),
        of_parameter({"type": "string", "pattern": r"^\s$", "minLength": 1.0}),
        of_parameter({"type": "array", "prefixItems": [{"type": "number"}], "items": False}),
        of_parameter({"$ref": "#"}),
        of_parameter({"$ref": "#/$defs/a~1b"}, **{"a/b": {"type": ["object", "object"]}}),
        of_parameter(schema=True),
        {"name": "move", "description": None, "parameters": None},
    ],
)
@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_tools_are_called_whatever_the_parameters_of_others_say(
    tinychat: Model, capfd: pytest.CaptureFixture[str], definition: dict[str, Any], choice: str
) -> None:
    result = await soon(tinychat.act(QUESTION, [get_fruit_price, definition], tool_choice=choice))
    assert asked(result) == BOTH
    assert result.content == ANSWER
    assert capfd.readouterr() == ("", "")


async def test_a_tuple_is_called_with_as_many_values(tinychat: Model) -> None:
    moved: list[tuple[float, float]] = []

    @llamactor.tool
    def move(to: tuple[float, float]) -> str:
        """Move there."""
        moved.append(to)
        return "moved"

    prediction = tinychat.act("Hello!", [move], tool_choice="required", max_rounds=2, seed=1)
    result = await soon(prediction)
    assert [call.name for call in result.tool_calls] == ["move"] * len(moved)
    assert moved
    assert all(len(place) == 2 for place in moved)


# --- cancelling -----------------------------------------------------------------------------------


class Hanging:
    """A handler that waits until it is cancelled."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, name: str) -> str:
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return name


async def test_cancelling_the_prediction_cancels_handlers(session: ChatSession) -> None:
    hanging = Hanging()
    prediction = session.prompt(ONE, tools=[priced(hanging)])
    await soon(hanging.started.wait())
    prediction.cancel()
    await soon(hanging.cancelled.wait())
    result = await soon(prediction)
    assert result.stop_reason == "cancelled"
    await until(lambda: tasks() == set())


async def test_a_cancelled_waiter_cancels_handlers(tinychat: Model) -> None:
    hanging = Hanging()
    waiter = asyncio.create_task(tinychat.act(ONE, [priced(hanging)]).result())
    await soon(hanging.started.wait())
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(waiter)
    await soon(hanging.cancelled.wait())


async def test_a_cancelled_call_was_not_made(session: ChatSession) -> None:
    hanging = Hanging()
    await soon(session.prompt("Hello!"))
    before = session.history
    prediction = session.prompt(ONE, tools=[priced(hanging)])
    await soon(hanging.started.wait())
    prediction.cancel()
    result = await soon(prediction)
    assert result.messages == ()
    assert session.history == before
    assert (await soon(session.prompt(ONE, tools=[get_fruit_price]))).content


async def test_whole_rounds_of_a_cancelled_prediction_are_remembered(
    session: ChatSession, tinychat: Model
) -> None:
    hanging = Hanging()

    async def handler(name: str) -> str:
        return await hanging(name) if name == "mango" else PRICES[name]

    says = Says(tinychat, calls("apple"), "I look again. " + calls("mango", "banana"))
    prediction = session.prompt("?", tools=[priced(handler)], logits_processor=says)
    await soon(hanging.started.wait())
    await until(lambda: prediction._native.rounds == 2)
    prediction.cancel()
    result = await soon(prediction)
    assert kinds(session.history) == ["User", "Assistant", "Tool", "Assistant"]
    assert session.history[1:] == result.messages
    last = session.history[-1]
    assert isinstance(last, AssistantMessage)
    assert (last.content.strip(), last.tool_calls) == ("I look again.", ())
    again = await soon(session.prompt(ONE, tools=[get_fruit_price]))
    assert "$7" in again.content


async def test_a_cancelled_last_answer_is_remembered_as_far_as_it_came(
    session: ChatSession, tinychat: Model, gate: Gate
) -> None:
    says = Says(tinychat, calls("apple"), "It is $6, as I was told.")

    def slowly(tokens: list[int], logits: memoryview[float]) -> None:
        says(tokens, logits)
        if says.rounds == 2 and len(tokens) == 3:
            gate(tokens, logits)

    prediction = session.prompt("?", tools=[get_fruit_price], logits_processor=slowly)
    await gate.reached()
    prediction.cancel()
    gate.open()
    result = await soon(prediction)
    assert result.stop_reason == "cancelled"
    assert kinds(session.history) == ["User", "Assistant", "Tool", "Assistant"]
    assert result.content
    assert "It is $6, as I was told.".startswith(result.content)


async def test_threads_are_left_alone(session: ChatSession) -> None:
    started, may_end = threading.Event(), threading.Event()

    def handler(name: str) -> str:
        started.set()
        may_end.wait(30)
        return name

    prediction = session.prompt(ONE, tools=[priced(handler)])
    await asyncio.to_thread(started.wait, 30)
    prediction.cancel()
    assert (await soon(prediction)).stop_reason == "cancelled"
    assert (await soon(session.prompt("Hello!"))).content
    may_end.set()


async def test_closing_the_session_ends_handlers(session: ChatSession) -> None:
    hanging = Hanging()
    prediction = session.prompt(ONE, tools=[priced(hanging)])
    await soon(hanging.started.wait())
    await soon(session.aclose())
    assert hanging.cancelled.is_set()
    with pytest.raises(ClosedError):
        await soon(prediction)
    assert session.history == ()


@pytest.mark.parametrize(
    "options",
    [
        {"tools": [BARE]},
        {"tools": [Tool(**BARE, handler=len)]},
        {"trim_trailing_whitespace": True},
    ],
    ids=["bare", "handler", "trimmed"],
)
@pytest.mark.parametrize("cancels", [False, True])
async def test_closing_the_model_ends_an_answer_and_its_session(
    tinychat: Model, session: ChatSession, gate: Gate, options: dict[str, Any], cancels: bool
) -> None:
    says = Says(tinychat, ANSWER)

    def slowly(tokens: list[int], logits: memoryview[float]) -> None:
        gate(tokens, logits)
        says(tokens, logits)

    gate.allow(5)
    prediction = session.prompt("?", logits_processor=slowly, **options)
    for _ in range(6):
        await gate.reached()
    if cancels:
        prediction.cancel()
    waiter = asyncio.create_task(prediction.result())
    closing = asyncio.create_task(tinychat.aclose())
    await until(lambda: tinychat.closed)
    gate.open()
    if not cancels:
        with pytest.raises(ClosedError):
            await soon(waiter)
    else:
        with contextlib.suppress(ClosedError):  # whichever comes first
            assert (await soon(waiter)).stop_reason == "cancelled"
    await soon(asyncio.gather(closing, session.aclose()))
    await until(lambda: tasks() == set())


async def test_prompts_wait_for_the_tools_of_those_before_them(session: ChatSession) -> None:
    started, may_end = asyncio.Event(), asyncio.Event()

    async def handler(name: str) -> str:
        started.set()
        await may_end.wait()
        return PRICES[name]

    first = session.prompt(ONE, tools=[priced(handler)])
    second = session.prompt("Hello!")
    await soon(started.wait())
    assert second.stats.prompt_tokens == 0
    may_end.set()
    await soon(second)
    assert first.done
    assert kinds(session.history) == ["User", "Assistant", "Tool", "Assistant", "User", "Assistant"]


async def test_a_tool_cannot_use_the_session_that_waits_for_it(session: ChatSession) -> None:
    async def asks_itself(name: str) -> str:
        return (await session.prompt("Hello!")).content

    async def asks_another(name: str) -> str:
        model: Any = session._home.owner
        return str((await model.respond("Hello!")).content)

    result = await soon(session.prompt(ONE, tools=[priced(asks_itself)]))
    assert "a tool cannot use the session that waits for it" in result.messages[1].content
    result = await soon(session.prompt(ONE, tools=[priced(asks_another)]))
    assert "error" not in result.messages[1].content


# --- what is remembered ---------------------------------------------------------------------------


async def test_a_history_with_calls_comes_back_from_json_and_renders_to_the_same_tokens(
    session: ChatSession, tinychat: Model
) -> None:
    await soon(session.prompt(QUESTION, tools=[get_fruit_price]))
    await soon(session.prompt(ONE, tools=[get_fruit_price]))
    history = llamactor.load_history(llamactor.dump_history(session.history))
    assert history == session.history
    rendered = [
        await render_chat(
            tinychat._native,
            None,
            messages,
            tools=[get_fruit_price.definition],
            tool_choice="auto",
            add_generation_prompt=False,
        )
        for messages in (session.history, history)
    ]
    assert rendered[0].tokens == rendered[1].tokens
    assert rendered[0].tokens[: len(session._state.cells)] == session._state.cells
    async with tinychat.chat(history=history, tools=[get_fruit_price]) as other:
        stats = (await soon(other.prompt("Hello!"))).stats
        assert stats.cached_tokens >= len(session._state.cells) - 1


async def test_all_messages_are_told_at_the_end_in_order(session: ChatSession) -> None:
    told: list[Message] = []
    await soon(session.prompt(QUESTION, tools=[get_fruit_price], on_message=told.append))
    assert tuple(told) == session.history
    await soon(session.prompt(ONE, tools=[get_fruit_price], on_message=told.append, record=False))
    assert tuple(told) == session.history


async def test_a_saved_session_gets_its_tools_again(tinychat: Model, tmp_path: Path) -> None:
    async with tinychat.chat(tools=[get_fruit_price]) as session:
        await soon(session.prompt(QUESTION))
        await soon(session.save(tmp_path / "chat"))
    async with ChatSession.restore(tmp_path / "chat", tinychat) as restored:
        result = await soon(restored.prompt(ONE))
        assert (result.stop_reason, asked(result)) == (
            "tool_calls",
            [("get_fruit_price", {"name": "mango"})],
        )
    tools = [get_fruit_price]
    async with ChatSession.restore(tmp_path / "chat", tinychat, tools=tools) as restored:
        assert "$7" in (await soon(restored.prompt(ONE))).content
        assert kinds(restored.history) == ["User", *LOOP, "User", "Assistant", "Tool", "Assistant"]


async def test_the_window_makes_room_for_results(tinychat: Model) -> None:
    words = " ".join(["word"] * 90)
    async with (
        tinychat.create_context(context_size=512, sequences=1, threads=1) as context,
        ChatSession(context, tools=[priced(lambda name: f"{PRICES[name]} {words}")]) as session,
    ):
        for _ in range(4):
            says = Says(tinychat, calls("apple"), "It is $6.")
            result = await soon(session.prompt("?", logits_processor=says))
            assert (result.content, result.rounds) == ("It is $6.", 2)
            assert result.stats.prompt_tokens < 2 * 512
        assert len(session.history) == 16
        assert len(session.context_window) < 16
        assert session.context_window[-4:] == session.history[-4:]


async def test_a_result_that_is_too_long_is_cut_or_refused(tinychat: Model) -> None:
    huge = priced(lambda name: "word " * 5000)
    async with (
        tinychat.create_context(context_size=512, sequences=1, threads=1) as context,
        ChatSession(context, tools=[huge]) as session,
    ):
        says = Says(tinychat, calls("apple"), "It is long.")
        try:
            result = await soon(session.prompt("?", logits_processor=says))
        except llamactor.ContextOverflowError:
            assert session.history == ()
        else:
            assert result.content == "It is long."


async def test_thoughts_before_calls_are_told_and_remembered(tinychat: Model) -> None:
    async with tinychat.chat() as session:
        says = Says(tinychat, "<think>\nI look it up.\n</think>\n\n" + calls("apple"), "It is $6.")
        result = await soon(session.prompt("?", tools=[get_fruit_price], logits_processor=says))
        assert (result.reasoning, result.content) == ("I look it up.", "It is $6.")
        first = result.messages[0]
        assert isinstance(first, AssistantMessage)
        assert (first.reasoning, len(first.tool_calls)) == ("I look it up.", 1)
        assert first.tokens == tuple(result.tokens[: len(first.tokens or ())])


async def test_nothing_is_left_behind(tinychat: Model) -> None:
    for _ in range(5):
        await soon(tinychat.act(QUESTION, [get_fruit_price]))
        tinychat.act(QUESTION, [get_fruit_price]).cancel()
    await until(lambda: tasks() == set())
    assert tinychat._context is not None
    await until(lambda: tinychat._context.stats()["sequences_active"] == 0)  # type: ignore[union-attr]
