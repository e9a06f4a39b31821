"""Schemas with all it takes to make values of texts: `Schema`, and `schema_of` which finds it."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import msgspec

from llamactor._checks import check_text, describe
from llamactor.errors import SchemaValidationError
from llamactor.schema.models import model_schemas
from llamactor.schema.partial import PartialReader, Shape
from llamactor.schema.shapes import Decode, ModelShapes, Node, TypeShapes
from llamactor.schema.types import (
    UnsupportedTypeError,
    adapted,
    describe_type,
    is_pydantic,
    json_schema_of_type,
    loaded_pydantic,
    type_name,
)
from llamactor.schema.validation import Validator

if TYPE_CHECKING:
    from types import ModuleType

    from llamactor.schema.types import Json

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

MAX_SCHEMA_BYTES = 1 << 20
"""The largest JSON Schema, as JSON."""
SHOWN_TEXT = 200
"""Characters of a text that is no JSON which an error keeps."""


class Schema(Generic[T_co]):
    """What values may be: a JSON Schema, and the type that they get.

    Made by `schema_of`; immutable. Two are equal if they were made of the same type, or of the same
    JSON Schema.
    """

    __slots__ = ("__weakref__", "_kind")

    def __init__(self, kind: Kind) -> None:
        """Wrap what `schema_of` has found."""
        self._kind = kind

    @property
    def json(self) -> Json:
        """The JSON Schema, a new dict each time."""
        schema: Json = msgspec.json.decode(self._kind.text)
        return schema

    @property
    def text(self) -> str:
        """The JSON Schema as JSON, without white space."""
        return self._kind.text

    def convert(self, text: str) -> T_co:
        """Return the value of a JSON document: parsed, validated, and of the type.

        JSON Schemas give plain data: dicts, lists, str, int, float, bool, None.

        Args:
            text: One JSON document, with nothing but white space around it.

        Raises:
            SchemaValidationError: it is no JSON, or does not fit; `.path` and `.value` say what.
            ValueError: the JSON Schema itself cannot be used.
        """
        value: T_co = self._kind.convert(check_text("text", text))
        return value

    def convert_value(self, value: object) -> T_co:
        """Return the value of a document that is parsed already; else as `convert`.

        Raises:
            SchemaValidationError: `value` does not fit, or JSON cannot say it.
            ValueError: the JSON Schema itself cannot be used.
        """
        try:
            document = msgspec.json.encode(value).decode()
        except (TypeError, ValueError, RecursionError) as error:
            raise SchemaValidationError(f"JSON cannot say this: {error}", (), value) from None
        return self.convert(document)

    def read(self, text: str) -> T_co:
        """Return the value of a document that the schema's own grammar has made.

        As `convert`, without validating plain data once more, which takes some 3 µs per byte.

        Raises:
            SchemaValidationError: it is no JSON, or the type refuses it.
        """
        value: T_co = self._kind.read(text)
        return value

    def partial(self, text: str) -> Any:
        """Return the value of a document that may be cut off anywhere.

        Objects of classes are values of a partial class as long as they are open: the same
        attributes, each of which is `msgspec.UNSET` until it has come. Texts are shown as far as
        they go; numbers, words, and texts that stand for something else when they are whole.

        Args:
            text: The beginning of a JSON document; what is no JSON ends it.

        Returns:
            The value, or `msgspec.UNSET` if there is none yet. It is not validated.
        """
        reader = self.reader()
        reader.feed(check_text("text", text))
        return reader.value

    def reader(self) -> PartialReader:
        """Return what gives the same as `partial`, piece by piece."""
        return PartialReader(self._kind.shape)

    def __eq__(self, other: object) -> bool:
        """Return whether both come of the same."""
        return isinstance(other, Schema) and self._kind.key == other._kind.key

    def __hash__(self) -> int:
        """Hash what it comes of."""
        return hash(self._kind.key)

    def __repr__(self) -> str:
        """Return what it comes of."""
        return f"schema_of({self._kind})"


class Kind(ABC):
    """Where a schema comes from: its JSON, and how values are read."""

    text: str
    """The JSON Schema as JSON."""
    key: object
    """Equal for equal schemas."""

    @abstractmethod
    def read(self, text: str) -> Any:
        """Parse a text into a value of the type."""

    def convert(self, text: str) -> Any:
        """Parse and validate a text; reading validates where there is a type."""
        return self.read(text)

    @functools.cached_property
    def shape(self) -> Shape:
        """How values grow; as plain data unless somebody knows better."""
        root = msgspec.json.decode(self.text)
        return Node(root, root)

    @functools.cached_property
    def validator(self) -> Validator:
        """The validator of the JSON Schema."""
        return Validator(msgspec.json.decode(self.text))


class _Plain(Kind):
    """A JSON Schema, whose values are plain data."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.key = text

    def __str__(self) -> str:
        return self.text if len(self.text) <= SHOWN_TEXT else f"{self.text[:SHOWN_TEXT]}…"

    def read(self, text: str) -> Any:
        return parse(text)

    def convert(self, text: str) -> Any:
        value = parse(text)
        self.validator.validate(value)
        return value


class _Typed(Kind):
    """A type that msgspec reads."""

    def __init__(self, hint: Any) -> None:
        self.key = hint
        self.text = _encoded(json_schema_of_type(hint))
        self._decode = msgspec.json.Decoder(hint).decode

    def __str__(self) -> str:
        return type_name(self.key)

    def read(self, text: str) -> Any:
        try:
            return self._decode(text)
        except RecursionError:
            raise _too_deep(text) from None
        except msgspec.MsgspecError as error:
            raise self._explained(text, str(error)) from error

    @functools.cached_property
    def shape(self) -> Shape:
        return TypeShapes(_msgspec_decoder).shape(describe_type(self.key))

    def _explained(self, text: str, message: str) -> SchemaValidationError:
        """Return the error with its place; where msgspec does not know it, the validator may."""
        plain = parse(text)
        what, _, where = message.partition(" - at ")
        path = _msgspec_path(where.strip("`"))
        if path is None:
            found = self.validator.first_error(plain)
            if found is not None:
                return found
        return SchemaValidationError(what, *_followed(plain, path or ()))


class _Modelled(Kind):
    """A pydantic model, or a type with some in it."""

    def __init__(self, hint: Any, pydantic: ModuleType) -> None:
        self.key = hint
        try:
            self._adapter = pydantic.TypeAdapter(hint)
            schema = self._adapter.json_schema(schema_generator=model_schemas())
        except (pydantic.PydanticUserError, pydantic.errors.PydanticInvalidForJsonSchema) as error:
            raise TypeError(f"{type_name(hint)} has no JSON Schema: {error.message}") from None
        self.text = _encoded(_without_root_reference(adapted(schema)))
        self._error: type[Exception] = pydantic.ValidationError

    def __str__(self) -> str:
        return type_name(self.key)

    def read(self, text: str) -> Any:
        try:
            return self._adapter.validate_json(text)
        except self._error as error:
            raise self._explained(text, error) from error

    @functools.cached_property
    def shape(self) -> Shape:
        return ModelShapes(_pydantic_decoder).shape(self.key)

    def _explained(self, text: str, error: Any) -> SchemaValidationError:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            parse(text)
        return SchemaValidationError(first["msg"], *_followed(parse(text), first["loc"]))


# --- finding it -----------------------------------------------------------------------------------


@overload
def schema_of(spec: Schema[T]) -> Schema[T]: ...
@overload
def schema_of(spec: type[T]) -> Schema[T]: ...
@overload
def schema_of(spec: Any) -> Schema[Any]: ...


def schema_of(spec: Any) -> Schema[Any]:
    """Return the schema of a JSON Schema or of a type.

    Those of types are made once, as long as they are among the 256 that were used last. A dict is
    copied, and checked when a grammar is made of it or a value is validated.

    Args:
        spec: A JSON Schema as a dict (Draft 2020-12, at most 1 MiB as JSON); a `msgspec.Struct`,
            dataclass, TypedDict, NamedTuple, Enum or pydantic model; or a type hint of these and
            of what JSON can say, `Annotated` with `msgspec.Meta` or `pydantic.Field` for limits
            and descriptions.

    Raises:
        TypeError: `spec` is neither, or has a part that JSON cannot say; the message names it.
        ValueError: a dict is no JSON, or larger than 1 MiB.
    """
    if isinstance(spec, Schema):
        return spec
    if isinstance(spec, Mapping):
        return _of_json(_json_text(spec))
    if spec is None or isinstance(spec, (str, bytes, int, float, list)):
        raise TypeError(
            f"a schema is a JSON Schema as a dict, or a type, not {describe(spec)}; "
            "parse JSON with json.loads first"
        )
    try:
        hash(spec)
    except TypeError:
        return Schema(_kind_of_type(spec))
    return _of_type(spec)


@functools.lru_cache(maxsize=64)
def _of_json(text: str) -> Schema[Any]:
    return Schema(_Plain(text))


@functools.lru_cache(maxsize=256)
def _of_type(hint: Any) -> Schema[Any]:
    return Schema(_kind_of_type(hint))


def _kind_of_type(hint: Any) -> Kind:
    pydantic = loaded_pydantic()
    if pydantic is not None and is_pydantic(hint):
        return _Modelled(hint, pydantic)
    try:
        return _Typed(hint)
    except UnsupportedTypeError as error:
        if pydantic is None or not is_pydantic(error.culprit):
            raise
    return _Modelled(hint, pydantic)


def _json_text(schema: Mapping[str, Any]) -> str:
    try:
        text = msgspec.json.encode(dict(schema))
        same = msgspec.json.decode(text) == schema
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise ValueError(f"this dict is no JSON Schema, as JSON cannot say it: {error}") from None
    if not same:
        raise ValueError(
            "this dict is no JSON Schema, as JSON cannot say it: it has keys that are no str, "
            "or values such as nan, tuples, dates or bytes"
        )
    if len(text) > MAX_SCHEMA_BYTES:
        raise ValueError(
            f"this JSON Schema has {len(text)} bytes, the limit is {MAX_SCHEMA_BYTES} (1 MiB); "
            "leave out what need not be constrained"
        )
    return text.decode()


def _encoded(schema: object) -> str:
    return msgspec.json.encode(schema).decode()


def _without_root_reference(schema: Json) -> Json:
    """Put a root that is a reference in place."""
    definitions = dict(schema.get("$defs", {}))
    root = definitions.pop(str(schema.get("$ref", "")).removeprefix("#/$defs/"), None)
    # One that refers to itself stays a reference.
    if root is None or f'"{schema["$ref"]}"' in _encoded([root, definitions]):
        return schema
    return {**root, "$defs": definitions} if definitions else root


# --- reading --------------------------------------------------------------------------------------


def parse(text: str) -> Any:
    """Return the plain data of a JSON document.

    Raises:
        SchemaValidationError: it is none.
    """
    try:
        return msgspec.json.decode(text)
    except RecursionError:
        raise _too_deep(text) from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise SchemaValidationError(f"this is no JSON: {error}", (), text[:SHOWN_TEXT]) from None


def _too_deep(text: str) -> SchemaValidationError:
    return SchemaValidationError("this is nested too deep to be read", (), text[:SHOWN_TEXT])


def _msgspec_decoder(hint: Any) -> Decode:
    return msgspec.json.Decoder(hint).decode


def _pydantic_decoder(hint: Any) -> Decode:
    pydantic = loaded_pydantic()
    assert pydantic is not None
    decode: Callable[[bytes], Any] = pydantic.TypeAdapter(hint).validate_json
    return decode


_MSGSPEC_PART = re.compile(r"\.([^.\[]+)|\[(\d+)\]")


def _msgspec_path(where: str) -> tuple[str | int, ...] | None:
    """The parts of a path such as ``$.items[3].name``; None if it does not say them all."""
    if "[...]" in where or "key" in where.partition("$")[0]:
        return None
    parts = _MSGSPEC_PART.findall(where)
    return tuple(name or int(index) for name, index in parts)


def _followed(plain: Any, path: tuple[str | int, ...]) -> tuple[tuple[str | int, ...], Any]:
    """The part of `path` that leads somewhere, and what is there.

    Pydantic puts names of the members of a union among the keys; these are passed over.
    """
    taken: list[str | int] = []
    for part in path:
        try:
            plain = plain[part]
        except (KeyError, IndexError, TypeError):
            continue
        taken.append(part)
    return tuple(taken), plain
