"""Functions as schemas, schemas as text for a prompt, and JSON that is nearly right."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jsonschema
import msgspec
import pydantic
import pytest
from msgspec import Meta

from llamactor import (
    Grammar,
    SchemaValidationError,
    describe_schema,
    repair,
    schema_of,
    schema_of_function,
)

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]


class Place(msgspec.Struct):
    city: str
    country: str = "FI"


class Tree(msgspec.Struct):
    name: str
    children: list[Tree] = []


class Filter(pydantic.BaseModel):
    word: str
    limit: int = pydantic.Field(10, ge=1)


def weather(
    place: Place,
    days: Annotated[int, Meta(ge=1, le=7)] = 3,
    *,
    unit: Literal["C", "F"] = "C",
    since: datetime.date | None = None,
) -> str:
    """Tell the weather of some days.

    It is never wrong.

    Args:
        place: Where
            to look.
        days: How many days.
        unit: Celsius or Fahrenheit.
        since: The first day.

    Returns:
        A text.

    Raises:
        OSError: it is.
    """
    return f"{place.city} {days} {unit} {since}"


# --- functions ------------------------------------------------------------------------------------


def test_a_function_is_an_object_of_its_parameters() -> None:
    assert schema_of_function(weather).json == {
        "type": "object",
        "properties": {
            "place": {
                "title": "Place",
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "country": {"type": "string", "default": "FI"},
                },
                "required": ["city"],
                "additionalProperties": False,
                "description": "Where to look.",
            },
            "days": {
                "type": "integer",
                "minimum": 1,
                "maximum": 7,
                "description": "How many days.",
                "default": 3,
            },
            "unit": {
                "enum": ["C", "F"],
                "description": "Celsius or Fahrenheit.",
                "default": "C",
            },
            "since": {
                "anyOf": [{"type": "string", "format": "date"}, {"type": "null"}],
                "description": "The first day.",
                "default": None,
            },
        },
        "required": ["place"],
        "additionalProperties": False,
    }


def test_a_function_has_name_and_description() -> None:
    schema = schema_of_function(weather)
    assert schema.name == "weather"
    assert schema.description == "Tell the weather of some days.\n\nIt is never wrong."
    assert repr(schema) == "schema_of(weather)"


def test_arguments_get_the_types_of_the_parameters() -> None:
    schema = schema_of_function(weather)
    given = {"place": {"city": "Turku"}, "since": "2024-05-17", "unit": "F"}
    arguments = schema.convert_arguments(given)
    assert arguments == {
        "place": Place("Turku"),
        "since": datetime.date(2024, 5, 17),
        "unit": "F",
    }
    assert weather(**arguments) == "Turku 3 F 2024-05-17"
    assert schema.convert('{"place":{"city":"Turku"}}') == {"place": Place("Turku")}
    assert schema.partial('{"place":{"city":"Tu') == {"place": {"city": "Tu"}}


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        ({}, (), "'place' of weather is missing"),
        ({"place": {"city": "T"}, "day": 1}, (), "no parameter 'day'; it has: place, days, unit"),
        ({"place": {"city": 1}}, ("place", "city"), "Expected `str`"),
        ({"place": {"city": "T"}, "days": 9}, ("days",), "<= 7"),
        ({"place": {"city": "T"}, "unit": "K"}, ("unit",), "Invalid enum value"),
    ],
)
def test_arguments_that_do_not_fit_say_which(
    given: dict[str, Any], path: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SchemaValidationError, match=message) as caught:
        schema_of_function(weather).convert_arguments(given)
    assert caught.value.path == path


def test_arguments_are_an_object() -> None:
    with pytest.raises(SchemaValidationError, match="must be an object"):
        schema_of_function(weather).convert("[1]")


def test_each_parameter_has_its_own_kind_of_type() -> None:
    def find(filter: Filter, n: Annotated[int, Meta(ge=1)] = 1, trees: list[Tree] = []) -> None:  # noqa: A002, B006
        """Find."""

    schema = schema_of_function(find)
    jsonschema.Draft202012Validator.check_schema(schema.json)
    assert schema.json["properties"]["n"] == {"type": "integer", "minimum": 1, "default": 1}
    assert schema.json["properties"]["trees"]["items"] == {"$ref": "#/$defs/Tree"}
    arguments = schema.convert_arguments({"filter": {"word": "a"}, "trees": [{"name": "b"}]})
    assert arguments == {"filter": Filter(word="a", limit=10), "trees": [Tree("b")]}
    with pytest.raises(SchemaValidationError) as caught:
        schema.convert_arguments({"filter": {"word": "a", "limit": 0}})
    assert caught.value.path == ("filter", "limit")


def test_definitions_of_one_name_are_kept_apart() -> None:
    other = msgspec.defstruct("Tree", [("leaf", bool)])

    def climb(tree: Tree, others: list[Any]) -> None:
        """Climb."""

    climb.__annotations__["others"] = list[other]  # type: ignore[valid-type]
    schema = schema_of_function(climb).json
    assert schema["properties"]["tree"] == {"$ref": "#/$defs/Tree"}
    assert schema["properties"]["others"]["items"] == {"$ref": "#/$defs/Tree_2"}
    assert list(schema["$defs"]["Tree_2"]["properties"]) == ["leaf"]


def _node_over(tree: Any) -> Any:
    return msgspec.defstruct("Node", [("tree", tree)])


def test_classes_of_one_name_over_different_classes_are_kept_apart() -> None:
    first = _node_over(msgspec.defstruct("Tree", [("leaf", bool)]))
    second = _node_over(msgspec.defstruct("Tree", [("fruit", int)]))

    def f(x: list[Any], y: list[Any], z: list[Any]) -> None:
        """F."""

    f.__annotations__.update(x=list[first], y=list[second], z=dict[str, second])  # type: ignore[valid-type]
    schema = schema_of_function(f)
    grammar = Grammar.json_schema(schema.json)
    for x, y, fits in [('"leaf":true', '"fruit":1', True), ('"fruit":1', '"leaf":true', False)]:
        text = f'{{"x":[{{"tree":{{{x}}}}}],"y":[{{"tree":{{{y}}}}}],"z":{{}}}}'
        assert grammar.accepts(text) is fits
        if fits:
            assert schema.convert(text)["y"][0].tree.fruit == 1
    assert sorted(schema.json["$defs"]) == ["Node", "Node_2", "Tree", "Tree_2"]


class Point:
    """A point that draws itself."""

    x: str = "no parameter"

    def __init__(self, x: int, y: Annotated[int, Meta(ge=0)] = 0) -> None:
        self.at = (x, y)


class Corner(Point): ...


@dataclasses.dataclass
class Line:
    start: int
    end: int = 0


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        *((Point, {"x": "integer", "y": "integer"}), (Corner, {"x": "integer", "y": "integer"})),
        *(
            (Line, {"start": "integer", "end": "integer"}),
            (Place, dict.fromkeys(["city"], "string")),
        ),
        (Filter, {"word": "string", "limit": "integer"}),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_the_parameters_of_a_class_are_those_of_its_initialiser(
    cls: type[Any], names: dict[str, str]
) -> None:
    properties = schema_of_function(cls).json["properties"]
    assert {name: properties[name]["type"] for name in names} == names


class Station:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def ask(self, n: int) -> None:
        """Ask."""
        self.asked.append(n)

    def __call__(self, word: str) -> None:
        """Call."""


def test_methods_partials_and_other_callables_have_schemas() -> None:
    station = Station()
    assert list(schema_of_function(station.ask).json["properties"]) == ["n"]
    assert list(schema_of_function(station).json["properties"]) == ["word"]
    assert schema_of_function(station).name == "Station"
    bound = functools.partial(weather, unit="F")
    assert schema_of_function(bound).json["properties"]["unit"]["default"] == "F"

    @functools.wraps(weather)
    def wrapped(*args: Any, **kwargs: Any) -> str:
        return weather(*args, **kwargs)

    assert schema_of_function(wrapped).json == schema_of_function(weather).json


def test_a_function_without_parameters_takes_an_empty_object() -> None:
    def now() -> str:
        """Tell the time."""
        return ""

    schema = schema_of_function(now)
    assert schema.json == {
        "type": "object",
        "properties": {},
        "required": [],
        "additionalProperties": False,
    }
    assert schema.convert_arguments({}) == {}
    with pytest.raises(SchemaValidationError, match="it has: none"):
        schema.convert_arguments({"a": 1})


def test_a_description_of_the_type_goes_before_the_docstring() -> None:
    def f(n: Annotated[int, Meta(description="mine")]) -> None:
        """F.

        Args:
            n: theirs
        """

    assert schema_of_function(f).json["properties"]["n"]["description"] == "mine"


def star(*words: str) -> None: ...


def double(**words: str) -> None: ...


def only(word: str, /) -> None: ...


def bare(word) -> None: ...  # type: ignore[no-untyped-def]


def odd(word: complex) -> None: ...


def lost(word: Missing) -> None: ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (star, r"star: parameter \*words: .* cannot be given by name"),
        (double, r"double: parameter \*\*words: .* cannot be given by name"),
        (only, "only: parameter word: .* cannot be given by name"),
        (bare, "bare: parameter word has no type hint, such as word: str"),
        (odd, "odd: parameter word: complex has no JSON Schema"),
        (lost, "a type hint of lost cannot be found: .*Missing"),
    ],
)
def test_what_a_model_cannot_call_is_refused(function: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        schema_of_function(function)


# --- descriptions ---------------------------------------------------------------------------------


def test_a_description_shows_the_form_and_an_example() -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "description": "of the\nperson", "maxLength": 20},
            "age": {"type": "integer", "minimum": 18},
            "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}},
            "spouse": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    text = describe_schema(schema)
    assert text == (
        "Answer with JSON and nothing else, in this form:\n"
        "\n"
        "{\n"
        "  // of the person\n"
        '  "name": string (maxLength 20),\n'
        '  "age": integer (minimum 18),\n'
        '  "pets"?: ["cat" | "dog", ...],\n'
        '  "spouse"?: Answer | null\n'
        "}\n"
        "\n"
        "where Answer is all of this again\n"
        "\n"
        "For example:\n"
        "\n"
        '{"name":"text","age":18,"pets":["cat"],"spouse":{"name":"text","age":18}}'
    )


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        (int, "integer"),
        (dict[str, int], "{\n  any name: integer\n}"),
        (tuple[int, str], "[integer, string] (minItems 2, maxItems 2)"),
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, "string & anything (minLength 2)"),
        ({"type": ["string", "null"]}, "string | null"),
        ({"const": "x"}, '"x"'),
        ({}, "anything"),
        ({"items": {"type": "null"}}, "[null, ...]"),
        ({"type": "object", "additionalProperties": False}, "{}"),
        ({"anyOf": [True, False]}, "anything | nothing"),
        (Annotated[str, Meta(pattern="^a+$")], 'string (pattern "^a+$")'),
    ],
    ids=lambda item: str(item)[:30],
)
def test_every_keyword_has_a_notation(spec: Any, form: str) -> None:
    assert describe_schema(spec).startswith(
        f"Answer with JSON and nothing else, in this form:\n\n{form}"
    )


def test_classes_are_described_once_by_name() -> None:
    text = describe_schema(list[Tree])
    assert text.count("where Tree is\n{") == 1
    assert '"children"?: [Tree, ...]' in text


@pytest.mark.parametrize(
    "spec",
    [
        *(Tree, Place, Filter, list[Tree], dict[str, Place], Place | None, datetime.date),
        *(Annotated[int, Meta(gt=3, lt=9)], Annotated[float, Meta(multiple_of=0.5)]),
        *(Annotated[str, Meta(min_length=30)], Annotated[str, Meta(max_length=2)]),
        *(Annotated[list[int], Meta(min_length=3)], tuple[int, str, bool]),
        *({"format": name, "type": "string"} for name in ("uuid", "email", "uri", "ipv6", "time")),
    ],
    ids=lambda item: str(item)[:40],
)
def test_examples_fit(spec: Any) -> None:
    _, found, example = describe_schema(spec).partition("\n\nFor example:\n\n")
    assert found
    schema_of(spec).convert(example)


def test_an_example_that_would_not_fit_is_left_out() -> None:
    assert "For example" not in describe_schema({"type": "string", "pattern": "^x{3}$"})


def test_nesting_without_end_is_not_described() -> None:
    schema: dict[str, Any] = {}
    for _ in range(600):
        schema = {"items": schema, "type": "array"}
    with pytest.raises(ValueError, match="nested too deep"):
        describe_schema(schema)


def _doubling(levels: int) -> dict[str, Any]:
    """Objects with two members that are the next one."""
    definitions: dict[str, Any] = {f"d{levels}": {"type": "null"}}
    for level in range(levels):
        both = {key: {"$ref": f"#/$defs/d{level + 1}"} for key in "ab"}
        definitions[f"d{level}"] = {"type": "object", "properties": both, "required": ["a", "b"]}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def test_an_example_that_would_be_endless_is_left_out() -> None:
    assert "For example" in describe_schema(_doubling(4))
    assert "For example" not in describe_schema(_doubling(60))
    nested: dict[str, Any] = {"type": "integer"}
    for _ in range(12):
        nested = {"type": "array", "items": nested, "minItems": 8}
    assert "For example" not in describe_schema(nested)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"properties": 5}, "at #/properties: 5 is not of type 'object'"),
        ({"examples": {"a": 1}}, "at #/examples: "),
        ({"enum": 5}, "at #/enum: "),
        ({"required": 5, "properties": {"a": {}}}, "at #/required: "),
        ({"type": "array", "minItems": "x"}, "at #/minItems: "),
        ({"type": "string", "minLength": "1"}, "at #/minLength: "),
        ({"anyOf": {"a": 1}}, "at #/anyOf: "),
    ],
)
def test_what_is_no_schema_is_not_described(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"no usable JSON Schema: {re.escape(reason)}"):
        describe_schema(schema)


# --- repairs --------------------------------------------------------------------------------------

PLACE = Place("Turku", "FI")


@pytest.mark.parametrize(
    "text",
    [
        '{"city":"Turku"}',
        'Here you are:\n```json\n{"city": "Turku"}\n```\nAnything else?',
        'Sure! {"city": "Turku", "country": "FI"} is what you want.',
        "{city: 'Turku'}",
        '{"city": "Turku",}',
        '{"city": "Turku"',
        '{"city": "Turku", "country": "FI',
        "```\n{'city': 'Turku'}",
        'The answer is {"city": "Turku" /* of course */}',
        '{"city": "Turku", "country": "FI"}}}',
        'Not [this], but {"city": "Turku"}',
    ],
)
def test_a_repair_finds_what_is_meant(text: str) -> None:
    assert repair(text, Place) == PLACE


def test_a_repair_takes_any_kind_of_schema() -> None:
    assert repair("so: [1, 2, 3", list[int]) == [1, 2, 3]
    assert repair("{'a': True}", {"type": "object"}) == {"a": True}
    assert repair("42", int) == 42
    assert repair("{'word': 'a'}", Filter) == Filter(word="a", limit=10)
    assert repair('"text"', str) == "text"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", ()),
        ("I do not know.", ()),
        ("{'country': 'FI'}", ()),
        ("{'city': 5}", ("city",)),
        ("[" * 50_000, ()),
        ('{"city":' * 5_000, ()),
    ],
)
def test_what_is_beyond_repair_says_why(text: str, path: tuple[str, ...]) -> None:
    with pytest.raises(SchemaValidationError) as caught:
        repair(text, Place)
    assert caught.value.path == path


def test_a_repair_invents_nothing() -> None:
    with pytest.raises(SchemaValidationError, match="missing required field `city`"):
        repair('{"country": "SE", }', Place)


def test_a_fence_is_looked_for_in_linear_time() -> None:
    with pytest.raises(SchemaValidationError):
        repair("```" + " " * 1_000_000, int)
    with pytest.raises(SchemaValidationError):
        repair("```" + "\t" * 500_000 + "x" * 500_000, int)


def test_a_part_that_is_too_long_is_only_tried_as_it_is() -> None:
    rows = [{"city": "Turku", "country": "FI"}] * 600
    text = msgspec.json.encode(rows).decode()
    assert len(text) > 16_384
    fenced = f"Here:\n```json\n{text}\n```\n"
    assert repair(fenced, list[Place]) == [PLACE] * 600
    with pytest.raises(SchemaValidationError, match="more than 16384 characters are not repaired"):
        repair(fenced.replace("]", ",]"), list[Place])
    assert repair(f"{'so ' * 10_000}\n```\n{{city: 'Turku'}}\n```", Place) == PLACE


def test_a_text_that_leads_a_repair_astray_is_left_when_it_is_long() -> None:
    with pytest.raises(SchemaValidationError, match="are not repaired"):
        repair('["' + 'a" b ' * 150_000, dict)
    blocks = "".join(f"```\n{{{number}\n```\n" for number in range(60_000))
    with pytest.raises(SchemaValidationError, match="are not repaired"):
        repair(blocks, Place)


def test_a_text_that_is_too_long_is_not_repaired() -> None:
    with pytest.raises(ValueError, match="the limit of a repair is 1048576"):
        repair("x" * 1_100_000, Place)
