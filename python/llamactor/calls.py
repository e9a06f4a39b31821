"""A call of a tool, and the values that its arguments may have: those that JSON can say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from llamactor import _checks as check

_JSON_INTEGERS = range(-(2**63), 2**64)


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call of a tool that a model asked for."""

    id: str | None
    """What a `ToolMessage` answers to; None if the model gives none."""
    name: str
    """Name of the tool."""
    arguments: dict[str, Any] = {}
    """Arguments by name: values that JSON can say."""
    problem: str | None = None
    """What is wrong with the arguments that the model wrote, where they cannot be read; `arguments`
    is {} then. Such a call should be answered with this instead of being carried out."""

    def __post_init__(self) -> None:
        """Check the types; the arguments become a copy of their own."""
        if self.id is not None:
            check.check_text("id", self.id)
        check.check_text("name", self.name, empty=False)
        if self.problem is not None:
            check.check_text("problem", self.problem)
        arguments = json_object("arguments", self.arguments)
        msgspec.structs.force_setattr(self, "arguments", arguments)


def read_call(ident: str, name: str, arguments: str) -> ToolCall:
    """Return a call as a model made it; it says itself if its arguments cannot be read."""
    try:
        return ToolCall(ident, name, json_object("arguments", arguments))
    except (TypeError, ValueError) as error:
        return ToolCall(ident, name, problem=str(error))


def json_object(name: str, value: object) -> dict[str, Any]:
    """Return a copy of an object that JSON can say, given as a mapping or as JSON text.

    Raises:
        TypeError: it is no object, or has a value that JSON cannot say; the error says which.
        ValueError: the text is no JSON, or a number or text in it cannot be said.
    """
    if isinstance(value, str):
        value = _decoded(name, value)
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict or a JSON object, not {check.describe(value)}")
    try:
        copied: dict[str, Any] = _json_value(name, value)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    return copied


def _decoded(name: str, text: str) -> object:
    try:
        return msgspec.json.decode(check.check_text(name, text) or "{}")
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON ({error}): {text[:60]!r}") from None


def _json_value(name: str, value: object) -> Any:
    """A deep copy of `value`, or an error that names the part that JSON cannot say."""
    match value:
        case None | bool():
            return value
        case str():
            return check.check_text(name, value)
        case int() if value in _JSON_INTEGERS:
            return value
        case float() if math.isfinite(value):
            return value
        case list() | tuple():
            return [_json_value(f"{name}[{i}]", item) for i, item in enumerate(value)]
        case Mapping():
            return {
                check.check_text(f"{name} key", key): _json_value(f"{name}[{key!r}]", item)
                for key, item in value.items()
            }
    if isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number that JSON can say, not {value}")
    raise TypeError(f"{name} must be a value that JSON can say, not {check.describe(value)}")
