"""The messages of a chat: typed, made from plain dicts too, and kept as JSON with a version.

Every message checks itself when it is made, so whatever exists is sound; `to_messages` adds which
one of a list was wrong. The JSON form of a message is also a dict that is accepted everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import msgspec

from llamactor import _checks as check
from llamactor.calls import ToolCall

HISTORY_VERSION = 1
"""Version of the JSON form of a history; a reader refuses versions it does not know."""

_MAX_TOKEN = 2**31 - 1


class SystemMessage(msgspec.Struct, frozen=True, tag_field="role", tag="system"):
    """What the developer tells the model about its task."""

    content: str
    """The text."""

    def __post_init__(self) -> None:
        """Check the type."""
        check.check_text("content", self.content)


class UserMessage(msgspec.Struct, frozen=True, tag_field="role", tag="user"):
    """What the user says."""

    content: str
    """The text."""

    def __post_init__(self) -> None:
        """Check the type."""
        check.check_text("content", self.content)


class AssistantMessage(
    msgspec.Struct, frozen=True, omit_defaults=True, tag_field="role", tag="assistant"
):
    """What the model answered."""

    content: str = ""
    """The text, reasoning left out, response prefix included."""
    reasoning: str | None = None
    """What it thought before it answered."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Tools it wants called, in order."""
    tokens: tuple[int, ...] | None = None
    """Ids of the whole turn as evaluated: after the header, before the token that ends the turn.

    Response prefix and reasoning are among them. With them the next turn evaluates only what is
    new; None is a turn that no model here has made, or one that was edited.
    """
    content_start: int = 0
    """Index in `tokens` where the content begins, after the reasoning."""

    def __post_init__(self) -> None:
        """Check types and ranges; lists become tuples."""
        check.check_text("content", self.content)
        _optional_text("reasoning", self.reasoning)
        calls = check.check_items("tool_calls", self.tool_calls)
        _set(self, "tool_calls", tuple(_tool_call(i, call) for i, call in enumerate(calls)))
        if self.tokens is not None:
            tokens = check.check_tokens("tokens", self.tokens, _MAX_TOKEN, empty=True)
            _set(self, "tokens", tuple(tokens))
        hint = "it is an index in tokens"
        check.check_int("content_start", self.content_start, 0, len(self.tokens or ()), hint=hint)


class ToolMessage(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="role", tag="tool"):
    """What a tool answered to a call."""

    content: str
    """The result as text."""
    tool_call_id: str | None = None
    """The `ToolCall.id` that it answers to."""
    name: str | None = None
    """Name of the tool."""

    def __post_init__(self) -> None:
        """Check the types."""
        check.check_text("content", self.content)
        _optional_text("tool_call_id", self.tool_call_id)
        _optional_text("name", self.name)


Message: TypeAlias = SystemMessage | UserMessage | AssistantMessage | ToolMessage
MessageLike: TypeAlias = "Message | Mapping[str, Any]"
"""A message, or a dict with "role" and "content"; those of OpenAI's interface too."""

_KINDS: dict[str, type[Message]] = {
    "system": SystemMessage,
    "developer": SystemMessage,
    "user": UserMessage,
    "assistant": AssistantMessage,
    "tool": ToolMessage,
}
_ALIASES = {"reasoning_content": "reasoning"}


def to_messages(items: Iterable[MessageLike], *, name: str = "messages") -> tuple[Message, ...]:
    """Return typed messages from messages and dicts, which may be mixed.

    Args:
        items: Each a message or a dict with "role" (system, developer, user, assistant, tool) and
            "content" (text, or a list of text parts). Dicts of OpenAI's interface work: "function"
            in tool calls with arguments as JSON text, fields that are None or empty.
        name: What to call the list in errors.

    Raises:
        TypeError: something has the wrong type; the message says which and where.
        ValueError: a role is unknown, or a text cannot be UTF-8.
    """
    if isinstance(items, (str, bytes, Mapping)) or not hasattr(type(items), "__iter__"):
        raise TypeError(
            f"{name} must be a list of messages or dicts, not {check.describe(items)}; "
            'for example [{"role": "user", "content": "Hi"}]'
        )
    return tuple(_message(f"{name}[{i}]", item) for i, item in enumerate(items))


def dump_history(messages: Iterable[MessageLike]) -> bytes:
    """Return messages as JSON: an object with "version" and "messages"; token ids are kept."""
    return msgspec.json.encode({"version": HISTORY_VERSION, "messages": to_messages(messages)})


def load_history(data: bytes | str) -> tuple[Message, ...]:
    """Return the messages of what `dump_history` wrote.

    Args:
        data: The JSON, as bytes or text.

    Raises:
        TypeError: `data` is neither bytes nor text, or a message has the wrong type.
        ValueError: it is no JSON, of an unknown version, or a message is wrong.
    """
    if not isinstance(data, (bytes, bytearray, memoryview, str)):
        raise TypeError(f"a history is bytes or a str, not {check.describe(data)}")
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise ValueError(f"this is no history: {error}") from None
    version = value.get("version") if isinstance(value, dict) else None
    if version != HISTORY_VERSION or isinstance(version, bool):
        raise ValueError(
            f"a history has version {HISTORY_VERSION}, this has {check.describe(version)}; "
            "one of a later version needs a later llamactor"
        )
    if not isinstance(value.get("messages"), list):
        raise ValueError('a history has a list "messages"; this has none')
    return to_messages(value["messages"])


def _message(name: str, item: object) -> Message:
    if isinstance(item, Message):
        return item
    if not isinstance(item, Mapping):
        raise TypeError(
            f"{name} must be a message or a dict, not {check.describe(item)}; "
            'for example {"role": "user", "content": "Hi"}'
        )
    try:
        kind = _kind(item.get("role"))
        return kind(**_fields(kind, item))
    except (TypeError, ValueError) as error:
        raise _named(name, error) from None


def _named(name: str, error: TypeError | ValueError) -> TypeError | ValueError:
    """The same error, saying where."""
    kind = TypeError if isinstance(error, TypeError) else ValueError
    return kind(f"{name}: {error}")


def _kind(role: object) -> type[Message]:
    check.check_choice("role", role, _KINDS)
    return _KINDS[str(role)]


def _fields(kind: type[Message], item: Mapping[Any, Any]) -> dict[str, Any]:
    """The keyword arguments of a dict; what is None or empty says nothing and is left out."""
    known = kind.__struct_fields__
    given: dict[str, Any] = {}
    for key, value in item.items():
        field = _ALIASES.get(key, key)
        if field in known and value is not None:
            given[field] = _joined(value) if field == "content" else value
        elif key != "role" and value not in (None, "", [], {}):
            check.check_known([str(key)], ("role", *known), f"field of a {item['role']} message")
    if "content" in known and "content" not in given and kind is not AssistantMessage:
        raise TypeError(f'a {item["role"]} message needs "content", a str')
    return given


def _joined(content: object) -> object:
    """The text of a list of text parts, in OpenAI's form; anything else is for the check."""
    if not isinstance(content, (list, tuple)):
        return content
    return "".join(_part(i, part) for i, part in enumerate(content))


def _part(index: int, part: object) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise TypeError(
            f"content[{index}] must be a text part, not {check.describe(kind)}; "
            'for example {"type": "text", "text": "Hi"}'
        )
    return check.check_text(f"content[{index}].text", part.get("text"))


def _tool_call(index: int, call: object) -> ToolCall:
    """A call from a `ToolCall`, our own dict, or OpenAI's with "function" in it."""
    name = f"tool_calls[{index}]"
    if isinstance(call, ToolCall):
        return call
    if not isinstance(call, Mapping):
        raise TypeError(f"{name} must be a ToolCall or a dict, not {check.describe(call)}")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or "name" not in function:
        raise TypeError(f'{name} needs the "name" of a tool, and "arguments" as a dict or JSON')
    try:
        arguments = function.get("arguments")
        return ToolCall(
            call.get("id"),
            function["name"],
            {} if arguments is None else arguments,
            call.get("problem"),
        )
    except (TypeError, ValueError) as error:
        raise _named(name, error) from None


def _optional_text(name: str, value: object) -> None:
    if value is not None:
        check.check_text(name, value)


def _set(struct: msgspec.Struct, name: str, value: object) -> None:
    msgspec.structs.force_setattr(struct, name, value)
