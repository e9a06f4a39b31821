"""A schema in words that a model understands, for models that no grammar constrains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from llamactor.schema.shapes import resolved
from llamactor.schema.validation import Validator
from llamactor.schema.values import schema_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from llamactor.schema.types import Json
    from llamactor.schema.values import Schema

_STRUCTURE = frozenset(
    (
        *("type", "properties", "required", "additionalProperties", "items", "prefixItems"),
        *("anyOf", "oneOf", "allOf", "enum", "const", "$ref", "$defs", "definitions"),
        *("title", "description", "default", "examples", "$schema", "$id", "$comment"),
    )
)
"""Keywords that the notation says itself, or that say nothing of the value."""

_DEPTH = 8
"""Levels of an example; a schema that refers to itself ends there."""
MAX_EXAMPLE = 1000
"""Values in an example; one with more says no more, and takes a prompt's room."""


class _TooLongError(Exception):
    """An example would have too many values."""


def describe_schema(spec: Any) -> str:
    """Return text for a prompt that tells a model how its answer is to look.

    One notation for all: JSON with types in place of values, ``?`` after the names of properties
    that may be left out, ``|`` between alternatives, limits in parentheses and descriptions as
    comments; then an example, if one that fits can be made up. What a grammar constrains needs no
    description to be valid, but is better with one.

    Args:
        spec: As for `schema_of`.

    Raises:
        TypeError: `spec` is no schema and no type.
        ValueError: it is no JSON, no JSON Schema, or nested too deep.
    """
    schema = schema_of(spec)
    document = schema.json
    try:
        text = _Notation(document).whole()
        example = _example(schema, document)
    except RecursionError:
        raise ValueError("this JSON Schema is nested too deep to be described") from None
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        reason = Validator(document).reason(error)
        raise ValueError(f"this is no usable JSON Schema: {reason}") from error
    return f"Answer with JSON and nothing else, in this form:\n\n{text}{example}"


def _example(schema: Schema[Any], document: Json) -> str:
    """An example with what is before it; nothing if none that fits could be made up."""
    try:
        example = _Example(document).value(document)
        schema.convert_value(example)
    except (_TooLongError, ValueError):
        return ""
    return f"\n\nFor example:\n\n{msgspec.json.encode(example).decode()}"


class _Notation:
    """Writes schemas of one document; what is referred to gets a name and a place of its own."""

    def __init__(self, root: Json) -> None:
        self._root = root
        self._names: dict[str, str] = {}
        self._references: list[str] = []

    def whole(self) -> str:
        parts = [self.schema(self._root, "")]
        for reference in self._references:  # what is written may name more
            name = self._names[reference]
            if reference == "#":
                parts.append(f"where {name} is all of this again")
                continue
            body = self.schema(resolved(self._root, {"$ref": reference}), "")
            parts.append(f"where {name} is\n{body}")
        return "\n\n".join(parts)

    def schema(self, schema: Any, indent: str) -> str:
        """Return the notation of one schema, whose further lines begin with `indent`."""
        if not isinstance(schema, dict):
            return "nothing" if schema is False else "anything"
        body = self._body(schema, indent)
        limits = ", ".join(_limits(schema))
        return f"{body} ({limits})" if limits else body

    def _body(self, schema: Mapping[str, Any], indent: str) -> str:
        if "$ref" in schema:
            return self._name(str(schema["$ref"]))
        for keyword, between in (("anyOf", " | "), ("oneOf", " | "), ("allOf", " & ")):
            if keyword in schema:
                return between.join(self.schema(item, indent) for item in schema[keyword])
        if "const" in schema:
            return _json(schema["const"])
        if "enum" in schema:
            return " | ".join(map(_json, schema["enum"]))
        kinds = schema.get("type") or _kind_by_keywords(schema)
        kinds = kinds if isinstance(kinds, list) else [kinds]
        return " | ".join(self._kind(str(kind), schema, indent) for kind in kinds)

    def _kind(self, kind: str, schema: Mapping[str, Any], indent: str) -> str:
        if kind == "object":
            return self._object(schema, indent)
        return self._array(schema, indent) if kind == "array" else kind

    def _object(self, schema: Mapping[str, Any], indent: str) -> str:
        inner = f"{indent}  "
        required = schema.get("required", ())
        lines = [
            self._property(name, item, inner, optional=name not in required)
            for name, item in schema.get("properties", {}).items()
        ]
        more = schema.get("additionalProperties")
        if isinstance(more, dict) or (not lines and more is not False):
            lines.append(f"{inner}any name: {self.schema(more, inner)}")
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}" if lines else "{}"

    def _property(self, name: str, schema: Any, indent: str, *, optional: bool) -> str:
        text = f"{indent}{_json(name)}{'?' if optional else ''}: {self.schema(schema, indent)}"
        about = schema.get("description") if isinstance(schema, dict) else None
        comment = f"{indent}// {' '.join(str(about).split())}\n" if about else ""
        return comment + text

    def _array(self, schema: Mapping[str, Any], indent: str) -> str:
        items = [self.schema(item, indent) for item in schema.get("prefixItems", ())]
        rest = schema.get("items", not items)
        if rest is not False:
            items.append(f"{self.schema(rest, indent)}, ...")
        return f"[{', '.join(items)}]"

    def _name(self, reference: str) -> str:
        if reference not in self._names:
            name = reference.rpartition("/")[2].strip("#") or "Answer"
            self._names[reference] = reference if name in self._names.values() else name
            self._references.append(reference)
        return self._names[reference]


def _limits(schema: Mapping[str, Any]) -> Iterator[str]:
    return (f"{key} {_json(value)}" for key, value in schema.items() if key not in _STRUCTURE)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _kind_by_keywords(schema: Mapping[str, Any]) -> str:
    if "properties" in schema or "additionalProperties" in schema:
        return "object"
    return "array" if "items" in schema or "prefixItems" in schema else "anything"


_TEXTS = {
    "date": "2024-05-17",
    "time": "12:30:00Z",
    "date-time": "2024-05-17T12:30:00Z",
    "duration": "P1D",
    "uuid": "123e4567-e89b-12d3-a456-426614174000",
    "email": "someone@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
}


class _Example:
    """Makes up a value; where limits are narrow it may not fit, so it is tried before."""

    def __init__(self, root: Json) -> None:
        self._root = root
        self._left = MAX_EXAMPLE

    def value(self, schema: Any, depth: int = 0) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _TooLongError
        schema = resolved(self._root, schema)
        for keyword in ("examples", "enum"):
            if schema.get(keyword):
                return schema[keyword][0]
        for keyword in ("const", "default"):
            if keyword in schema and schema[keyword] is not None:
                return schema[keyword]
        for keyword in ("anyOf", "oneOf", "allOf"):
            if schema.get(keyword):
                return self.value(schema[keyword][0], depth + 1) if depth < _DEPTH else None
        kind = schema.get("type") or _kind_by_keywords(schema)
        return self._of_kind(kind[0] if isinstance(kind, list) else kind, schema, depth)

    def _of_kind(self, kind: str, schema: Mapping[str, Any], depth: int) -> Any:
        match kind:
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, depth)
            case "string":
                return _TEXTS.get(schema.get("format", ""), _sized_text(schema))
            case "integer" | "number":
                return _number(schema)
            case "boolean":
                return True
        return None

    def _object(self, schema: Mapping[str, Any], depth: int) -> Json:
        required = schema.get("required", ())
        return {
            name: self.value(item, depth + 1)
            for name, item in schema.get("properties", {}).items()
            if name in required or depth < 2
        }

    def _array(self, schema: Mapping[str, Any], depth: int) -> list[Any]:
        first = [self.value(item, depth + 1) for item in schema.get("prefixItems", ())]
        least = max(schema.get("minItems", 0), 1 if depth < _DEPTH and not first else 0)
        rest = schema.get("items", {})
        return first + [self.value(rest, depth + 1) for _ in range(min(least, 8) - len(first))]


def _sized_text(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minLength", 0), schema.get("maxLength", 8)
    return "text"[:high] if low <= 4 else "text" * (min(low, 400) // 4 + 1)


def _number(schema: Mapping[str, Any]) -> int | float:
    """A number within the limits, if whole ones do."""
    step = schema.get("multipleOf", 1)
    low = schema.get("minimum", schema.get("exclusiveMinimum", None))
    high = schema.get("maximum", schema.get("exclusiveMaximum", None))
    number = 1 if low is None and high is None else low if low is not None else high - step
    if low is not None and "minimum" not in schema:
        number = low + step
    return number
