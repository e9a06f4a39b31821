"""JSON Schemas of Python types.

What msgspec can read becomes a schema here, node by node, so that every keyword is one that a
grammar can hold and every place has a name in messages; what contains pydantic models is described
by pydantic, and its keywords are adapted. In both cases objects are closed: a type says what it
has, so a model is not to invent more.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import inspect as info

if TYPE_CHECKING:
    import enum
    from collections.abc import Callable
    from types import ModuleType

Json = dict[str, Any]

_SIXBIT = "[A-Za-z0-9+/]"
BASE64 = f"^({_SIXBIT}{{4}})*({_SIXBIT}{{2}}==|{_SIXBIT}{{3}}=)?$"
DECIMAL = r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?$"
INTEGER_KEY = "^(0|-?[1-9][0-9]{0,14})$"
_COUNT = "[0-9]{1,5}"
_SECONDS = rf"{_COUNT}(\.[0-9]{{1,6}})?S"
_CLOCK = rf"T({_COUNT}H({_COUNT}M)?({_SECONDS})?|{_COUNT}M({_SECONDS})?|{_SECONDS})"
DURATION = f"^-?P({_COUNT}D({_CLOCK})?|{_CLOCK})$"
"""Days and less: years and months have no length that a `timedelta` could hold."""
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?"
NAIVE_TIME = f"^{_TIME}$"
_DAY = "(0[1-9]|1[0-9]|2[0-8])"
_DATE = rf"(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{{2}}|[1-9][0-9]{{3}})-(0[1-9]|1[0-2])-{_DAY}"
NAIVE_DATE_TIME = f"^{_DATE}T{_TIME}$"
"""No zone, which the format would ask for. Days end at 28, which every month has."""

_ANNOTATIONS = frozenset({"binary", "password", "path"})
"""Formats that say what a text is for and forbid none."""


class UnsupportedTypeError(TypeError):
    """A type has no JSON Schema."""

    def __init__(self, culprit: object, where: str) -> None:
        """Name the type and where it is."""
        name = type_name(culprit)
        place = f" (at {where})" if where != name else ""
        super().__init__(
            f"{name}{place} has no JSON Schema; use what JSON can say: str, int, "
            "float, bool, None, list, dict, Literal, Enum, dates, UUID, Decimal, dataclasses, "
            "TypedDict, msgspec.Struct, pydantic models, and unions of them"
        )
        self.culprit = culprit


def type_name(hint: object) -> str:
    """Return what to call a type in a message."""
    return hint.__qualname__ if isinstance(hint, type) else repr(hint)


# --- what msgspec can read ------------------------------------------------------------------------


def describe_type(hint: object) -> info.Type:
    """Return msgspec's description of a type; `TypeError` names what it cannot read."""
    try:
        return info.type_info(hint)
    except NameError as error:
        raise TypeError(
            f"{type_name(hint)} names a type that cannot be found: {error}; "
            "define it where its annotations are evaluated, at module level"
        ) from None
    except TypeError as error:
        raise TypeError(f"{type_name(hint)} has no JSON Schema: {error}") from None


def json_schema_of_type(hint: object) -> Json:
    """Return the JSON Schema of a type that msgspec can read.

    Raises:
        TypeError: there is none; the message names the type and the place.
    """
    return _Writer().document(describe_type(hint), type_name(hint))


class _Writer:
    """Writes one document; classes and enums become definitions."""

    def __init__(self) -> None:
        self._definitions: dict[str, Json] = {}
        self._names: dict[object, str] = {}
        self._again: set[str] = set()
        """Definitions with more than one reference."""

    def document(self, node: info.Type, where: str) -> Json:
        root = self.schema(node, where)
        name = root.get("$ref", "").removeprefix("#/$defs/")
        rest = dict(self._definitions)
        top = rest.pop(name) if name and name not in self._again else root
        return {**top, "$defs": rest} if rest else top

    def schema(self, node: info.Type, where: str) -> Json:
        """Return the schema of one node; `where` is its place in the type."""
        if isinstance(node, info.Metadata):
            return {**self.schema(node.type, where), **(node.extra_json_schema or {})}
        if isinstance(node, info.UnionType):
            return {"anyOf": [self.schema(member, where) for member in node.types]}
        if isinstance(node, info.EnumType):
            return self._define(node.cls, lambda: _enumeration(node.cls))
        plain = _PLAIN.get(type(node))
        if plain is not None:
            return _with_limits(plain(node), node)
        composed = _COMPOSED.get(type(node))
        if composed is None:
            raise UnsupportedTypeError(getattr(node, "cls", type(node)), where)
        return composed(self, node, where)

    def _define(self, cls: object, write: Callable[[], Json]) -> Json:
        """Return a reference to the definition of a class, writing that the first time."""
        name = self._names.get(cls)
        if name is None:
            name = self._names[cls] = self._free_name(cls)
            self._definitions[name] = {}
            self._definitions[name] = write()
        else:
            self._again.add(name)
        return {"$ref": f"#/$defs/{name}"}

    def _free_name(self, cls: object) -> str:
        wanted = re.sub(r"[^\w.-]", "_", _class_name(cls)).strip("_")
        name, n = wanted, 1
        while name in self._names.values():
            n += 1
            name = f"{wanted}_{n}"
        return name

    # What each kind of node becomes.

    def array(self, node: Any, where: str) -> Json:
        items = self.schema(node.item_type, f"{where}[]")
        return _with_limits({"type": "array", "items": items}, node, "Items")

    def collection(self, node: Any, where: str) -> Json:
        """Return the schema of a set: repeats do no harm unless it has to be of a size."""
        schema = self.array(node, where)
        return {**schema, "uniqueItems": True} if schema.get("minItems", 0) > 1 else schema

    def row(self, types: list[info.Type], required: int, where: str) -> Json:
        return {
            "type": "array",
            "prefixItems": [self.schema(item, f"{where}[{i}]") for i, item in enumerate(types)],
            "items": False,
            "minItems": required,
            "maxItems": len(types),
        }

    def fixed(self, node: info.TupleType, where: str) -> Json:
        if not node.item_types:
            return {"type": "array", "maxItems": 0}
        return self.row(list(node.item_types), len(node.item_types), where)

    def mapping(self, node: info.DictType, where: str) -> Json:
        values = self.schema(node.value_type, f"{where}[...]")
        names = _names(node.key_type)
        if names:
            closed = dict.fromkeys(names, values)
            schema = {"type": "object", "properties": closed, "additionalProperties": False}
        else:
            schema = {"type": "object", "additionalProperties": values}
            schema |= self._keys(node.key_type, f"{where} keys")
        return _with_limits(schema, node, "Properties")

    def _keys(self, node: info.Type, where: str) -> Json:
        """What keys may be, which are texts whatever they stand for."""
        schema = self._key(node, where)
        return {} if schema in ({}, _TEXT) else {"propertyNames": schema}

    def _key(self, node: info.Type, where: str) -> Json:
        schema = self.schema(node, where)
        if schema.get("type") == "integer" and len(schema) == 1:
            return {"pattern": INTEGER_KEY}
        if schema and schema.get("type") != "string":
            raise UnsupportedTypeError(getattr(node, "cls", type(node)), where)
        return schema

    def record(self, node: Any, where: str) -> Json:
        return self._define(node.cls, lambda: self._members(node, where))

    def structure(self, node: info.StructType, where: str) -> Json:
        return self._define(
            node.cls,
            lambda: self._row_of(node, where) if node.array_like else self._members(node, where),
        )

    def named_row(self, node: info.NamedTupleType, where: str) -> Json:
        return self._define(node.cls, lambda: self._row_of(node, where))

    def _row_of(self, node: Any, where: str) -> Json:
        types = [field.type for field in node.fields]
        required = sum(field.required for field in node.fields)
        tag = getattr(node, "tag", None)
        if tag is not None:
            types.insert(0, info.LiteralType((tag,)))
            required += 1
        return {**_about(node.cls), **self.row(types, required, where)}

    def _members(self, node: Any, where: str) -> Json:
        properties: Json = {}
        required = [field.encode_name for field in node.fields if field.required]
        tag_field = getattr(node, "tag_field", None)
        if tag_field is not None:
            properties[tag_field] = {"const": node.tag}
            required.insert(0, tag_field)
        for field in node.fields:
            properties[field.encode_name] = self._field(field, f"{where}.{field.name}")
        return {
            **_about(node.cls),
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    def _field(self, field: info.Field, where: str) -> Json:
        schema = self.schema(field.type, where)
        default = field.default
        if field.default_factory in {list, dict}:
            default = field.default_factory()
        if default is msgspec.NODEFAULT or default is msgspec.UNSET:
            return schema
        try:
            return {**schema, "default": msgspec.to_builtins(default, str_keys=True)}
        except (TypeError, ValueError):
            return schema  # a default that JSON cannot say is none to tell


_COMPOSED: dict[type, Callable[[_Writer, Any, str], Json]] = {
    info.ListType: _Writer.array,
    info.SetType: _Writer.collection,
    info.FrozenSetType: _Writer.collection,
    info.VarTupleType: _Writer.array,
    info.CollectionType: _Writer.array,
    info.TupleType: _Writer.fixed,
    info.DictType: _Writer.mapping,
    info.StructType: _Writer.structure,
    info.DataclassType: _Writer.record,
    info.TypedDictType: _Writer.record,
    info.NamedTupleType: _Writer.named_row,
}

_TEXT = {"type": "string"}
_PLAIN: dict[type, Callable[[Any], Json]] = {
    info.AnyType: lambda _: {},
    info.RawType: lambda _: {},
    info.NoneType: lambda _: {"type": "null"},
    info.BoolType: lambda _: {"type": "boolean"},
    info.IntType: lambda _: {"type": "integer"},
    info.FloatType: lambda _: {"type": "number"},
    info.StrType: lambda _: _TEXT,
    info.BytesType: lambda node: _bytes(node),
    info.ByteArrayType: lambda node: _bytes(node),
    info.MemoryViewType: lambda node: _bytes(node),
    info.DateTimeType: lambda node: _zoned("date-time", NAIVE_DATE_TIME, node.tz),
    info.TimeType: lambda node: _zoned("time", NAIVE_TIME, node.tz),
    info.DateType: lambda _: {**_TEXT, "format": "date"},
    info.TimeDeltaType: lambda _: {**_TEXT, "pattern": DURATION},
    info.UUIDType: lambda _: {**_TEXT, "format": "uuid"},
    info.DecimalType: lambda _: {**_TEXT, "pattern": DECIMAL},
    info.LiteralType: lambda node: {"enum": list(node.values)},
}

_LIMITS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
    "pattern": "pattern",
}


def _with_limits(schema: Json, node: info.Type, of: str = "Length") -> Json:
    """Return `schema` with the keywords for what `msgspec.Meta` has limited."""
    limits = {
        keyword: value
        for name, keyword in _LIMITS.items()
        if (value := getattr(node, name, None)) is not None
    }
    for bound in ("min", "max"):
        size = getattr(node, f"{bound}_length", None)
        if size is not None and "pattern" not in schema:  # which counts bytes
            limits[f"{bound}{of}"] = size
    return {**schema, **limits}


def _bytes(node: Any) -> Json:
    """Texts in base64: four characters for three bytes, and an end of its own for each rest."""
    least, most = node.min_length or 0, node.max_length
    if not least and most is None:
        return {**_TEXT, "pattern": BASE64}
    ways = []
    for rest, end in enumerate(("", f"{_SIXBIT}{{2}}==", f"{_SIXBIT}{{3}}=")):
        low = max(0, (least - rest + 2) // 3)
        high = None if most is None else (most - rest) // 3
        if high is None or low <= high:
            ways.append(f"({_SIXBIT}{{4}}){{{low},{'' if high is None else high}}}{end}")
    return {**_TEXT, "pattern": f"^({'|'.join(ways)})$"}


def _zoned(name: str, naive: str, tz: bool | None) -> Json:  # noqa: FBT001 -- msgspec's own value
    """A time of day or date with one: with a zone unless the type forbids it."""
    return {**_TEXT, "pattern": naive} if tz is False else {**_TEXT, "format": name}


def _names(node: info.Type) -> list[str]:
    """All keys of a type that lists them."""
    if isinstance(node, info.EnumType):
        return [str(member.value) for member in node.cls]
    return [str(value) for value in node.values] if isinstance(node, info.LiteralType) else []


def _enumeration(cls: type[enum.Enum]) -> Json:
    return {**_about(cls), "enum": [member.value for member in cls]}


def _class_name(cls: object) -> str:
    """The class with its parameters: Box[int]."""
    arguments = getattr(cls, "__args__", ())
    name = str(getattr(cls, "__name__", repr(cls)))
    inner = ", ".join(map(_class_name, arguments))
    return f"{name}[{inner}]" if arguments else name


def _about(cls: Any) -> Json:
    """Title and description of a class."""
    about = {"title": _class_name(cls)}
    origin = getattr(cls, "__origin__", cls)
    text = vars(origin).get("__doc__")
    generated = text is None or text.startswith((f"{origin.__name__}(", "An enumeration."))
    return about if generated else {**about, "description": inspect.cleandoc(text)}


# --- what pydantic describes ----------------------------------------------------------------------


def loaded_pydantic() -> ModuleType | None:
    """Return pydantic if the program has imported it; nobody else has models of it."""
    return sys.modules.get("pydantic")


def is_pydantic(hint: object) -> bool:
    """Return whether a type is pydantic's, or has one of those inside its brackets."""
    if loaded_pydantic() is None:
        return False
    own = isinstance(hint, type) and any(
        hasattr(hint, name) for name in ("__pydantic_core_schema__", "__get_pydantic_core_schema__")
    )
    metadata = type(hint).__module__.partition(".")[0] == "pydantic"
    return own or metadata or any(map(is_pydantic, _arguments(hint)))


def _arguments(hint: object) -> tuple[object, ...]:
    arguments = getattr(hint, "__args__", ()) + getattr(hint, "__metadata__", ())
    return arguments if isinstance(arguments, tuple) else ()


def adapted(schema: Any) -> Any:
    """Return pydantic's schema in keywords that a grammar can hold.

    What is dropped needs no grammar: pydantic itself tells the members of a union apart, drops what
    a set has twice, and annotates texts by formats that forbid none.
    """
    if not isinstance(schema, dict):
        return copy.deepcopy(schema)
    new = {key: _adapted_keyword(key, value) for key, value in schema.items()}
    if new.pop("discriminator", None) is not None and "oneOf" in new:
        new["anyOf"] = new.pop("oneOf")
    if new.get("uniqueItems") and new.get("minItems", 0) < 2:
        del new["uniqueItems"]
    if new.get("format") in _ANNOTATIONS:
        del new["format"]
    if new.get("format") == "duration":
        del new["format"]
        new["pattern"] = DURATION
    if "properties" in new:
        new.setdefault("additionalProperties", False)
    return new


def _adapted_keyword(key: str, value: Any) -> Any:
    if key in {"properties", "$defs", "patternProperties", "dependentSchemas"}:
        return {name: adapted(item) for name, item in value.items()}
    if key in {"anyOf", "oneOf", "allOf", "prefixItems"}:
        return [adapted(item) for item in value]
    if key in {"items", "additionalProperties", "propertyNames", "contains", "not"}:
        return adapted(value)
    return copy.deepcopy(value)
