"""Tools: functions that a model may call, and what happens when it does.

A tool is what the model is told (name, description, schema of the parameters) and, where the
program is to do the work itself, a handler. `ToolCalls` carries out the calls of one round: each is
checked, shown to the guard, run, and answered with a text. What goes wrong is told to the model, so
that it can do better; a handler's failure ends the prediction instead if that is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import inspect
import re
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, overload

import msgspec

from llamactor import _checks as check
from llamactor.calls import ToolCall, json_object
from llamactor.chat.messages import Message, ToolMessage
from llamactor.chat.template import check_tool_definitions
from llamactor.errors import LlamactorError, ToolCallError, ToolExecutionError
from llamactor.options import GenerationKeywords
from llamactor.prediction import ToolResult
from llamactor.schema import schema_of, schema_of_function

if TYPE_CHECKING:
    from llamactor.schema import Schema

T = TypeVar("T")

Handler: TypeAlias = Callable[..., Any]
"""Takes the arguments of a call by name; what it returns, or what comes of awaiting that, is told
to the model: a str as it is, anything else as JSON."""

Verdict: TypeAlias = "bool | str | Mapping[str, Any] | None"
"""What a guard says of a call: True or None lets it through, False or a reason denies it, and a
dict has other arguments for it."""

Guard: TypeAlias = "Callable[[ToolCall], Verdict | Awaitable[Verdict]]"
"""Looks at a call before it is carried out."""

ToolLike: TypeAlias = "Tool | Handler | Mapping[str, Any]"
"""A tool, a function to make one of, or a bare definition whose calls are returned."""

OnToolError: TypeAlias = Literal["report", "raise"]

CHOICES = ("auto", "none", "required")
"""Choices of tools that are no names."""

_LONGEST_REASON = 10_000
"""Characters of an error that a model is told."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclasses.dataclass(frozen=True, eq=False)
class Tool:
    """Something that a model may call: what it is told of it, and what then runs."""

    name: str
    """Name: up to 64 letters, digits, ``_``, ``-`` and ``.``."""
    description: str = ""
    """What it does, for the model."""
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """JSON Schema of the arguments, an object's; {} is a tool without any."""
    handler: Handler | None = None
    """Called with the arguments by name: a coroutine function on the loop, any other in a thread.
    None returns calls to the program."""
    timeout: float | None = None
    """Seconds that a call may take; None is no limit. A thread that takes longer is left alone."""
    _convert: Callable[[dict[str, Any]], dict[str, Any]] = dataclasses.field(
        init=False, repr=False, default=dict
    )

    def __post_init__(self) -> None:
        """Check everything, and prepare the check of arguments."""
        _check_name(self.name)
        check.check_text("description", self.description)
        parameters = _parameters(self.name, self.parameters)
        if self.handler is not None:
            check.check_callable("handler", self.handler)
            _check_schema(self.name, parameters)
        if self.timeout is not None:
            check.check_float("timeout", self.timeout, 0.0, above=True, hint="in seconds")
        _freeze(self, "parameters", parameters)
        schema: Schema[dict[str, Any]] = schema_of(parameters)
        _freeze(self, "_convert", schema.convert_value)

    @property
    def definition(self) -> dict[str, Any]:
        """The definition that chat templates get."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the handler, as if it were no tool.

        Raises:
            TypeError: there is none.
        """
        if self.handler is None:
            raise TypeError(f"the tool {self.name!r} has no handler to call")
        return self.handler(*args, **kwargs)

    def arguments(self, call: ToolCall) -> dict[str, Any]:
        """Return the arguments of a call as the handler takes them.

        Raises:
            SchemaValidationError: they do not fit the parameters.
        """
        return self._convert(call.arguments)


@overload
def tool(function: Handler, /) -> Tool: ...


@overload
def tool(
    *, name: str | None = None, description: str | None = None, timeout: float | None = None
) -> Callable[[Handler], Tool]: ...


def tool(
    function: Handler | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    timeout: float | None = None,
) -> Tool | Callable[[Handler], Tool]:
    """Make a tool of a function: ``@llamactor.tool``, with arguments or without.

    The parameters' schema comes from the type hints, and from the docstring's ``Args:`` section
    what each one is; values arrive in the types of the hints. The tool can be called like the
    function.

    Args:
        function: A function, plain or of coroutines.
        name: What the model calls it; the function's name if None.
        description: What it does; the docstring's beginning if None.
        timeout: Seconds that a call may take; None is no limit.

    Raises:
        TypeError: the function has parameters that a model cannot fill, or types without a schema.
        ValueError: the name is none.
    """
    if function is None:
        return functools.partial(_of_function, name=name, description=description, timeout=timeout)
    return _of_function(function, name=name, description=description, timeout=timeout)


def _of_function(
    function: Handler, *, name: str | None, description: str | None, timeout: float | None
) -> Tool:
    check.check_callable("a tool", function)
    schema = schema_of_function(function)
    made = Tool(
        name=schema.name if name is None else name,
        description=schema.description if description is None else description,
        parameters=schema.json,
        timeout=timeout,
    )
    _freeze(made, "handler", function)
    _freeze(made, "_convert", schema.convert_arguments)
    return made


def _check_name(name: object) -> None:
    text = check.check_text("name", name, empty=False)
    if not _NAME.fullmatch(text):
        raise ValueError(
            f"a tool's name is up to 64 letters, digits, '_', '-' and '.', not {text[:80]!r}"
        )


def _parameters(name: str, value: object) -> dict[str, Any]:
    parameters = json_object(f"parameters of {name!r}", value)
    kind = parameters.setdefault("type", "object")
    if kind != "object":
        raise ValueError(
            f"parameters of {name!r} must be the JSON Schema of an object, not of {kind!r}"
        )
    parameters.setdefault("properties", {})
    return parameters


def _check_schema(name: str, parameters: dict[str, Any]) -> None:
    import jsonschema  # a large one, which tools made of functions do not need

    try:
        jsonschema.validators.validator_for(parameters).check_schema(parameters)
    except jsonschema.SchemaError as error:
        place = "/".join(map(str, error.absolute_path))
        raise ValueError(
            f"parameters of {name!r} are no JSON Schema: {error.message} at {place!r}"
        ) from None


def _freeze(made: Tool, name: str, value: object) -> None:
    object.__setattr__(made, name, value)


# --- several of them ------------------------------------------------------------------------------


class Toolbox:
    """The tools of a prompt: the names differ, and each is what it was given as."""

    __slots__ = ("_tools", "definitions")

    def __init__(self, tools: Iterable[ToolLike] = ()) -> None:
        """Take tools, functions and definitions, which may be mixed.

        Raises:
            TypeError: one is none of them.
            ValueError: a name is none, or there twice.
        """
        self._tools: dict[str, Tool] = {}
        self.definitions: tuple[Mapping[str, Any], ...] = ()
        """As templates get them; a bare definition stays as it was given."""
        for index, item in enumerate(check.check_items("tools", tools)):
            self._add(f"tools[{index}]", item)

    def _add(self, where: str, item: object) -> None:
        made, definition = _made(where, item)
        if made.name in self._tools:
            raise ValueError(f"{where}: there is a tool {made.name!r} already; names must differ")
        self._tools[made.name] = made
        self.definitions += (definition,)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._tools)

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self._tools)

    @property
    def has_handlers(self) -> bool:
        """Whether the program is to carry out calls by itself."""
        return any(one.handler is not None for one in self._tools.values())

    def get(self, name: str) -> Tool | None:
        """Return the tool of that name, or None."""
        return self._tools.get(name)


def _made(where: str, item: object) -> tuple[Tool, Mapping[str, Any]]:
    """The tool that an item stands for, and its definition."""
    try:
        if isinstance(item, Tool):
            return item, item.definition
        if isinstance(item, Mapping):
            return _bare(item)
        if callable(item):
            made = _of_function(item, name=None, description=None, timeout=None)
            return made, made.definition
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {error}") from None
    raise TypeError(
        f"{where} must be a tool, a function or a dict, not {check.describe(item)}; "
        'for example {"name": "now", "description": "The time", "parameters": {}}'
    )


def _bare(item: Mapping[str, Any]) -> tuple[Tool, Mapping[str, Any]]:
    (definition,) = check_tool_definitions([dict(item)])
    function = definition["function"]
    made = Tool(
        name=function["name"],
        description=function.get("description") or "",
        parameters={} if function.get("parameters") is None else function["parameters"],
    )
    return made, definition


def to_toolbox(tools: Iterable[ToolLike] | Toolbox | None) -> Toolbox:
    """Return a toolbox of what was given; None is an empty one."""
    return tools if isinstance(tools, Toolbox) else Toolbox(tools or ())


class ToolKeywords(GenerationKeywords, total=False):
    """How a prediction generates and uses its tools; see `Model.act`."""

    tool_choice: str
    max_rounds: int | None
    parallel_tools: bool
    on_tool_error: OnToolError
    guard: Guard | None
    on_message: Callable[[Message], object] | None


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """The tools of a prompt, and how they are used."""

    tools: Toolbox
    """What there is."""
    choice: str = "auto"
    """`CHOICES`, or the name of the tool to call."""
    max_rounds: int | None = None
    """How often the model is asked at most; the last time it has no tools. None is no limit."""
    parallel: bool = True
    """Whether calls of one round are carried out at the same time."""
    on_error: OnToolError = "report"
    """What a handler's failure does."""
    guard: Guard | None = None
    """Looks at each call first."""


def check_tool_use(
    tools: Toolbox,
    *,
    tool_choice: object,
    max_rounds: object,
    parallel_tools: object,
    on_tool_error: object,
    guard: object,
) -> ToolUse:
    """Return how tools are used, or raise for what cannot be.

    Raises:
        TypeError: something has the wrong type.
        ValueError: a number is out of range, or a choice is unknown or has no tool.
    """
    choice = check.check_choice("tool_choice", tool_choice, (*CHOICES, *tools.names))
    if choice == "required" and not tools:
        raise ValueError("tool_choice is 'required' and there is no tool; pass tools")
    rounds = None if max_rounds is None else check.check_int("max_rounds", max_rounds, 1)
    policy = check.check_choice("on_tool_error", on_tool_error, ("report", "raise"))
    return ToolUse(
        tools=tools,
        choice=choice,
        max_rounds=rounds,
        parallel=check.check_bool("parallel_tools", parallel_tools),
        on_error="raise" if policy == "raise" else "report",
        guard=None if guard is None else check.check_callable("guard", guard),
    )


# --- carrying out ---------------------------------------------------------------------------------


class Answer(msgspec.Struct, frozen=True):
    """What the model is told of a call, and what went wrong."""

    content: str
    """The text."""
    error: LlamactorError | None = None
    """What went wrong; the model is told that too."""


class ToolCalls:
    """The calls of one round: each starts as soon as it is complete, and all are answered."""

    def __init__(
        self,
        use: ToolUse,
        *,
        tell: Callable[[ToolResult], object],
        fail: Callable[[ToolExecutionError], object],
    ) -> None:
        """Begin without a call.

        Args:
            use: The tools and how they are used.
            tell: Called with each answer as it comes.
            fail: Called with the first failure of a handler, if failures are to end it all.
        """
        self._use = use
        self._tell = tell
        self._fail = fail
        self._turn = asyncio.Lock()
        self._calls: list[ToolCall] = []
        self._tasks: list[asyncio.Task[ToolMessage]] = []

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """All calls so far."""
        return tuple(self._calls)

    @property
    def all_answered(self) -> bool:
        """Whether there is nothing for the program itself to answer."""
        return len(self._tasks) == len(self._calls)

    def add(self, call: ToolCall) -> None:
        """Take a complete call and start it, unless its tool has no handler."""
        self._calls.append(call)
        wanted = self._use.tools.get(call.name)
        if call.problem is None and wanted is not None and wanted.handler is None:
            return
        loop = asyncio.get_running_loop()
        work = self._answered(call)
        self._tasks.append(loop.create_task(work, name=f"llamactor-tool-{call.name}"))

    async def messages(self) -> tuple[ToolMessage, ...]:
        """Return the answers in the order of the calls, once all are there.

        Cancelling this leaves them running; see `aclose`.

        Raises:
            ToolExecutionError: a handler failed, and failures are to end it all.
        """
        if self._tasks:
            await asyncio.wait(self._tasks)
        for task in self._tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        return tuple(task.result() for task in self._tasks)

    async def aclose(self) -> None:
        """Cancel what still runs and wait until it has ended. Cancelling this stops the waiting."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for task in self._tasks:
            if not task.cancelled():
                task.exception()  # it was told when it came

    async def _answered(self, call: ToolCall) -> ToolMessage:
        try:
            answer = await self._carry_out(call)
        except ToolExecutionError as error:
            if self._use.on_error == "raise":
                self._stop()
                self._fail(error)
                raise
            answer = Answer(_told(str(error)), error)
        self._tell(ToolResult(call, answer.content, answer.error))
        return ToolMessage(answer.content, call.id, call.name)

    def _stop(self) -> None:
        """Cancel all others, also those that have not begun."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def _carry_out(self, call: ToolCall) -> Answer:
        """Check a call, have it guarded and run; in order if not in parallel."""
        if not self._use.parallel:
            async with self._turn:
                return await self._guarded(call)
        return await self._guarded(call)

    async def _guarded(self, call: ToolCall) -> Answer:
        wanted = self._use.tools.get(call.name)
        if wanted is None:
            known = ", ".join(self._use.tools.names)
            return _refused(call, f"there is no tool {call.name!r}; there are: {known}")
        problem = call.problem or _problem(wanted, call)
        if problem is not None:
            return _refused(call, problem)
        if self._use.guard is None:
            return Answer(await _run(wanted, call))
        # Somebody may have to be asked, who answers one question after the other.
        async with self._turn if self._use.parallel else contextlib.nullcontext():
            verdict = await _verdict(self._use.guard, call)
        return await self._judged(wanted, call, verdict)

    async def _judged(self, wanted: Tool, call: ToolCall, verdict: Verdict) -> Answer:
        match verdict:
            case None | True:
                return Answer(await _run(wanted, call))
            case False:
                return _refused(call, "the call was denied")
            case str():
                return _refused(call, f"the call was denied: {verdict}")
        edited = _edited(wanted, call, verdict)
        note = f"(called with {_json(edited.arguments)} instead)\n"
        return Answer(await _run(wanted, edited, note))


def _told(text: str) -> str:
    """An error as a model is told it, also one that quotes what is no text."""
    said = text[:_LONGEST_REASON].encode("utf-8", "replace").decode()
    return _json({"error": said})


def _refused(call: ToolCall, reason: str) -> Answer:
    return Answer(_told(reason), ToolCallError(reason, call))


def _problem(wanted: Tool, call: ToolCall) -> str | None:
    try:
        wanted.arguments(call)
    except ValueError as error:
        return f"the arguments of {call.name!r} are wrong: {error}"
    except Exception as error:  # code of the parameters' types
        raise ToolExecutionError(f"the tool {call.name!r} failed: {_named(error)}", call) from error
    return None


def _edited(wanted: Tool, call: ToolCall, verdict: object) -> ToolCall:
    """The call with a guard's arguments; that they fit is the program's own business."""
    try:
        edited = ToolCall(call.id, call.name, json_object("the guard's verdict", verdict))
        wanted.arguments(edited)
    except (TypeError, ValueError) as error:
        raise ToolExecutionError(f"the guard of {call.name!r} failed: {error}", call) from error
    return edited


_GIVEN_UP = "what it waited for was cancelled"


async def _verdict(guard: Guard, call: ToolCall) -> Verdict:
    cause: BaseException
    try:
        verdict: Verdict = await _called(guard, call)
    except asyncio.CancelledError as error:
        if _is_cancelled():
            raise
        reason, cause = _GIVEN_UP, error
    except Exception as error:
        reason, cause = _named(error), error
    else:
        return verdict
    raise ToolExecutionError(f"the guard of {call.name!r} failed: {reason}", call) from cause


def _is_cancelled() -> bool:
    """Whether this task is cancelled, and not just what it waited for."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


async def _run(wanted: Tool, call: ToolCall, note: str = "") -> str:
    """Run the handler of a call; return its result as text, behind a note.

    Raises:
        ToolExecutionError: it failed, or took too long, or its result cannot be said.
    """
    handler: Any = wanted.handler
    cause: BaseException
    try:
        async with asyncio.timeout(wanted.timeout) as limit:
            result = await _called(handler, **wanted.arguments(call))
        return check.check_text("its result", note + _text(result))
    except asyncio.CancelledError as error:
        if _is_cancelled():
            raise
        reason, cause = _GIVEN_UP, error
    except Exception as error:
        late = isinstance(error, TimeoutError) and limit.expired()
        reason = f"it took longer than {wanted.timeout} s" if late else _named(error)
        cause = error
    raise ToolExecutionError(f"the tool {call.name!r} failed: {reason}", call) from cause


def _named(error: Exception) -> str:
    """Kind and words of an error, which may have none."""
    kind = type(error).__name__
    try:
        words = str(error)
    except Exception:
        return kind
    return f"{kind}: {words}" if words else kind


def _text(result: object) -> str:
    return result if isinstance(result, str) else _json(result)


def _json(value: object) -> str:
    """JSON as models know it: with a space behind commas and colons."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=_plain), indent=0).decode()


def _plain(value: object) -> object:
    """What JSON can say of an object that msgspec does not know: a pydantic model."""
    dump = getattr(value, "model_dump", None)
    if dump is None:
        raise TypeError(f"its result cannot be JSON: it has {check.describe(value)}")
    return dump(mode="json")


async def _called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function: one of coroutines here, any other in a thread of its own."""
    call = functools.partial(function, *args, **kwargs)
    if _makes_coroutines(function):
        return await call()
    result = await in_thread(call)
    return await result if inspect.isawaitable(result) else result


def _makes_coroutines(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 -- of a callable object
    )


async def in_thread(function: Callable[[], T]) -> T:
    """Call a function in a thread of its own and return what it returns, or raise what it raises.

    The thread ends with the process, whatever it does: a function that hangs holds up nobody.
    Cancelling this leaves the thread alone, and nobody hears what comes of it.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[T | None, BaseException | None]] = loop.create_future()
    context = contextvars.copy_context()

    def deliver(outcome: tuple[T | None, BaseException | None]) -> None:
        if not done.done():
            done.set_result(outcome)

    def run() -> None:
        try:
            outcome: tuple[T | None, BaseException | None] = context.run(function), None
        except BaseException as error:
            outcome = None, error
        with contextlib.suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(deliver, outcome)

    threading.Thread(target=run, name="llamactor-tool", daemon=True).start()
    value, error = await done
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
