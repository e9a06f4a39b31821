"""From messages to a prompt, by the model's chat template.

The core renders and tokenises on a thread of its own (``rust/chat/``); here messages become what
templates of Hugging Face's kind expect, and the answer becomes a `RenderedChat`. What messages say
never becomes a control token, whatever it spells.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from llamactor import _checks as check
from llamactor._hub import finish, hub_for, running_loop
from llamactor.chat.messages import AssistantMessage, SystemMessage, ToolMessage
from llamactor.errors import ChatTemplateError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llamactor import _core
    from llamactor._hub import LoopHub
    from llamactor.calls import ToolCall
    from llamactor.chat.messages import Message


class ReasoningTags(msgspec.Struct, frozen=True):
    """What encloses the thoughts of an answer."""

    start: str
    """What opens them."""
    end: str
    """What ends them."""
    opened: bool
    """Whether the prompt has opened them already."""


class CallFormat(msgspec.Struct, frozen=True):
    """How an answer calls tools: what it must obey, and how it is read."""

    name: str
    """llama.cpp's name of the format, or "hermes" for the library's own."""
    described: bool
    """Whether the template has no format of its own, so that the prompt describes one."""
    reader: dict[str, Any]
    """How calls are found in the answer: the core's option ``calls``."""
    constraint: dict[str, Any] | None
    """What the answer must obey: the core's option ``constraint``; None if nothing."""


class RenderedChat(msgspec.Struct, frozen=True):
    """A prompt made of messages."""

    text: str
    """The whole prompt."""
    tokens: list[int]
    """Its tokens."""
    ends: list[int]
    """For each message how many tokens the prompt has up to its end; never falling."""
    reasoning: ReasoningTags | None
    """The tags round the thoughts of an answer; None if the template knows none."""
    stops: list[str]
    """Strings that end an answer, besides the model's own tokens."""
    neutralised: bool
    """Whether control tokens that contents name were hidden from the template, which looks for
    them, so that the text may differ from what it would make of them."""
    calls: CallFormat | None = None
    """How the answer may call tools; None if it may not, or nobody asked."""


ToolChoice: TypeAlias = str
"""What may be called: "auto", "none", "required", or the name of one tool, which is required."""


async def render_chat(
    native_model: _core.Model,
    template: str | None,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: ToolChoice | None = None,
    parallel_tools: bool = True,
    add_generation_prompt: bool = True,
    open_ended: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> RenderedChat:
    """Return the prompt that a template makes of messages.

    A template that knows no tools is given them as text, if `tool_choice` is: the system message
    says what they are and how they are called (in a first message of the user where the template
    refuses a system message), calls are written into the answers, and results are what a user says.
    Of one that shows calls but not the tools, the system message says what they are.

    Cancelling this keeps nothing.

    Args:
        native_model: The model whose vocabulary, and without `template` whose template, is used.
        template: Text of a Jinja template, or None.
        messages: The history; tokens that an `AssistantMessage` carries are kept where the
            template shows its text unchanged or only trimmed.
        tools: Definitions as JSON Schema, as OpenAI's interface has them.
        tool_choice: What may be called, or None: then tools are the template's own affair, and the
            answer is not said to call any. The name of a tool leaves the others out.
        parallel_tools: Whether the answer may call several.
        add_generation_prompt: End with the header of an answer.
        open_ended: End with the last message's content, nothing behind it.
        kwargs: Further names for the template, such as ``enable_thinking``.

    Raises:
        ChatTemplateError: the template fails, refuses the messages, or leaves one out.
        ClosedError: the model is closed.
        GrammarError: with `tool_choice`, for parameters of a tool that no grammar can be made of.
        ValueError: `tool_choice` names no tool.
    """
    hub = hub_for(running_loop("render_chat"))
    tools, choice = _chosen(tools, tool_choice)
    request: dict[str, Any] = {
        "template": template,
        "messages": [_for_template(message) for message in messages],
        "turns": [_turn(message) for message in messages],
        "tools": tools,
        "tool_choice": choice,
        "parallel_tools": parallel_tools,
        "kwargs": kwargs or {},
        "add_generation_prompt": add_generation_prompt and not open_ended,
        "open_ended": open_ended,
    }
    outcome = await _render(hub, native_model, request)
    if outcome.rendered is None and await _passes_trial(native_model, request):
        outcome = await _render(hub, native_model, {**request, "renderer": "llama_cpp"})
    if outcome.rendered is None:
        raise ChatTemplateError(outcome.unsupported)
    return outcome.rendered


def _chosen(
    tools: Sequence[Mapping[str, Any]], choice: ToolChoice | None
) -> tuple[Sequence[Mapping[str, Any]], str | None]:
    """Return the tools to offer and what may be called, as the core has it."""
    if choice is None or choice in ("auto", "none"):
        return tools, choice
    if choice != "required":
        named = [tool for tool in tools if tool.get("function", tool).get("name") == choice]
        tools, choice = named, f"the tool {choice!r}"
    if not tools:
        raise ValueError(f"tool_choice wants {choice}, but there is no such tool")
    return tools, "required"


class _Outcome(msgspec.Struct, frozen=True):
    """One of the two."""

    rendered: RenderedChat | None = None
    unsupported: str | None = None


async def _render(hub: LoopHub, native_model: _core.Model, request: Mapping[str, Any]) -> _Outcome:
    call = native_model.render_chat(hub.native, msgspec.json.encode(request))
    return msgspec.json.decode(await finish(hub, call), type=_Outcome)


_TRIAL_SECONDS = 20.0
_trials: dict[str, bool] = {}  # templates that the core's renderer cannot do, and what came of it


async def _passes_trial(native_model: _core.Model, request: Mapping[str, Any]) -> bool:
    """Whether llama.cpp can render a template that the core's own renderer cannot.

    llama.cpp's renderer has no bounds, so the first time it runs in a process that can be killed.
    """
    template = request["template"] or native_model.info()["chat_template"]
    if not isinstance(template, str):
        return False
    if template not in _trials:
        names = ("messages", "tools", "kwargs")
        trial = {"template": template, **{name: request[name] for name in names}}
        _trials[template] = await _try_elsewhere(msgspec.json.encode(trial))
    return _trials[template]


async def _try_elsewhere(trial: bytes) -> bool:
    """Run a trial in a process of its own; False when it fails or takes too long."""
    if not sys.executable:
        return False
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "llamactor.chat._trial"),
        stdin=PIPE,
        stdout=DEVNULL,
        stderr=DEVNULL,
    )
    try:
        async with asyncio.timeout(_TRIAL_SECONDS):
            await process.communicate(trial)
    except TimeoutError:
        return False
    finally:
        if process.returncode is None:
            process.kill()
            await asyncio.shield(process.wait())
    return process.returncode == 0


def check_template_names(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return names for a template, or raise for one that means something else, or no JSON.

    Raises:
        TypeError: a name is taken, or a value is none that JSON can say.
    """
    taken = {"messages", "tools", "add_generation_prompt"} & set(names)
    if taken:
        raise TypeError(f"{min(taken)!r} cannot be given twice; it has an argument of its own")
    try:
        msgspec.json.encode(names)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"names for a chat template must be values of JSON: {error}") from None
    return dict(names)


def check_tool_definitions(tools: object) -> list[dict[str, Any]]:
    """Return definitions of tools in the form that templates expect.

    Args:
        tools: Each a dict with "name", "description" and "parameters", alone or as "function";
            what is None is left out.

    Raises:
        TypeError: one is no dict, or has no name.
    """
    return [_definition(i, tool) for i, tool in enumerate(check.check_items("tools", tools))]


def _definition(index: int, tool: object) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise TypeError(f"tools[{index}] must be a dict, not {check.describe(tool)}")
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise TypeError(f'tools[{index}] needs a "name", a str')
    said = {key: value for key, value in function.items() if value is not None}
    if function is not tool:
        return {"type": "function", **tool, "function": said}
    said.pop("type", None)
    return {"type": "function", "function": said}


def _for_template(message: Message) -> dict[str, Any]:
    """The message as Hugging Face's templates expect it."""
    match message:
        case AssistantMessage():
            return _assistant(message)
        case ToolMessage():
            return _tool(message)
        case SystemMessage():
            return {"role": "system", "content": message.content}
        case _:
            return {"role": "user", "content": message.content}


def _assistant(message: AssistantMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": "assistant", "content": message.content}
    if message.reasoning is not None:
        # Qwen, GLM and DeepSeek read the first, gpt-oss the second.
        fields["reasoning_content"] = fields["thinking"] = message.reasoning
    if message.tool_calls:
        fields["tool_calls"] = [_call(call) for call in message.tool_calls]
    return fields


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    fields: dict[str, Any] = {"type": "function", "function": function}
    return fields if call.id is None else {**fields, "id": call.id}


def _tool(message: ToolMessage) -> dict[str, Any]:
    fields = {"role": "tool", "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _turn(message: Message) -> dict[str, Any] | None:
    """The tokens that a model has written, if it has."""
    if not isinstance(message, AssistantMessage) or not message.tokens:
        return None
    return {"tokens": message.tokens, "content_start": message.content_start}
