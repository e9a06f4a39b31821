"""Tools by themselves: what is one, and how calls of them are carried out and answered."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import enum
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Literal

import msgspec
import pydantic
import pytest

import llamactor
from llamactor import (
    AssistantMessage,
    Tool,
    ToolCall,
    ToolCallError,
    ToolExecutionError,
    ToolMessage,
    ToolResult,
    dump_history,
    load_history,
)
from llamactor.calls import read_call
from llamactor.chat.tools import Toolbox, ToolCalls, ToolUse, check_tool_use, to_toolbox
from tests.contexts import soon, until

PRICES = {"apple": "$6", "banana": "$4"}
BARE: dict[str, Any] = {
    "name": "get_price",
    "description": "Get the price of a fruit",
    "parameters": {
        "type": "object",
        "properties": {"name": {"type": "string"}},
        "required": ["name"],
    },
}


class Size(enum.Enum):
    """How big."""

    SMALL = "small"
    BIG = "big"


@dataclasses.dataclass
class Place:
    """Somewhere."""

    city: str
    zip: int | None = None


@dataclasses.dataclass
class Picky:
    """A type with code of its own."""

    name: str

    def __post_init__(self) -> None:
        raise KeyError(self.name)


@llamactor.tool
def price(name: str, count: int = 1) -> str:
    """Get the price of a fruit.

    What it costs today.

    Args:
        name: The fruit.
        count: How many.
    """
    return f"{count} {name}: {PRICES[name]}"


def call(tool: str, ident: str = "1", /, **arguments: object) -> ToolCall:
    return ToolCall(ident, tool, arguments)


class Round:
    """A round of calls, what it told and what it failed with."""

    def __init__(self, *tools: Any, **options: Any) -> None:
        self.told: list[ToolResult] = []
        self.failures: list[ToolExecutionError] = []
        use = ToolUse(tools=to_toolbox(tools), **options)
        self.calls = ToolCalls(use, tell=self.told.append, fail=self.failures.append)

    async def answers(self, *calls: ToolCall) -> list[str]:
        for one in calls:
            self.calls.add(one)
        try:
            return [message.content for message in await soon(self.calls.messages())]
        finally:
            await soon(self.calls.aclose())


# --- what is a tool -------------------------------------------------------------------------------


def test_a_function_becomes_a_tool_by_its_hints_and_its_docstring() -> None:
    assert (price.name, price.description) == (
        "price",
        "Get the price of a fruit.\n\nWhat it costs today.",
    )
    assert price.parameters["required"] == ["name"]
    assert price.parameters["properties"] == {
        "name": {"type": "string", "description": "The fruit."},
        "count": {"type": "integer", "description": "How many.", "default": 1},
    }
    assert price.definition["function"]["name"] == "price"


def test_a_tool_is_still_a_function() -> None:
    assert price("apple", count=2) == "2 apple: $6"
    with pytest.raises(TypeError, match="'get_price' has no handler"):
        Tool(**BARE)("apple")


def test_name_description_and_time_can_be_said() -> None:
    @llamactor.tool(name="time-now", description="The time.", timeout=2)
    async def now() -> str:
        """Return what a clock shows."""
        return "12:00"

    assert (now.name, now.description, now.timeout) == ("time-now", "The time.", 2)
    assert now.parameters["properties"] == {}


def test_methods_and_callable_objects_become_tools_too() -> None:
    class Shop:
        def price(self, name: str) -> str:
            """Get a price."""
            return PRICES[name]

        def __call__(self, name: str) -> str:
            """Buy."""
            return name

    made = llamactor.tool(Shop().price)
    assert (made.name, made.description) == ("price", "Get a price.")
    assert list(made.parameters["properties"]) == ["name"]
    assert llamactor.tool(name="buy")(Shop()).name == "buy"


def test_a_definition_stays_as_it_was_given() -> None:
    strict = {"type": "function", "function": {**BARE, "strict": True}}
    assert Toolbox([BARE, price]).definitions[0] == {"type": "function", "function": BARE}
    assert Toolbox([strict]).definitions == (strict,)
    assert not Toolbox([BARE]).has_handlers
    assert Toolbox([BARE, price]).has_handlers


def test_a_plain_function_among_tools_is_one() -> None:
    def hello(name: str) -> str:
        """Greet."""
        return f"Hello {name}"

    assert Toolbox([hello, price]).names == ("hello", "price")


@pytest.mark.parametrize("name", ["", "with space", "ä", "a" * 65, "a/b", "a\n"])
def test_names_are_short_and_plain(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Tool(name)


@pytest.mark.parametrize("name", ["a", "get_price", "get-price", "shop.price", "9", "A" * 64])
def test_usual_names_are_allowed(name: str) -> None:
    assert Tool(name).definition["function"]["name"] == name


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tools\[1\]: there is a tool 'price' already"):
        Toolbox([price, {"name": "price"}])


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        (5, "tools must be a list"),
        ("price", "tools must be a list"),
        ([5], r"tools\[0\] must be a tool, a function or a dict, not 5"),
        ([price, None], r"tools\[1\] must be a tool"),
        ([{"description": "no name"}], r'needs a "name"'),
        ([{"name": 5}], r'needs a "name"'),
        ([{"name": "a", "parameters": []}], "parameters of 'a' must be a dict"),
        ([lambda x: x], "no type hint"),
    ],
)
def test_what_is_no_tool_is_refused_at_the_call(tools: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        to_toolbox(tools)


@pytest.mark.parametrize(
    ("fields", "error", "reason"),
    [
        ({"parameters": {"type": "array"}}, ValueError, "must be the JSON Schema of an object"),
        ({"parameters": {"properties": {"a": {"type": "strin"}}}}, ValueError, "no JSON Schema"),
        ({"parameters": {"x": object()}}, TypeError, "parameters of 't'"),
        ({"description": 5}, TypeError, "description"),
        ({"handler": 5}, TypeError, "handler must be callable"),
        ({"timeout": 0}, ValueError, "timeout must be above 0"),
        ({"timeout": "1"}, TypeError, "timeout must be a number"),
    ],
)
def test_a_tool_checks_itself(fields: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        Tool("t", **{"handler": str, **fields})


def test_parameters_that_no_model_can_fill_are_refused() -> None:
    def several(*names: str) -> None: ...
    def positional(name: str, /) -> None: ...
    def untyped(name) -> None: ...  # type: ignore[no-untyped-def]
    def odd(name: threading.Lock) -> None: ...

    for function in (several, positional, untyped, odd):
        with pytest.raises(TypeError, match=r"name|several|Lock"):
            llamactor.tool(function)
    with pytest.raises(TypeError, match="a tool must be callable"):
        llamactor.tool(5)  # type: ignore[call-overload]


def use(**changes: Any) -> ToolUse:
    given: dict[str, Any] = {
        "tool_choice": "auto",
        "max_rounds": None,
        "parallel_tools": True,
        "on_tool_error": "report",
        "guard": None,
    }
    return check_tool_use(Toolbox([price]), **{**given, **changes})


def test_a_choice_is_a_word_or_the_name_of_a_tool() -> None:
    for choice in ("auto", "none", "required", "price"):
        assert use(tool_choice=choice).choice == choice
    with pytest.raises(ValueError, match=r"tool_choice must be one of .*'price'"):
        use(tool_choice="cost")
    with pytest.raises(ValueError, match="there is no tool; pass tools"):
        check_tool_use(
            Toolbox(),
            tool_choice="required",
            max_rounds=None,
            parallel_tools=True,
            on_tool_error="report",
            guard=None,
        )


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"max_rounds": 0}, ValueError),
        ({"max_rounds": 1.5}, TypeError),
        ({"parallel_tools": 1}, TypeError),
        ({"on_tool_error": "ignore"}, ValueError),
        ({"guard": "yes"}, TypeError),
        ({"tool_choice": None}, TypeError),
    ],
)
def test_how_tools_are_used_is_checked(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(changes))):
        use(**changes)


# --- what a handler gets, and what the model is told ----------------------------------------------


async def test_arguments_arrive_in_the_types_of_the_hints() -> None:
    got: list[object] = []

    @llamactor.tool
    def go(place: Place, size: Size, tags: set[str], how: Literal["fast", "slow"] = "fast") -> None:
        got.extend([place, size, tags, how])

    made = call("go", place={"city": "Rome"}, size="big", tags=["a", "b"])
    assert await Round(go).answers(made) == ["null"]
    assert got == [Place("Rome"), Size.BIG, {"a", "b"}, "fast"]


class Point(msgspec.Struct):
    x: int


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ("plain text", "plain text"),
        ("", ""),
        (None, "null"),
        (7, "7"),
        ({"name": "apple", "price": "$6"}, '{"name": "apple", "price": "$6"}'),
        ([1, "a", None], '[1, "a", null]'),
        (Point(3), '{"x": 3}'),
        (Place("Rome", 5), '{"city": "Rome", "zip": 5}'),
        (Size.BIG, '"big"'),
        ("ä 日本", "ä 日本"),
    ],
)
async def test_what_is_no_text_becomes_json(result: object, told: str) -> None:
    tool = Tool("t", handler=lambda: result)
    assert await Round(tool).answers(call("t")) == [told]


async def test_a_pydantic_model_becomes_json() -> None:
    model = pydantic.create_model("Fruit", name=(str, ...))
    tool = Tool("t", handler=lambda: {"best": model(name="apple")})
    assert await Round(tool).answers(call("t")) == ['{"best": {"name": "apple"}}']


TOO_LONG = "a" * (16 << 20) + "b"


@pytest.mark.parametrize(
    "result",
    [object(), {"lock": threading.Lock()}, "\ud800", TOO_LONG, [TOO_LONG]],
    ids=["object", "lock", "surrogate", "long", "long list"],
)
async def test_a_result_that_cannot_be_said_is_a_failure(result: object) -> None:
    round_ = Round(Tool("t", handler=lambda: result))
    (told,) = await round_.answers(call("t"))
    assert "the tool 't' failed" in json.loads(told)["error"]
    assert isinstance(round_.told[0].error, ToolExecutionError)


async def test_handlers_are_functions_of_every_kind() -> None:
    async def coroutine() -> str:
        return "coroutine"

    class Async:
        async def __call__(self) -> str:
            return "object"

    handlers: list[Any] = [coroutine, lambda: "plain", lambda: coroutine(), Async()]
    tools = [Tool(f"t{i}", handler=handler) for i, handler in enumerate(handlers)]
    calls = [call(one.name) for one in tools]
    assert await Round(*tools).answers(*calls) == ["coroutine", "plain", "coroutine", "object"]


async def test_plain_functions_run_in_threads_with_the_variables_of_the_context() -> None:
    language = contextvars.ContextVar("language", default="?")
    language.set("it")
    threads: list[threading.Thread] = []

    def handler() -> str:
        threads.append(threading.current_thread())
        return language.get()

    assert await Round(Tool("t", handler=handler)).answers(call("t")) == ["it"]
    assert threads[0] is not threading.current_thread()
    assert threads[0].daemon


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (call("cost", name="apple"), "there is no tool 'cost'; there are: price"),
        (call("price"), "name"),
        (call("price", name=5), "name"),
        (call("price", name="apple", count="many"), "count"),
        (call("price", name="apple", colour="red"), "colour"),
    ],
)
async def test_a_wrong_call_is_told_to_the_model(wrong: ToolCall, reason: str) -> None:
    for policy in ("report", "raise"):
        round_ = Round(price, on_error=policy)
        (told,) = await round_.answers(wrong)
        assert reason in json.loads(told)["error"]
        (result,) = round_.told
        assert result.call == wrong
        assert isinstance(result.error, ToolCallError)
        assert result.error.call == wrong
        assert round_.failures == []


async def test_arguments_that_are_none_are_told_to_the_model() -> None:
    for arguments in ("[1]", "{", '{"name": 1e999}'):
        for tool in (price, {"name": "price"}):
            made = read_call("1", "price", arguments)
            assert json.loads((await Round(tool).answers(made))[0]) == {"error": made.problem}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("[1]", "must be a dict"),
        ("{", "is no JSON"),
        ('{"amount": 1e999}', "1e999"),
        ('{"amount": 100000000000000000000000}', "100000000000000000000000"),
    ],
)
def test_a_call_whose_arguments_cannot_be_read_says_so(arguments: str, problem: str) -> None:
    made = read_call("1", "transfer", arguments)
    assert made.arguments == {}
    assert problem in str(made.problem)
    assert made != ToolCall("1", "transfer")
    (again,) = load_history(dump_history([AssistantMessage("", tool_calls=(made,))]))
    assert isinstance(again, AssistantMessage)
    assert again.tool_calls == (made,)
    assert read_call("1", "transfer", '{"amount": 1}').problem is None


async def test_a_bare_definition_s_arguments_are_checked_too() -> None:
    tool = Tool(**BARE, handler=lambda name: PRICES[name])
    good, bad = call("get_price", name="apple"), call("get_price", name=7)
    told = await Round(tool).answers(good, bad)
    assert told[0] == "$6"
    assert "7 is not of type 'string'" in json.loads(told[1])["error"]


def fails() -> None:
    raise KeyError("pear")


async def test_a_failure_is_told_to_the_model() -> None:
    round_ = Round(price, Tool("fails", handler=fails))
    told = await round_.answers(call("price", name="apple"), call("fails"))
    assert told == ["1 apple: $6", "{\"error\": \"the tool 'fails' failed: KeyError: 'pear'\"}"]
    error = round_.told[1].error if round_.told[0].error is None else round_.told[0].error
    assert isinstance(error, ToolExecutionError)
    assert isinstance(error.__cause__, KeyError)
    assert error.call.name == "fails"


class WordlessError(Exception):
    """One that cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("no file caf\udce9.txt"), "ValueError: no file caf?.txt"),
        (WordlessError(), "WordlessError"),
        (ValueError("a" * 100_000), "ValueError: aaa"),
    ],
    ids=["surrogate", "wordless", "long"],
)
async def test_every_failure_can_be_told_to_the_model(error: Exception, told: str) -> None:
    def raises(*args: object) -> None:
        raise error

    round_ = Round(Tool("t", handler=raises))
    (answer,) = await round_.answers(call("t"))
    assert json.loads(answer)["error"].startswith(f"the tool 't' failed: {told}")
    guarded = Round(Tool("t", handler=raises), guard=raises)
    (answer,) = await guarded.answers(call("t"))
    assert json.loads(answer)["error"].startswith(f"the guard of 't' failed: {told}")
    assert len(answer) < 20_000
    for result in (*round_.told, *guarded.told):
        assert isinstance(result.error, ToolExecutionError)
        assert result.error.__cause__ is error


async def test_code_of_a_parameter_s_type_may_fail_too() -> None:
    async def handler(fruit: Picky) -> str:
        return str(fruit)

    round_ = Round(llamactor.tool(name="t")(handler))
    (answer,) = await round_.answers(call("t", fruit={"name": "apple"}))
    assert "the tool 't' failed: KeyError: 'apple'" in answer
    assert isinstance(round_.told[0].error, ToolExecutionError)


async def test_a_failure_ends_the_round_if_it_is_to() -> None:
    stopped = asyncio.Event()

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    tools = [Tool("fails", handler=fails), Tool("waits", handler=waits)]
    round_ = Round(*tools, on_error="raise")
    round_.calls.add(call("waits"))
    round_.calls.add(call("fails"))
    await until(lambda: bool(round_.failures))
    await soon(round_.calls.aclose())
    assert stopped.is_set()
    assert str(round_.failures[0]) == "the tool 'fails' failed: KeyError: 'pear'"
    assert isinstance(round_.failures[0].__cause__, KeyError)


@pytest.mark.parametrize("parallel", [True, False])
async def test_after_a_failure_that_ends_it_no_other_call_begins(parallel: bool) -> None:
    begun: list[str] = []

    async def handler(name: str) -> None:
        begun.append(name)
        raise KeyError(name)

    round_ = Round(Tool("t", "", NAMED, handler), on_error="raise", parallel=parallel)
    for name in "abc":
        round_.calls.add(call("t", name, name=name))
    with pytest.raises(ToolExecutionError, match="'a'"):
        await soon(round_.calls.messages())
    await soon(round_.calls.aclose())
    assert begun == ["a"]
    assert round_.failures[0].call.id == "a"


async def never() -> None:
    await asyncio.Event().wait()


async def test_what_takes_too_long_is_a_failure() -> None:
    thread_may_end = threading.Event()
    tools = [
        Tool("task", handler=never, timeout=0.01),
        Tool("thread", handler=thread_may_end.wait, timeout=0.01),
    ]
    told = await Round(*tools).answers(call("task"), call("thread"))
    thread_may_end.set()
    assert [json.loads(one)["error"] for one in told] == [
        "the tool 'task' failed: it took longer than 0.01 s",
        "the tool 'thread' failed: it took longer than 0.01 s",
    ]


async def test_a_handler_s_own_timeout_is_told_as_its_own() -> None:
    async def impatient() -> None:
        raise TimeoutError("no answer from the shop")

    (told,) = await Round(Tool("t", handler=impatient, timeout=60)).answers(call("t"))
    assert told == '{"error": "the tool \'t\' failed: TimeoutError: no answer from the shop"}'


async def test_a_handler_that_cancels_itself_has_failed() -> None:
    async def cancels() -> None:
        task = asyncio.create_task(never())
        task.cancel()
        await task

    (told,) = await Round(Tool("t", handler=cancels)).answers(call("t"))
    assert "the tool 't' failed: what it waited for was cancelled" in told


async def test_closing_cancels_what_runs_and_waits_for_its_end() -> None:
    steps: list[str] = []

    async def handler() -> None:
        steps.append("began")
        try:
            await never()
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    round_ = Round(Tool("t", handler=handler))
    round_.calls.add(call("t"))
    await until(lambda: steps == ["began"])
    await soon(round_.calls.aclose())
    assert steps == ["began", "cleaned up"]
    assert round_.told == []


# --- order ----------------------------------------------------------------------------------------


class Meeting:
    """Handlers that wait for each other: only who runs at the same time gets through."""

    def __init__(self, size: int) -> None:
        self._here = 0
        self._size = size
        self._all = asyncio.Event()
        self.order: list[str] = []

    async def meet(self, name: str) -> str:
        self.order.append(name)
        self._here += 1
        if self._here == self._size:
            self._all.set()
        await self._all.wait()
        return name

    async def alone(self, name: str) -> str:
        self.order.append(f"{name} begins")
        for _ in range(3):
            await asyncio.sleep(0)
        self.order.append(f"{name} ends")
        return name


NAMED = {"properties": {"name": {"type": "string"}}, "required": ["name"]}


async def test_calls_are_carried_out_at_the_same_time() -> None:
    meeting = Meeting(3)
    calls = [call("meet", name, name=name) for name in "abc"]
    assert await Round(Tool("meet", "", NAMED, meeting.meet)).answers(*calls) == ["a", "b", "c"]


async def test_threads_run_at_the_same_time_too() -> None:
    barrier = threading.Barrier(3, timeout=30)
    calls = [call("meet", str(i)) for i in range(3)]
    tool = Tool("meet", handler=lambda: barrier.wait() >= 0)
    assert await Round(tool).answers(*calls) == ["true"] * 3


async def test_without_parallel_tools_one_follows_the_other_in_order() -> None:
    meeting = Meeting(1)
    calls = [call("alone", name, name=name) for name in "abc"]
    round_ = Round(Tool("alone", "", NAMED, meeting.alone), parallel=False)
    assert await round_.answers(*calls) == ["a", "b", "c"]
    assert meeting.order == [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]


async def test_answers_come_in_the_order_of_the_calls_and_are_told_as_they_come() -> None:
    first_may_end = asyncio.Event()

    async def waits(name: str) -> str:
        if name == "first":
            await first_may_end.wait()
        return name

    round_ = Round(Tool("waits", "", NAMED, waits))
    for name in ("first", "second"):
        round_.calls.add(call("waits", name, name=name))
    await until(lambda: len(round_.told) == 1)
    first_may_end.set()
    messages = await soon(round_.calls.messages())
    assert messages == (
        ToolMessage("first", "first", "waits"),
        ToolMessage("second", "second", "waits"),
    )
    assert [result.content for result in round_.told] == ["second", "first"]


async def test_calls_without_a_handler_are_left_to_the_program() -> None:
    round_ = Round(price, BARE)
    told = await round_.answers(call("get_price", name="apple"), call("price", "2", name="apple"))
    assert told == ["1 apple: $6"]
    assert not round_.calls.all_answered
    assert [one.name for one in round_.calls.calls] == ["get_price", "price"]


# --- the guard ------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def recorded(verdict: Any) -> AsyncIterator[tuple[list[ToolCall], list[Callable[..., Any]]]]:
    """Guards of both kinds that give a verdict, and the calls that they saw."""
    seen: list[ToolCall] = []

    def plain(made: ToolCall) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        seen.append(made)
        return verdict

    async def coroutine(made: ToolCall) -> Any:
        seen.append(made)
        return verdict

    yield seen, [plain, coroutine]


@pytest.mark.parametrize("verdict", [True, None])
async def test_a_guard_lets_calls_through(verdict: bool | None) -> None:
    asked = call("price", name="apple")
    async with recorded(verdict) as (seen, guards):
        for guard in guards:
            assert await Round(price, guard=guard).answers(asked) == ["1 apple: $6"]
        assert seen == [asked, asked]


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [(False, "the call was denied"), ("too dear", "the call was denied: too dear")],
)
async def test_a_denied_call_is_not_carried_out_and_the_model_learns_why(
    verdict: bool | str, reason: str
) -> None:
    carried_out: list[str] = []
    tool = Tool("buy", "", NAMED, carried_out.append)
    async with recorded(verdict) as (_, guards):
        for guard in guards:
            round_ = Round(tool, guard=guard, on_error="raise")
            assert await round_.answers(call("buy", name="apple")) == [
                json.dumps({"error": reason})
            ]
            assert isinstance(round_.told[0].error, ToolCallError)
    assert carried_out == []


async def test_a_guard_s_own_arguments_are_used_and_the_model_learns_of_them() -> None:
    async with recorded({"name": "banana", "count": 2}) as (_, guards):
        for guard in guards:
            (told,) = await Round(price, guard=guard).answers(call("price", name="apple"))
            assert told == '(called with {"name": "banana", "count": 2} instead)\n2 banana: $4'


class Odd(Mapping[str, Any]):
    """A mapping of another kind."""

    def __getitem__(self, key: str) -> Any:
        return {"name": "banana"}[key]

    def __iter__(self) -> Any:
        return iter(["name"])

    def __len__(self) -> int:
        return 1


async def test_any_mapping_has_arguments() -> None:
    async with recorded(Odd()) as (_, guards):
        (told,) = await Round(price, guard=guards[0]).answers(call("price", name="apple"))
        assert told.endswith("1 banana: $4")


@pytest.mark.parametrize("verdict", [{"name": 5}, {"fruit": "apple"}, 5, object()])
async def test_a_verdict_that_is_none_is_the_program_s_failure(verdict: object) -> None:
    async with recorded(verdict) as (_, guards):
        round_ = Round(price, guard=guards[1])
        (told,) = await round_.answers(call("price", name="apple"))
        assert "the guard of 'price' failed" in json.loads(told)["error"]
        assert isinstance(round_.told[0].error, ToolExecutionError)


async def test_a_denial_may_quote_what_is_no_text() -> None:
    round_ = Round(price, guard=lambda made: "not caf\udce9")
    (told,) = await round_.answers(call("price", name="apple"))
    assert json.loads(told)["error"] == "the call was denied: not caf?"


async def test_a_guard_whose_question_was_cancelled_has_failed() -> None:
    async def guard(made: ToolCall) -> bool:
        question = asyncio.get_running_loop().create_future()
        question.cancel()
        answer: bool = await question
        return answer

    round_ = Round(price, guard=guard)
    (told,) = await round_.answers(call("price", name="apple"))
    assert "the guard of 'price' failed: what it waited for was cancelled" in told
    assert isinstance(round_.told[0].error, ToolExecutionError)


async def test_a_result_too_long_with_its_note_is_a_failure() -> None:
    tool = Tool("t", "", NAMED, handler=lambda name: TOO_LONG[1:])
    async with recorded({"name": "pear"}) as (_, guards):
        (told,) = await Round(tool, guard=guards[0]).answers(call("t", name="apple"))
        assert "the tool 't' failed" in told


async def test_a_guard_that_fails_lets_nothing_through() -> None:
    def guard(made: ToolCall) -> bool:
        raise PermissionError("ask again later")

    carried_out: list[str] = []
    tool = Tool("buy", "", NAMED, carried_out.append)
    (told,) = await Round(tool, guard=guard).answers(call("buy", name="apple"))
    assert "ask again later" in told
    assert carried_out == []
    round_ = Round(tool, guard=guard, on_error="raise")
    round_.calls.add(call("buy", name="apple"))
    await until(lambda: bool(round_.failures))
    await soon(round_.calls.aclose())


async def test_a_guard_is_asked_one_question_at_a_time_while_handlers_run() -> None:
    asked = 0
    meeting = Meeting(3)

    async def guard(made: ToolCall) -> bool:
        nonlocal asked
        asked += 1
        assert asked == 1
        await asyncio.sleep(0)
        asked -= 1
        return True

    calls = [call("meet", name, name=name) for name in "abc"]
    round_ = Round(Tool("meet", "", NAMED, meeting.meet), guard=guard)
    assert await round_.answers(*calls) == ["a", "b", "c"]
    assert meeting.order == ["a", "b", "c"]


async def test_wrong_calls_do_not_come_before_the_guard() -> None:
    async with recorded(verdict=True) as (seen, guards):
        await Round(price, guard=guards[1]).answers(call("price"), call("cost"))
        assert seen == []
