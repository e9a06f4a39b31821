"""How values of a schema or type are shown while they grow."""

from __future__ import annotations

import datetime
import decimal
import functools
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec
from msgspec import inspect as info

from llamactor.schema.partial import ANYTHING, Plain, Shape

if TYPE_CHECKING:
    from collections.abc import Iterable

Decode = Callable[[bytes], Any]
"""Reads a JSON document as a value of one type."""


class Held(Shape):
    """A value that says something only when it is whole, such as a date."""

    grows = False

    def __init__(self, decode: Decode | None = None) -> None:
        """Read whole values with `decode`; None shows them as they are."""
        self._decode = decode

    def scalar(self, value: Plain) -> Any:
        """Return the value as one of the type."""
        return value if self._decode is None else _read(self._decode, value, value)


HELD = Held()


class Array(Shape):
    """An array, shown as a list until it is closed."""

    def __init__(
        self, items: Iterable[Shape], rest: Shape, whole: Callable[[list[Any]], Any]
    ) -> None:
        """Give the shapes of the first items and of all after them, and the type when closed."""
        self._items = tuple(items)
        self._rest = rest
        self._whole = whole

    def item(self, index: int) -> Shape:
        """Return the shape of an item."""
        return self._items[index] if index < len(self._items) else self._rest

    def whole_array(self, plain: Plain, items: list[Any]) -> Any:
        """Return the array as one of its type."""
        return items if self._whole is list else self._whole(items)


class Map(Shape):
    """An object whose members are all alike."""

    def __init__(self, values: Shape) -> None:
        """Give the shape of the values."""
        self._values = values

    def member(self, key: str) -> Shape:
        """Return the shape of the values."""
        return self._values


class Record(Shape):
    """An object of a class, whose partial values have `msgspec.UNSET` for what has not come."""

    def __init__(
        self,
        decode: Decode,
        members: Callable[[], Mapping[str, tuple[str, Shape]]],
        partial: Callable[..., Any] | None,
    ) -> None:
        """Say how to read a whole one, which attribute a member is, and the class of partial ones.

        Args:
            decode: Reads a whole one.
            members: Attribute and shape by the name in JSON; called when it is first needed.
            partial: Makes a partial value of attributes; None shows a dict.
        """
        self._decode = decode
        self._find = members
        self._partial = partial

    @functools.cached_property
    def _members(self) -> Mapping[str, tuple[str, Shape]]:
        return self._find()

    def member(self, key: str) -> Shape:
        """Return the shape of a member; what the class does not have may be anything."""
        return self._members.get(key, ("", ANYTHING))[1]

    def open_object(self, members: dict[str, Any]) -> Any:
        """Return the partial value."""
        if self._partial is None:
            return members
        own = self._members
        return self._partial(**{own[key][0]: value for key, value in members.items() if key in own})

    def whole_object(self, plain: Plain, members: dict[str, Any]) -> Any:
        """Return the object of the class; while that refuses it, the partial value."""
        shown = _read(self._decode, plain, msgspec.UNSET)
        return self.open_object(members) if shown is msgspec.UNSET else shown


class Row(Array):
    """An array that is an object of a class, such as a named tuple."""

    def __init__(self, decode: Decode, items: Iterable[Shape]) -> None:
        """Say how to read a whole one, and the shapes of its fields."""
        super().__init__(items, ANYTHING, list)
        self._decode = decode

    def whole_array(self, plain: Plain, items: list[Any]) -> Any:
        """Return the object of the class; while that refuses it, the items."""
        return _read(self._decode, plain, items)


class Choice(Shape):
    """One of several types, told apart by what it begins with or by its tag."""

    def __init__(
        self,
        objects: list[Shape],
        arrays: list[Shape],
        scalar: Shape,
        tags: tuple[str, dict[Any, Shape]],
    ) -> None:
        """Give what objects, arrays and all else can be, and shapes by the value of a member."""
        self._object = objects[0] if len(objects) == 1 else ANYTHING
        self._array = arrays[0] if len(arrays) == 1 else ANYTHING
        self._scalar = scalar
        self._tags = tags
        self.grows = scalar.grows

    def scalar(self, value: Plain) -> Any:
        """Return the value as the only kind there is, or as it is."""
        return self._scalar.scalar(value)

    def member(self, key: str) -> Shape:
        """Return the shape of a member of the one kind of object there is, or of the tag."""
        return HELD if key == self._tags[0] else self._object.member(key)

    def item(self, index: int) -> Shape:
        """Return the shape of an item of the one kind of array there is."""
        return self._array.item(index)

    def told(self, key: str, value: Plain) -> Shape:
        """Return the shape that the tag names."""
        name, shapes = self._tags
        return shapes.get(value, self) if key == name and isinstance(value, (str, int)) else self

    def open_object(self, members: dict[str, Any]) -> Any:
        """Return the object as the only kind there is, or as it is."""
        return self._object.open_object(members)

    def whole_object(self, plain: Plain, members: dict[str, Any]) -> Any:
        """Return the closed object as the only kind there is, or as it is."""
        return self._object.whole_object(plain, members)

    def open_array(self, items: list[Any]) -> Any:
        """Return the array as the only kind there is, or as it is."""
        return self._array.open_array(items)

    def whole_array(self, plain: Plain, items: list[Any]) -> Any:
        """Return the closed array as the only kind there is, or as it is."""
        return self._array.whole_array(plain, items)


def _read(decode: Decode, plain: Plain, otherwise: Any) -> Any:
    """Read `plain` as a value of a type; code of the user's may run and refuse it."""
    try:
        return decode(msgspec.json.encode(plain))
    except Exception:
        return otherwise  # the whole document says at its end what is wrong


@functools.lru_cache(maxsize=256)
def partial_class(cls: Any, attributes: tuple[str, ...]) -> type[msgspec.Struct]:
    """Return the class of partial values of `cls`: all attributes may be `msgspec.UNSET`."""
    fields = [(name, Any, msgspec.UNSET) for name in attributes]
    name, module = f"Partial{cls.__name__}", getattr(cls, "__module__", None)
    return msgspec.defstruct(name, fields, module=module, kw_only=True, frozen=True)


# --- of types that msgspec can read ---------------------------------------------------------------

_TEXT_TYPES: dict[type[info.Type], Any] = {
    info.BytesType: bytes,
    info.ByteArrayType: bytearray,
    info.MemoryViewType: memoryview,
    info.DateTimeType: datetime.datetime,
    info.TimeType: datetime.time,
    info.DateType: datetime.date,
    info.TimeDeltaType: datetime.timedelta,
    info.UUIDType: uuid.UUID,
    info.DecimalType: decimal.Decimal,
    info.FloatType: float,
}
_ARRAYS: dict[type[info.Type], Callable[[list[Any]], Any]] = {
    info.ListType: list,
    info.CollectionType: list,
    info.VarTupleType: tuple,
    info.SetType: set,
    info.FrozenSetType: frozenset,
}
_RECORDS: tuple[type[info.Type], ...] = (info.StructType, info.DataclassType, info.TypedDictType)
_ROWS: tuple[type[info.Type], ...] = (*_ARRAYS, info.TupleType, info.NamedTupleType)


class TypeShapes:
    """The shapes of one type and of the types in it, each made once."""

    def __init__(self, decoder: Callable[[Any], Decode]) -> None:
        """Begin with none; `decoder` gives what reads a type."""
        self._decoder = decoder
        self._records: dict[Any, Shape] = {}

    def shape(self, node: info.Type) -> Shape:
        """Return the shape of what msgspec describes so."""
        if isinstance(node, info.Metadata):
            return self.shape(node.type)
        if isinstance(node, (info.StrType, info.AnyType, info.RawType)):
            return ANYTHING
        if isinstance(node, info.UnionType):
            return self._choice(node.types)
        if isinstance(node, info.DictType):
            return Map(self.shape(node.value_type))
        if isinstance(node, info.TupleType):
            return Array(map(self.shape, node.item_types), ANYTHING, tuple)
        if isinstance(node, info.EnumType):
            return Held(self._decoder(node.cls))
        if type(node) in _ARRAYS:
            return Array((), self.shape(node.item_type), _ARRAYS[type(node)])  # type: ignore[attr-defined]
        if type(node) in _TEXT_TYPES:
            return Held(self._decoder(_TEXT_TYPES[type(node)]))
        if isinstance(node, (*_RECORDS, info.NamedTupleType)):
            return self._record(node)
        return HELD

    def _record(self, node: Any) -> Shape:
        shape = self._records.get(node.cls)
        if shape is None:
            self._records[node.cls] = shape = self._new_record(node)
        return shape

    def _new_record(self, node: Any) -> Shape:
        decode, fields = self._decoder(node.cls), node.fields
        if isinstance(node, info.NamedTupleType) or getattr(node, "array_like", False):
            # Its items are shown as they are: a row may refer to itself.
            return Row(decode, ())
        attributes = tuple(field.name for field in fields)
        typed_dict = isinstance(node, info.TypedDictType)
        return Record(
            decode,
            lambda: {field.encode_name: (field.name, self.shape(field.type)) for field in fields},
            None if typed_dict else partial_class(node.cls, attributes),
        )

    def _choice(self, nodes: tuple[info.Type, ...]) -> Shape:
        bare = [node.type if isinstance(node, info.Metadata) else node for node in nodes]
        objects = [node for node in bare if isinstance(node, (*_RECORDS, info.DictType))]
        arrays = [node for node in bare if isinstance(node, _ROWS)]
        texts = [node for node in bare if isinstance(node, (info.StrType, info.AnyType))]
        others = [node for node in bare if isinstance(node, (info.EnumType, *_TEXT_TYPES))]
        return Choice(
            [self.shape(node) for node in objects],
            [self.shape(node) for node in arrays],
            ANYTHING if texts else self.shape(others[0]) if len(others) == 1 else HELD,
            self._tags(objects),
        )

    def _tags(self, nodes: list[Any]) -> tuple[str, dict[Any, Shape]]:
        tagged = [node for node in nodes if getattr(node, "tag_field", None)]
        if not tagged:
            return "", {}
        return tagged[0].tag_field, {node.tag: self.shape(node) for node in tagged}


# --- of pydantic models ---------------------------------------------------------------------------


class ModelShapes(TypeShapes):
    """Those of types that have models in them: `shape` takes a type as well."""

    def shape(self, node: Any) -> Shape:
        """Return the shape of a type or of what msgspec calls it."""
        if isinstance(node, info.CustomType):
            return self._model(node.cls)
        if isinstance(node, info.Type):
            return super().shape(node)
        try:
            described = info.type_info(node)
        except Exception:
            return ANYTHING  # nothing is known of it but that it is JSON
        return self.shape(described)

    def _model(self, cls: Any) -> Shape:
        fields = getattr(cls, "model_fields", None)
        if not isinstance(fields, dict):
            return Held(self._decoder(cls))
        shape = self._records.get(cls)
        if shape is None:
            self._records[cls] = shape = Record(
                self._decoder(cls),
                lambda: {
                    _alias(name, field): (name, self.shape(field.annotation))
                    for name, field in fields.items()
                },
                partial_class(cls, tuple(fields)),
            )
        return shape


def _alias(name: str, field: Any) -> str:
    """The name of a field in JSON."""
    return next((a for a in (field.validation_alias, field.alias) if isinstance(a, str)), name)


# --- of JSON Schemas ------------------------------------------------------------------------------


class Node(Shape):
    """What a JSON Schema describes: plain data, but for texts out of a list or of a format."""

    def __init__(self, root: Mapping[str, Any], schema: Any) -> None:
        """Take a schema, and the document it is a part of, for its references."""
        self._root = root
        self._schema = resolved(root, schema)
        self.grows = self._schema.keys().isdisjoint(("enum", "const", "format"))

    def member(self, key: str) -> Shape:
        """Return the shape of a member."""
        own = self._schema.get("properties")
        if isinstance(own, dict) and key in own:
            return Node(self._root, own[key])
        return Node(self._root, self._schema.get("additionalProperties"))

    def item(self, index: int) -> Shape:
        """Return the shape of an item."""
        first = self._schema.get("prefixItems")
        if isinstance(first, list) and index < len(first):
            return Node(self._root, first[index])
        return Node(self._root, self._schema.get("items"))


def resolved(root: Mapping[str, Any], schema: Any) -> Mapping[str, Any]:
    """Follow references within the document; what leads nowhere says nothing."""
    for _ in range(32):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str):
            break
        schema = _pointed(root, reference)
    return schema if isinstance(schema, dict) else {}


def _pointed(root: Any, reference: str) -> Any:
    """What a JSON pointer in a fragment points to."""
    if reference == "#":
        return root
    found = root
    for part in unquote(reference).removeprefix("#/").split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found
