"""Schemas of JSON and of types: what is written, and the values that texts become."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NotRequired,
    TypedDict,
    TypeVar,
)

import jsonschema
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from llamactor import Grammar, LlamactorError, Schema, SchemaValidationError, schema_of
from llamactor.schema.validation import Validator
from tests.conftest import TIME_SCALE

if TYPE_CHECKING:
    from llamactor import Model

T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(msgspec.Struct):
    """A place."""

    x: int
    y: int = 0


class Tree(msgspec.Struct):
    name: str
    children: list[Tree] = []


class Circle(msgspec.Struct, tag="circle"):
    radius: float


class Square(msgspec.Struct, tag="square"):
    side: float


class Row(msgspec.Struct, array_like=True, tag=True):
    a: int
    b: str = ""


class Box(msgspec.Struct, Generic[T]):
    content: T


@dataclasses.dataclass
class Person:
    name: str
    born: datetime.date
    tags: set[str] = dataclasses.field(default_factory=set)


class Pair(NamedTuple):
    left: int
    right: str = "r"


class Options(TypedDict):
    size: int
    colour: NotRequired[Colour]


class Unheard(msgspec.Struct):
    n: int

    def __post_init__(self) -> None:
        if self.n == 13:
            raise ValueError("thirteen is unlucky")


class Animal(pydantic.BaseModel):
    """Some animal."""

    kind: Literal["cat", "dog"]
    legs: int = pydantic.Field(4, ge=0, alias="limbs", description="how many it stands on")
    friends: list[Animal] = []
    seen: datetime.datetime | None = None


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]


class Percent(pydantic.BaseModel):
    value: Annotated[decimal.Decimal, pydantic.Field(lt=100, decimal_places=2)]


class Money(pydantic.BaseModel):
    amount: Annotated[decimal.Decimal, pydantic.Field(gt=0, max_digits=6, decimal_places=2)]
    rate: decimal.Decimal
    paid: pydantic.NaiveDatetime


class Page(pydantic.BaseModel):
    home: pydantic.HttpUrl


class Owner(pydantic.BaseModel):
    pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]
    names: set[str]
    secret: pydantic.SecretStr = pydantic.SecretStr("")
    every: datetime.timedelta | None = None

    @pydantic.field_validator("names")
    @classmethod
    def no_rex(cls, names: set[str]) -> set[str]:
        if "Rex" in names:
            raise ValueError("not another Rex")
        return names


def refused(schema: Schema[Any], text: str) -> SchemaValidationError:
    with pytest.raises(SchemaValidationError) as caught:
        schema.convert(text)
    return caught.value


# --- what is written ------------------------------------------------------------------------------

TEXT = {"type": "string"}
POINT = {
    "title": "Point",
    "description": "A place.",
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer", "default": 0}},
    "required": ["x"],
    "additionalProperties": False,
}

WRITTEN: list[tuple[Any, dict[str, Any]]] = [
    (int, {"type": "integer"}),
    (float, {"type": "number"}),
    (bool, {"type": "boolean"}),
    (str, TEXT),
    (type(None), {"type": "null"}),
    (Any, {}),
    (list, {"type": "array", "items": {}}),
    (dict, {"type": "object", "additionalProperties": {}}),
    (list[int], {"type": "array", "items": {"type": "integer"}}),
    (set[int], {"type": "array", "items": {"type": "integer"}}),
    (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
    (
        Annotated[set[int], Meta(min_length=2)],
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "uniqueItems": True},
    ),
    (
        tuple[int, str],
        {
            "type": "array",
            "prefixItems": [{"type": "integer"}, TEXT],
            "items": False,
            "minItems": 2,
            "maxItems": 2,
        },
    ),
    (tuple[()], {"type": "array", "maxItems": 0}),
    (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
    (
        dict[Colour, bool],
        {
            "type": "object",
            "properties": {"red": {"type": "boolean"}, "blue": {"type": "boolean"}},
            "additionalProperties": False,
        },
    ),
    (
        dict[int, bool],
        {
            "type": "object",
            "additionalProperties": {"type": "boolean"},
            "propertyNames": {"pattern": "^(0|-?[1-9][0-9]{0,14})$"},
        },
    ),
    (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
    (Literal["a", 1], {"enum": [1, "a"]}),
    (Colour, {"title": "Colour", "enum": ["red", "blue"]}),
    (datetime.date, {**TEXT, "format": "date"}),
    (datetime.datetime, {**TEXT, "format": "date-time"}),
    (datetime.time, {**TEXT, "format": "time"}),
    (uuid.UUID, {**TEXT, "format": "uuid"}),
    (Annotated[int, Meta(ge=1, lt=9)], {"type": "integer", "minimum": 1, "exclusiveMaximum": 9}),
    (Annotated[int, Meta(gt=1, le=9)], {"type": "integer", "exclusiveMinimum": 1, "maximum": 9}),
    (Annotated[int, Meta(multiple_of=5)], {"type": "integer", "multipleOf": 5}),
    (
        Annotated[str, Meta(min_length=1, max_length=3, pattern="^a")],
        {**TEXT, "minLength": 1, "maxLength": 3, "pattern": "^a"},
    ),
    (
        Annotated[list[bool], Meta(min_length=1, max_length=3)],
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    ),
    (
        Annotated[dict[str, bool], Meta(max_length=3)],
        {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
    ),
    (Annotated[str, Meta(description="a name")], {**TEXT, "description": "a name"}),
    (Point, POINT),
    (
        list[Point],
        {"type": "array", "items": {"$ref": "#/$defs/Point"}, "$defs": {"Point": POINT}},
    ),
    (
        Pair,
        {
            "title": "Pair",
            "type": "array",
            "prefixItems": [{"type": "integer"}, TEXT],
            "items": False,
            "minItems": 1,
            "maxItems": 2,
        },
    ),
]


@pytest.mark.parametrize(("hint", "expected"), WRITTEN, ids=lambda item: str(item)[:40])
def test_a_type_has_the_json_schema_of_its_values(hint: Any, expected: dict[str, Any]) -> None:
    assert schema_of(hint).json == expected


def test_properties_keep_the_order_of_the_fields() -> None:
    assert list(schema_of(Person).json["properties"]) == ["name", "born", "tags"]
    assert schema_of(Person).text.startswith('{"title":"Person","type":"object","properties":')


def test_a_class_that_refers_to_itself_is_a_definition() -> None:
    schema = schema_of(Tree).json
    assert schema["$ref"] == "#/$defs/Tree"
    children = schema["$defs"]["Tree"]["properties"]["children"]
    assert children["items"] == {"$ref": "#/$defs/Tree"}


def test_tagged_classes_are_told_apart_by_a_constant() -> None:
    schema = schema_of(Circle | Square).json
    assert schema["anyOf"] == [{"$ref": "#/$defs/Circle"}, {"$ref": "#/$defs/Square"}]
    assert schema["$defs"]["Square"]["properties"]["type"] == {"const": "square"}
    assert schema["$defs"]["Square"]["required"] == ["type", "side"]


def test_two_classes_of_one_name_are_two_definitions() -> None:
    other = msgspec.defstruct("Point", [("z", bool)])
    schema = schema_of(tuple[Point, other]).json  # type: ignore[valid-type]
    assert schema["$defs"]["Point"] == POINT
    assert list(schema["$defs"]["Point_2"]["properties"]) == ["z"]


def test_a_generic_class_has_its_parameters() -> None:
    assert schema_of(Box[int]).json["properties"] == {"content": {"type": "integer"}}
    assert schema_of(Box[int]).json["title"] == "Box[int]"


def test_a_pydantic_model_says_its_own_schema_closed() -> None:
    schema = schema_of(Animal).json["$defs"]["Animal"]
    assert schema["description"] == "Some animal."
    assert schema["additionalProperties"] is False
    limbs = schema["properties"]["limbs"]
    assert (limbs["minimum"], limbs["description"]) == (0, "how many it stands on")


def test_what_only_pydantic_understands_is_left_to_pydantic() -> None:
    schema = schema_of(Owner)
    for word in ("discriminator", "oneOf", "uniqueItems", "password", '"duration"'):
        assert word not in schema.text
    assert "anyOf" in schema.json["properties"]["pet"]


def test_a_type_may_have_models_anywhere_inside() -> None:
    assert schema_of(list[Cat]).convert('[{"kind":"cat"}]') == [Cat(kind="cat")]
    holder = dataclasses.make_dataclass("Holder", [("cat", Cat)])
    assert schema_of(holder).convert('{"cat":{"kind":"cat"}}') == holder(Cat(kind="cat"))


@pytest.mark.parametrize("hint", [hint for hint, _ in WRITTEN] + [Tree, Person, Animal, Owner, Row])
def test_what_is_written_is_a_json_schema(hint: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(schema_of(hint).json)


@pytest.mark.parametrize(
    ("hint", "named"),
    [
        (complex, "complex has no JSON Schema"),
        (list[complex], r"complex \(at list\[complex\]\[\]\)"),
        (
            dataclasses.make_dataclass("Deep", [("a", dict[str, list[complex]])]),
            r"complex \(at Deep.a\[...\]\[\]\)",
        ),
        (dict[complex, int], r"complex \(at dict\[complex, int\] keys\)"),
        (object, "object has no JSON Schema"),
    ],
)
def test_a_type_without_json_is_named_with_its_place(hint: Any, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        schema_of(hint)


def test_a_model_without_json_says_what_pydantic_says() -> None:
    model = pydantic.create_model("Caller", call=(Callable[[int], int], ...))
    with pytest.raises(TypeError, match=r"Caller has no JSON Schema: .*CallableSchema$"):
        schema_of(model)


@pytest.mark.parametrize("spec", [None, 5, "int", '{"type": "object"}', [int], b"", True, 1.5])
def test_what_is_neither_schema_nor_type_is_refused(spec: object) -> None:
    with pytest.raises(TypeError, match="a schema is a JSON Schema as a dict, or a type"):
        schema_of(spec)


def test_a_type_that_cannot_be_found_is_refused() -> None:
    lost = msgspec.defstruct("Lost", [("a", "Nowhere")])
    with pytest.raises(TypeError, match="Nowhere"):
        schema_of(lost)


# --- JSON Schemas ---------------------------------------------------------------------------------


def test_a_json_schema_is_copied() -> None:
    mine: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
    schema = schema_of(mine)
    mine["properties"]["b"] = {}
    schema.json["properties"]["c"] = {}
    assert schema.json == {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "value",
    [{"enum": [{1, 2}]}, {1: 2}, {"const": float("nan")}, {"a": (1, 2)}, {"a": b""}, {"a": int}],
)
def test_a_dict_that_json_cannot_say_is_refused(value: dict[Any, Any]) -> None:
    with pytest.raises(ValueError, match="JSON cannot say"):
        schema_of(value)


def test_a_dict_in_itself_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["items"] = endless
    with pytest.raises(ValueError, match="JSON cannot say"):
        schema_of(endless)


def test_a_huge_json_schema_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has \d+ bytes, the limit is 1048576"):
        schema_of({"enum": ["x" * 2_000_000]})


def test_schemas_of_one_thing_are_one() -> None:
    assert schema_of(list[int]) is schema_of(list[int])
    assert schema_of({"type": "null"}) == schema_of({"type": "null"}) != schema_of({})
    assert schema_of(schema_of(Point)) is schema_of(Point)
    assert len({schema_of(Point), schema_of(Point), schema_of(Pair)}) == 2
    assert repr(schema_of(Point)) == "schema_of(Point)"


def test_a_schema_knows_the_type_of_its_values() -> None:
    point: Point = schema_of(Point).convert('{"x":1}')
    schema: Schema[Point] = schema_of(Point)
    number: int = schema_of(int).convert("3")
    assert (point.x, schema.convert('{"x":2}').x, number) == (1, 2, 3)


# --- values ---------------------------------------------------------------------------------------

NOON = datetime.datetime(2024, 5, 17, 12, tzinfo=datetime.UTC)

VALUES: list[tuple[Any, str, Any]] = [
    (int, " 3\n", 3),
    (float, "3", 3.0),
    (Colour, '"red"', Colour.RED),
    (datetime.datetime, '"2024-05-17T12:00:00Z"', NOON),
    (datetime.timedelta, '"P1DT2H"', datetime.timedelta(days=1, hours=2)),
    (decimal.Decimal, '"1.50"', decimal.Decimal("1.50")),
    (bytes, '"aGk="', b"hi"),
    (set[int], "[1,1,2]", {1, 2}),
    (tuple[int, str], '[1,"a"]', (1, "a")),
    (dict[int, str], '{"1":"a"}', {1: "a"}),
    (dict[Colour, int], '{"red":1}', {Colour.RED: 1}),
    (dict[Literal["a", "b"], int], '{"b":1}', {"b": 1}),
    (Pair, "[1]", Pair(1)),
    (Row, '["Row",1,"x"]', Row(1, "x")),
    (Options, '{"size":1,"colour":"blue"}', {"size": 1, "colour": Colour.BLUE}),
    (Person, '{"name":"A","born":"2000-01-02"}', Person("A", datetime.date(2000, 1, 2))),
    (Circle | Square, '{"type":"square","side":2}', Square(2)),
    (Tree, '{"name":"a","children":[{"name":"b"}]}', Tree("a", [Tree("b")])),
    (Box[int], '{"content":1}', Box(1)),
    (Animal, '{"kind":"cat","limbs":3}', Animal(kind="cat", limbs=3)),
    ({"type": "array"}, "[1, null]", [1, None]),
    ({"type": "integer"}, "1.0", 1.0),
]


@pytest.mark.parametrize(("spec", "text", "value"), VALUES, ids=lambda item: str(item)[:30])
def test_a_text_becomes_a_value_of_the_type(spec: Any, text: str, value: Any) -> None:
    converted = schema_of(spec).convert(text)
    assert converted == value
    assert type(converted) is type(value)
    assert schema_of(spec).read(text) == value


@pytest.mark.parametrize(("spec", "text", "value"), VALUES, ids=lambda item: str(item)[:30])
def test_the_json_schema_of_a_type_accepts_its_texts(spec: Any, text: str, value: Any) -> None:
    plain = schema_of(schema_of(spec).json).convert(text)
    assert schema_of(spec).convert_value(plain) == value


WRONG: list[tuple[Any, str, tuple[str | int, ...], Any]] = [
    (list[Point], '[{"x":1},{"x":"a"}]', (1, "x"), "a"),
    (dict[str, list[int]], '{"a":[1,"b"]}', ("a", 1), "b"),
    (Point, "[1]", (), [1]),
    (Point, '{"y":1}', (), {"y": 1}),
    (Tree, '{"name":"a","children":[{"name":1}]}', ("children", 0, "name"), 1),
    (list[Unheard], '[{"n":13}]', (0,), {"n": 13}),
    (Animal, '{"kind":"cat","limbs":-1}', ("limbs",), -1),
    (list[Animal], '[{"kind":"cow"}]', (0, "kind"), "cow"),
    (Owner, '{"pet":{"kind":"cat"},"names":["Rex"]}', ("names",), ["Rex"]),
    (Owner, '{"pet":{"kind":"cow"},"names":[]}', ("pet",), {"kind": "cow"}),
    ({"items": {"type": "integer"}}, '[1,"a"]', (1,), "a"),
    ({"properties": {"a": {"items": {"enum": [1]}}}}, '{"a":[1,2]}', ("a", 1), 2),
    ({"type": "object"}, "[]", (), []),
    ({"type": "array"}, "{}", (), {}),
    ({"required": ["a"]}, "{}", (), {}),
    ({"additionalProperties": False, "properties": {"a": {}}}, '{"b":1}', (), {"b": 1}),
    ({"additionalProperties": {"type": "null"}}, '{"b":1}', ("b",), 1),
]


@pytest.mark.parametrize(("spec", "text", "path", "value"), WRONG, ids=lambda item: str(item)[:30])
def test_an_error_says_where_and_what(
    spec: Any, text: str, path: tuple[str | int, ...], value: Any
) -> None:
    error = refused(schema_of(spec), text)
    assert (error.path, error.value) == (path, value)
    assert error.message in str(error)
    assert isinstance(error, LlamactorError)
    assert isinstance(error, ValueError)


def test_an_error_shows_its_place_and_can_be_pickled() -> None:
    error = refused(schema_of(dict[str, list[Point]]), '{"a":[{"x":null}]}')
    assert str(error) == "$.a[0].x: None is not of type 'integer'"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.path, again.value) == (str(error), error.path, error.value)


@pytest.mark.parametrize("spec", [Point, Animal, {"type": "object"}])
@pytest.mark.parametrize(
    "text", ["", "{", "nothing", '{"x":1}}', "NaN", '"\\ud800"', "[1,]", "1e999", "1" * 5000]
)
def test_what_is_no_json_is_an_error_with_the_text(spec: Any, text: str) -> None:
    error = refused(schema_of(spec), text)
    assert error.path == ()


@pytest.mark.parametrize("spec", [Tree, Any, {}, {"items": {"$ref": "#"}}, list[Animal]])
def test_nesting_without_end_is_an_error(spec: Any) -> None:
    refused(schema_of(spec), "[" * 100_000)
    with pytest.raises(SchemaValidationError):
        schema_of(spec).convert("[" * 3000 + "0" + "]" * 3000)


def test_a_value_that_json_cannot_say_is_an_error() -> None:
    with pytest.raises(SchemaValidationError, match="JSON cannot say"):
        schema_of(Point).convert_value({"x": object()})
    assert schema_of(Point).convert_value({"x": 1}) == Point(1)


def test_other_errors_of_the_user_s_class_are_the_user_s() -> None:
    @dataclasses.dataclass
    class Strange:
        def __post_init__(self) -> None:
            raise KeyError("strange")

    with pytest.raises(KeyError, match="strange"):
        schema_of(Strange).convert("{}")


# --- JSON Schemas as they are validated -----------------------------------------------------------

FORMATS: list[tuple[str, list[str], list[str]]] = [
    ("date", ["2024-02-29", "0001-01-01"], ["2023-02-29", "2024-2-1", "20240201", "0000-01-01"]),
    ("time", ["12:30:00Z", "23:59:59.5+02:00"], ["12:30:00", "24:00:00Z", "12:30Z"]),
    ("date-time", ["2024-05-17T12:00:00Z"], ["2024-05-17", "2024-02-30T12:00:00Z"]),
    ("duration", ["P1D", "P1Y2M3DT4H5M6S", "P2W", "PT1S"], ["P", "PT", "1D", "P1S", "P1D2H"]),
    ("uuid", ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000", ""]),
    ("email", ["a.b+c@example.com"], ["a@", "@b", "a b@c.d", "a..b@c.d"]),
    ("hostname", ["example.com", "a", "a-b.c"], ["-a", "a-", "a..b", "a_b", "x" * 64]),
    ("ipv4", ["192.0.2.1"], ["192.0.2", "256.0.0.1", "1.2.3.4.5"]),
    ("ipv6", ["::1", "2001:db8::1"], [":::", "fe80::1%eth0", "12345::"]),
    ("uri", ["https://example.com/a?b#c", "urn:a:b"], ["example.com", "/a", "http://a b", "%zz:"]),
]


@pytest.mark.parametrize(("name", "good", "bad"), FORMATS, ids=[name for name, _, _ in FORMATS])
def test_formats_are_checked(name: str, good: list[str], bad: list[str]) -> None:
    schema = schema_of({"format": name})
    for text in good:
        assert schema.convert_value(text) == text
    for text in bad:
        with pytest.raises(SchemaValidationError, match="is not a"):
            schema.convert_value(text)
    assert schema.convert_value(5) == 5


def test_patterns_are_searched_for() -> None:
    schema = schema_of({"pattern": r"b\d+", "minLength": 2})
    assert schema.convert('"ab12c"') == "ab12c"
    assert refused(schema, '"abc"').message == r"'abc' does not match 'b\\d+'"


def test_pattern_properties_are_told_from_additional_ones() -> None:
    schema = schema_of(
        {"patternProperties": {"^n": {"type": "integer"}}, "additionalProperties": False}
    )
    assert schema.convert('{"n1":1}') == {"n1": 1}
    assert refused(schema, '{"n1":"a"}').path == ("n1",)
    assert "'m' is no property here" in str(refused(schema, '{"m":1}'))


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|a)*$", "^(a*)*b$", "(x+x+)+y"])
def test_no_pattern_takes_for_ever(pattern: str) -> None:
    """These take Python's own expressions longer than anybody waits."""
    with pytest.raises(SchemaValidationError):
        schema_of({"pattern": pattern}).convert_value("a" * 10_000 + "!")


@pytest.mark.parametrize(
    ("schema", "text", "named"),
    [
        ({"type": "whole"}, "5", "#/type"),
        ({"properties": 5}, "{}", "#/properties"),
        ({"pattern": "("}, '""', "unclosed"),
        ({"pattern": "(a{1000}){1000}"}, '""', "size limit"),
        ({"$ref": "https://example.com/schema"}, "5", "example.com"),
        ({"$ref": "#/$defs/nowhere"}, "5", "nowhere"),
        ({"unevaluatedProperties": False}, "{}", "unevaluatedProperties is not supported"),
        ({"minimum": "1"}, "5", "#/minimum"),
    ],
)
def test_a_json_schema_that_is_none_is_no_fault_of_the_value(
    schema: dict[str, Any], text: str, named: str
) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        schema_of(schema).convert(text)
    assert not isinstance(caught.value, SchemaValidationError)


def test_references_lead_within_the_document_and_to_the_drafts() -> None:
    schema = schema_of(
        {"$defs": {"a": {"type": "integer"}}, "items": {"anyOf": [{"$ref": "#/$defs/a"}]}}
    )
    assert schema.convert("[1]") == [1]
    meta = schema_of({"$ref": "https://json-schema.org/draft/2020-12/schema"})
    assert meta.convert('{"type":"object"}') == {"type": "object"}


@given(st.integers(), st.text(), st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_what_a_type_encodes_it_reads_again(n: int, text: str, numbers: list[float]) -> None:
    value = Box((n, text, numbers))
    document = msgspec.json.encode(value).decode()
    schema = schema_of(Box[tuple[int, str, list[float]]])
    assert schema.convert(document) == value
    assert schema_of(schema.json).convert(document) == msgspec.to_builtins(value) | {
        "content": [n, text, numbers]
    }


def test_pydantic_is_imported_by_nobody_but_the_user() -> None:
    code = (
        "import sys, llamactor; llamactor.schema_of(list[int]).convert('[1]');"
        "assert not {'pydantic', 'jsonschema', 'json_repair'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60 * TIME_SCALE)


def test_references_that_multiply_are_no_usable_schema() -> None:
    definitions: dict[str, Any] = {"d40": {"type": "integer"}}
    for level in range(40):
        both = [{"$ref": f"#/$defs/d{level + 1}"}] * 2
        definitions[f"d{level}"] = {"allOf": both}
    schema = schema_of({"$ref": "#/$defs/d0", "$defs": definitions})
    with pytest.raises(ValueError, match="lead to too many others"):
        schema.convert("5")


def test_each_value_of_a_document_has_steps_of_its_own() -> None:
    item = {"anyOf": [{"$ref": "#/$defs/no"}, {"$ref": "#/$defs/no"}, {"type": "integer"}]}
    schema = schema_of({"items": item, "$defs": {"no": {"type": "null"}}})
    many = list(range(5_000))
    assert schema.convert(msgspec.json.encode(many).decode()) == many


# --- schemas are no looser than their types -------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "most"),
    [(0, None), (1, None), (3, None), (5, None), (0, 0), (0, 1), (2, 2), (0, 4), (3, 7), (4, 5)],
)
def test_bytes_are_counted_as_they_are_decoded(least: int, most: int | None) -> None:
    hint: Any = Annotated[bytes, Meta(min_length=least, max_length=most)]
    grammar = Grammar.json_schema(schema_of(hint).json)
    for size in range(12):
        text = msgspec.json.encode(b"\xff" * size).decode()
        assert grammar.accepts(text) is (least <= size <= (12 if most is None else most)), text
        if grammar.accepts(text):
            assert schema_of(hint).convert(text) == b"\xff" * size


def _limited(**limits: Any) -> Any:
    return Annotated[decimal.Decimal, pydantic.Field(**limits)]


MODELLED: list[tuple[Any, list[str], list[str]]] = [
    (decimal.Decimal, ['"1.50"', '"-0.001"', '"12"'], ['"abc"', '""', '"1."', '"NaN"']),
    (_limited(ge=0), ['"0"', '"1.5"', '"0.00"'], ['"-1"', '"x"']),
    (_limited(gt=0), ['"1"', '"0.01"', '"10.0"'], ['"0"', '"0.0"', '"-1"']),
    (_limited(ge=1, lt=10), ["1", "9.75"], ["0.5", "10", '"abc"']),
    (_limited(max_digits=4, decimal_places=2), ['"12.34"', '"-1.5"', '"0"'], ['"123"', '"1.234"']),
    (
        _limited(gt=0, max_digits=4, decimal_places=2),
        ['"99.99"', '"0.01"'],
        ['"0"', '"0.00"', '"-1"'],
    ),
    (_limited(max_digits=3), ['"123"', '"12.3"', '"0.123"'], ['"1234"', '"12.34"']),
    (_limited(max_digits=2, decimal_places=2), ['"0.25"', '"0.5"'], ['"0"', '"1"', '"1.5"']),
    (_limited(decimal_places=0), ['"123"', '"0"'], ['"1.5"']),
    (pydantic.NaiveDatetime, ['"2024-05-17T12:00:00"'], ['"2024-05-17T12:00:00Z"', '"noon"']),
    (pydantic.AwareDatetime, ['"2024-05-17T12:00:00Z"'], ['"2024-05-17T12:00:00"']),
    (
        pydantic.HttpUrl,
        ['"https://example.org/a?b#c"', '"http://a.bc:80"'],
        [
            '"mailto:a@b"',
            '"http://$"',
            '"http://a/%"',
            '"ftp://a.b/"',
            '"http://a:99999/"',
            '"example.org"',
        ],
    ),
    (pydantic.AnyUrl, ['"mailto:a@b"', '"ftp://a.b/"'], ['"a b"', '""']),
    (dict[int, str], ['{"-5":"x"}', '{"0":""}', "{}"], ['{"a":"x"}', '{"1.5":"x"}']),
    (dict[decimal.Decimal, str], ['{"1.5":"x"}'], ['{"a":"x"}']),
    (dict[bool, str], ['{"true":"x"}'], ['{"a":"x"}']),
    (dict[str, str], ['{"a":"x"}'], ['{"a":1}']),
]


@pytest.mark.parametrize(("hint", "fits", "wrong"), MODELLED, ids=lambda item: str(item)[:60])
def test_a_model_s_schema_takes_what_pydantic_takes(
    hint: Any, fits: list[str], wrong: list[str]
) -> None:
    model = schema_of(pydantic.create_model("Holder", f=(hint, ...)))
    validator = Validator(model.json)
    documents = [f'{{"f":{text}}}' for text in fits + wrong]
    for place, document in enumerate(documents):
        taken = validator.first_error(msgspec.json.decode(document)) is None
        assert taken is (place < len(fits)), document
        if "propertyNames" not in model.text:
            assert Grammar.json_schema(model.json).accepts(document) is taken
        if taken:
            model.convert(document)


def test_a_decimal_with_limits_of_two_kinds_has_no_schema() -> None:
    with pytest.raises(
        TypeError, match="digits that are counted and bounds other than 0; give one"
    ):
        schema_of(Percent)


# --- what models write ----------------------------------------------------------------------------

ANSWERED = [
    *(
        Money,
        Annotated[bytes, Meta(max_length=4)],
        Annotated[bytes, Meta(min_length=2, max_length=2)],
    ),
    *(Colour, Point, Tree, Circle | Square, Row, Pair, Options, Person, Animal, Owner, Box[str]),
    *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, uuid.UUID, bytes),
    *(Annotated[datetime.datetime, Meta(tz=False)], Annotated[datetime.time, Meta(tz=False)]),
    *(decimal.Decimal, int, float, bool, str, Any, int | None, Literal["a", 1], type(None)),
    *(list[float], set[int], tuple[int, str], dict[str, float], dict[Colour, int]),
    *(Annotated[int, Meta(ge=-3, lt=7)], Annotated[float, Meta(gt=0)]),
    *(Annotated[str, Meta(pattern="^[ab]+$", max_length=5)], Annotated[bytes, Meta(min_length=3)]),
]


@pytest.mark.parametrize("hint", ANSWERED, ids=lambda item: str(item)[:50])
async def test_whatever_a_model_writes_is_a_value_of_the_type(tiny_model: Model, hint: Any) -> None:
    """Random weights at temperature 1, cut anywhere."""
    schema = schema_of(hint)
    for seed in range(6):
        answer = tiny_model.complete(
            "x", schema=hint, temperature=1.0, seed=seed, max_tokens=50 + 10 * seed
        )
        values = [value async for value in answer.partial_values()]
        result = await answer
        assert result.parsed == schema.convert(result.content)
        assert (values or [None])[-1] == result.parsed
        assert result.completed or result.stop_reason == "max_tokens"
