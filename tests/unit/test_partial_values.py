"""Values as they grow: of any prefix of a document, and while a model writes it."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import enum
import json
import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import msgspec
import numpy as np
import numpy.typing as npt
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

import llamactor
from llamactor import SchemaValidationError, TokenBatching, schema_of
from tests.contexts import soon, until
from tests.models import EOS, byte_tokens

if TYPE_CHECKING:
    from llamactor import Model, Prediction
    from tests.conftest import Gate


class Colour(enum.Enum):
    RED = "red"


class Point(msgspec.Struct):
    x: int
    label: str = ""


class Route(msgspec.Struct):
    name: str
    points: list[Point]
    colour: Colour = Colour.RED
    start: datetime.date | None = None


class Circle(msgspec.Struct, tag="circle"):
    radius: int
    note: str = ""


class Square(msgspec.Struct, tag="square"):
    side: int


@dataclasses.dataclass
class Person:
    name: str
    age: int = 0


class Options(TypedDict, total=False):
    size: int
    note: str


class Pair(NamedTuple):
    left: int
    right: str


class Animal(pydantic.BaseModel):
    name: str
    limbs: int = pydantic.Field(4, alias="legs")
    friends: list[Animal] = []


class Unlucky(msgspec.Struct):
    n: int
    note: str = ""

    def __post_init__(self) -> None:
        if self.n == 13:
            raise ValueError("thirteen is unlucky")


def shown(value: Any) -> Any:
    """A value with its attributes that have come, in plain data."""
    if isinstance(value, msgspec.Struct) and type(value).__name__.startswith("Partial"):
        fields = {name: getattr(value, name) for name in value.__struct_fields__}
        return {name: shown(item) for name, item in fields.items() if item is not UNSET}
    return [shown(item) for item in value] if isinstance(value, list) else value


def growing(spec: Any, text: str, size: int = 1) -> list[Any]:
    """The values of a document that comes in pieces, each time one has changed."""
    reader = schema_of(spec).reader()
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    return [reader.value for piece in pieces if reader.feed(piece)]


# --- prefixes of documents ------------------------------------------------------------------------

PREFIXES: list[tuple[str, Any]] = [
    ("", UNSET),
    ("  ", UNSET),
    ("{", {}),
    ('{"a', {}),
    ('{"a"', {}),
    ('{"a":', {}),
    ('{"a":1', {}),
    ('{"a":1,', {"a": 1}),
    ('{"a":1}', {"a": 1}),
    ('{"a":"', {"a": ""}),
    ('{"a":"b', {"a": "b"}),
    ('{"a":"b\\', {"a": "b"}),
    ('{"a":"b\\u00', {"a": "b"}),
    ('{"a":"b\\u00e9', {"a": "bé"}),
    ('{"a":"\\ud83d', {"a": ""}),
    ('{"a":"\\ud83d\\ude0', {"a": ""}),
    ('{"a":"\\ud83d\\ude00', {"a": "😀"}),
    ('{"a":"\\n\\"', {"a": '\n"'}),
    ("[", []),
    ("[1", []),
    ("[1 ", [1]),
    ("[1.5e3]", [1500.0]),
    ("[1,", [1]),
    ("[tru", []),
    ("[true", [True]),
    ("[null,[", [None, []]),
    ('[{"a":[[],{', [{"a": [[], {}]}]),
    ("12", UNSET),
    ("12 ", 12),
    ("null", None),
    ('"text', "text"),
    ('"text" and more', "text"),
]


@pytest.mark.parametrize(("text", "value"), PREFIXES)
def test_a_prefix_has_the_value_that_is_certain(text: str, value: Any) -> None:
    assert schema_of({}).partial(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("nonsense", UNSET),
        ("[1,]", [1]),
        ("[1 2]", [1]),
        ('{"a":1]', {"a": 1}),
        ('{"a" 1}', {}),
        ("{1:2}", {}),
        ("{[", {}),
        ('["a\\ud800b"]', ["a"]),
        ('["a\\q"]', ["a"]),
        ("]", UNSET),
        ("[nope]", []),
        ("[01]", []),
        (":", UNSET),
    ],
)
def test_what_is_no_json_ends_it(text: str, value: Any) -> None:
    reader = schema_of({}).reader()
    reader.feed(text)
    assert reader.value == value
    assert not reader.feed('{"more":1}')
    assert reader.value == value


documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


@given(documents, st.integers(1, 7), st.booleans())
def test_any_document_in_any_pieces_ends_as_itself(document: Any, size: int, plain: bool) -> None:
    text = json.dumps(document, ensure_ascii=plain) + " "
    reader = schema_of({}).reader()
    for i in range(0, len(text), size):
        reader.feed(text[i : i + size])
    assert reader.value == document


@given(documents, st.data())
def test_a_prefix_is_the_same_in_one_piece_and_in_many(document: Any, data: st.DataObject) -> None:
    text = json.dumps(document, ensure_ascii=data.draw(st.booleans()))
    cut = text[: data.draw(st.integers(0, len(text)))]
    reader = schema_of({}).reader()
    for letter in cut:
        reader.feed(letter)
    assert reader.value == schema_of({}).partial(cut)


@given(documents)
def test_values_only_come_when_they_have_changed(document: Any) -> None:
    values = growing({}, json.dumps(document) + " ")
    assert all(before != after for before, after in pairwise(values))
    assert values[-1:] == [document]


def test_values_that_were_given_out_never_change() -> None:
    text = '{"a":[1,{"b":"xyz"}],"c":{}}'
    values = growing({}, text)
    frozen = [json.dumps(value) for value in values]
    assert growing({}, text) == [json.loads(value) for value in frozen]
    assert [json.dumps(value) for value in values] == frozen


def test_texts_out_of_a_list_or_of_a_format_come_whole() -> None:
    schema = {
        "$defs": {"colour": {"enum": ["red", "green"]}},
        "properties": {"c": {"$ref": "#/$defs/colour"}, "d": {"format": "date"}, "t": {}},
        "additionalProperties": {"const": "x"},
    }
    text = '{"c":"red","d":"2024-05-17","t":"ab","e":"x"}'
    assert growing(schema, text) == [
        {},
        {"c": "red"},
        {"c": "red", "d": "2024-05-17"},
        *({"c": "red", "d": "2024-05-17", "t": t} for t in ("", "a", "ab")),
        {"c": "red", "d": "2024-05-17", "t": "ab", "e": "x"},
    ]


# --- types ----------------------------------------------------------------------------------------


def test_an_open_object_has_unset_for_what_has_not_come() -> None:
    value = schema_of(Route).partial('{"name":"North","points":[{"x":1,"label":"ho')
    assert type(value).__name__ == "PartialRoute"
    assert (value.name, value.colour, value.start) == ("North", UNSET, UNSET)
    assert (value.points[0].x, value.points[0].label) == (1, "ho")


def test_a_closed_object_is_one_of_its_class() -> None:
    text = '{"name":"N","points":[{"x":1},{"x":2,"label":"b"}],"start":"2024-05-17"'
    value = schema_of(Route).partial(text)
    assert value.points == [Point(1), Point(2, "b")]
    assert value.start == datetime.date(2024, 5, 17)
    assert schema_of(Route).partial(text + "}") == schema_of(Route).convert(text + "}")


def test_a_struct_grows_field_by_field() -> None:
    values = growing(Point, '{"x":12,"label":"ab"}')
    assert [shown(value) for value in values[:-1]] == [
        *({}, {"x": 12}, {"x": 12, "label": ""}),
        *({"x": 12, "label": "a"}, {"x": 12, "label": "ab"}),
    ]
    assert values[-1] == Point(12, "ab")


def test_an_enum_comes_whole() -> None:
    assert [shown(value) for value in growing(list[Colour], '["red"]')] == [[], [Colour.RED]]
    literal = growing(Literal["one", "two"], '"two"')
    assert literal == ["two"]


@pytest.mark.parametrize(
    ("spec", "text", "value"),
    [
        (Person, '{"name":"A', {"name": "A"}),
        (Animal, '{"name":"A","legs":2,', {"name": "A", "limbs": 2}),
        (Options, '{"size":1,"note":"a', {"size": 1, "note": "a"}),
        (dict[str, Point], '{"a":{"x":1}', {"a": Point(1)}),
        (tuple[int, str], '[1,"a', [1, "a"]),
        (tuple[int, str], '[1,"a"]', (1, "a")),
        (set[int], "[1,1]", {1}),
        (list[Pair], '[[1,"a"],[2,"b', [Pair(1, "a"), [2, "b"]]),
        (Point | None, '{"x":1,', {"x": 1}),
        (Point | list[Point] | str, '[{"x":1}', [Point(1)]),
        (int | datetime.date, '"2024-05-17"', datetime.date(2024, 5, 17)),
        (list[float], "[1,", [1.0]),
    ],
    ids=lambda item: str(item)[:30],
)
def test_every_kind_of_type_grows(spec: Any, text: str, value: Any) -> None:
    partial = schema_of(spec).partial(text)
    assert shown(partial) == value
    assert type(shown(partial)) is type(value)


def test_a_tag_tells_what_is_growing() -> None:
    first, told, whole = growing(Circle | Square, '{"type":"square","side":3}')
    assert first == {}
    assert repr(told) == "PartialSquare(side=UNSET)"
    assert whole == Square(3)


def test_what_a_class_refuses_stays_as_it_grew() -> None:
    value = schema_of(list[Unlucky]).partial('[{"n":13,"note":"a"},{"n":1}')
    assert shown(value) == [{"n": 13, "note": "a"}, Unlucky(1)]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (Route, '{"name":"N","points":[{"x":1},{"x":2}],"colour":"red","start":null}'),
        (Animal, '{"name":"A","legs":3,"friends":[{"name":"B"}]}'),
        (Circle | Square, '{"type":"circle","radius":1,"note":"n"}'),
        (dict[str, list[Person]], '{"a":[{"name":"A"}],"b":[]}'),
        (Options, '{"size":3}'),
    ],
    ids=lambda item: str(item)[:30],
)
def test_the_last_value_is_the_whole(spec: Any, text: str) -> None:
    assert growing(spec, text)[-1] == schema_of(spec).convert(text)


def test_what_is_whole_is_not_made_again() -> None:
    """So that a piece costs what it adds: what lies before it is shared, not read again."""
    reader = schema_of(list[Point]).reader()
    reader.feed('[{"x":1},{"x":2}')
    first = reader.value
    reader.feed(',{"x":3,"label":"' + "long " * 1000)
    assert reader.value[0] is first[0]
    assert reader.value[1] is first[1]


# --- predictions ----------------------------------------------------------------------------------


class Says:
    """A logits processor that makes any model with the byte-level vocabulary say one text."""

    def __init__(self, text: str, gate: Gate | None = None) -> None:
        self._tokens = [*byte_tokens(text), EOS]
        self._gate = gate

    def __call__(self, tokens: list[int], logits: memoryview[float]) -> None:
        if self._gate is not None:
            self._gate(tokens, logits)
        row: npt.NDArray[np.float32] = np.asarray(logits)
        row[:] = -1000
        row[self._tokens[len(tokens)]] = 0


def saying(model: Model, text: str, schema: Any, **options: Any) -> Prediction:
    return model.complete("x", logits_processor=Says(text), schema=schema, **options)


ROUTE = '{"name":"N","points":[{"x":1},{"x":2}],"colour":"red","start":"2024-05-17"}'


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (Route, ROUTE),
        (Animal, '{"name":"A","legs":3,"friends":[{"name":"B","legs":2,"friends":[]}]}'),
        (Person, '{"name":"é😀","age":3}'),
        (list[int], "[1,2,3]"),
        (int, "42"),
        (str, '"text"'),
        (dict[str, int], '{"a":1}'),
        ({"type": "object", "properties": {"a": {"type": "array", "items": {}}}}, '{"a":[1,null]}'),
        ({"type": "null"}, "null"),
    ],
    ids=lambda item: str(item)[:30],
)
async def test_a_result_has_the_value_of_the_type(
    tiny_model: Model, schema: Any, text: str
) -> None:
    prediction = saying(tiny_model, text, schema)
    values = [value async for value in prediction.partial_values()]
    result = await soon(prediction.result())
    assert result.content == text
    assert result.parsed == schema_of(schema).convert(text)
    assert values[-1] == result.parsed
    assert type(values[-1]) is type(result.parsed)
    assert all(before != after for before, after in pairwise(values))


async def test_results_without_a_schema_have_no_value(tiny_model: Model) -> None:
    prediction = tiny_model.complete("x", logits_processor=Says("[1]"))
    with pytest.raises(ValueError, match="made without schema="):
        prediction.partial_values()
    assert (await soon(prediction.result())).parsed is None


async def test_sequences_and_chats_have_values(tiny_model: Model) -> None:
    context = tiny_model.create_context(context_size=512, sequences=1, threads=1)
    options: dict[str, Any] = {"logits_processor": Says(ROUTE), "schema": Route}
    async with context as opened, opened.sequence() as sequence:
        assert (await soon(sequence.predict("x", **options).result())).parsed.name == "N"
    async with tiny_model.chat() as session:
        prediction = session.prompt("Where to?", **options)
        values = [value async for value in prediction.partial_values()]
        assert (await soon(prediction.result())).parsed == values[-1]
        assert isinstance(values[-1], Route)
        assert session.history[-1].content == ROUTE
    answer = await soon(tiny_model.respond("Where to?", **options).result())
    assert answer.parsed == values[-1]


class Verdict(msgspec.Struct):
    answer: Literal["yes", "no"]
    price: int


async def test_values_are_those_of_the_last_round(tinychat: Model) -> None:
    async def get_fruit_price(name: str) -> str:
        """Get the price of a fruit."""
        return {"apple": "$6", "banana": "$4"}[name]

    prediction = tinychat.chat().prompt(
        "Is an apple more expensive than a banana?",
        tools=[llamactor.tool(get_fruit_price)],
        schema=Verdict,
        max_rounds=2,
        max_tokens=200,
    )
    values = [value async for value in prediction.partial_values()]
    result = await soon(prediction.result())
    assert result.rounds == 2
    assert isinstance(result.parsed, Verdict)
    assert {type(value).__name__ for value in values} <= {"PartialVerdict", "Verdict"}
    assert values[-1] == result.parsed


async def test_a_response_prefix_belongs_to_the_value(tiny_model: Model) -> None:
    prediction = saying(tiny_model, '1,"label":"a"}', Point, response_prefix='{"x":')
    values = [value async for value in prediction.partial_values()]
    assert (await soon(prediction.result())).parsed == values[-1] == Point(1, "a")


async def test_options_carry_the_schema(tiny_model: Model) -> None:
    options = llamactor.GenerationOptions(logits_processor=Says("[1]"), schema=list[int])
    assert (await soon(tiny_model.complete("x", options=options).result())).parsed == [1]


@pytest.mark.parametrize("schema", [5, complex, {"a": b""}])
async def test_what_is_no_schema_is_refused_at_the_call(tiny_model: Model, schema: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        _ = tiny_model.complete("x", schema=schema)


async def test_a_value_that_the_type_refuses_is_a_failure(tiny_model: Model) -> None:
    prediction = saying(tiny_model, '{"n":13,"note":"a"}', Unlucky)
    for _ in range(2):
        with pytest.raises(SchemaValidationError, match="unlucky") as caught:
            await soon(prediction.result())
    partial = caught.value.partial
    assert partial is not None
    assert (partial.content, partial.parsed) == ('{"n":13,"note":"a"}', None)
    assert partial.stop_reason is None
    with pytest.raises(SchemaValidationError, match="unlucky"):
        _ = [value async for value in prediction.partial_values()]


async def test_a_failure_of_the_user_s_class_is_the_failure(tiny_model: Model) -> None:
    @dataclasses.dataclass
    class Strange:
        a: int

        def __post_init__(self) -> None:
            raise KeyError("strange")

    with pytest.raises(KeyError, match="strange") as caught:
        await soon(saying(tiny_model, '{"a":1}', Strange).result())
    assert caught.value.partial.content == '{"a":1}'  # type: ignore[attr-defined]


async def test_what_is_dropped_in_another_thread_is_read_on_the_loop(tiny_model: Model) -> None:
    threads: list[int] = []

    @dataclasses.dataclass
    class Curious:
        a: int

        def __post_init__(self) -> None:
            threads.append(threading.get_ident())

    handles = [saying(tiny_model, '{"a":1}', Curious)]
    await until(lambda: handles[0].done)
    await asyncio.to_thread(handles.clear)
    await until(lambda: bool(threads))
    assert threads == [threading.get_ident()]


async def test_a_failed_turn_is_not_recorded(tiny_model: Model) -> None:
    async with tiny_model.chat() as session:
        with pytest.raises(SchemaValidationError):
            await soon(
                session.prompt(
                    "x", logits_processor=Says('{"n":13,"note":""}'), schema=Unlucky
                ).result()
            )
        assert session.history == ()


async def test_an_answer_that_a_stop_has_cut_has_no_value(tiny_model: Model) -> None:
    prediction = saying(tiny_model, ROUTE, Route, stop='"colour"')
    values = [value async for value in prediction.partial_values()]
    result = await soon(prediction.result())
    assert (result.stop_reason, result.parsed) == ("stop_string", None)
    assert values[-1].points == [Point(1), Point(2)]


async def test_a_cancelled_prediction_has_no_value(tiny_model: Model, gate: Gate) -> None:
    prediction = tiny_model.complete("x", logits_processor=Says("[1,2,3]", gate), schema=list[int])
    values = prediction.partial_values()
    gate.allow()
    assert await soon(anext(values)) == []
    prediction.cancel()
    gate.open()
    rest = [value async for value in values]
    result = await soon(prediction.result())
    assert (result.stop_reason, result.parsed) == ("cancelled", None)
    assert all([1, 2, 3][: len(value)] == value for value in rest)


async def test_values_come_while_the_model_writes(tiny_model: Model, gate: Gate) -> None:
    """Each value is there before the token after the next is drawn."""
    processor = Says('["ab"]', gate)
    prediction = tiny_model.complete("x", logits_processor=processor, schema=list[str])
    values = prediction.partial_values()
    expected: list[list[str]] = [[], [""], ["a"], ["ab"]]
    for value in expected:
        gate.allow()
        assert await soon(anext(values)) == value
    gate.open()
    assert [value async for value in values] == []
    assert (await soon(prediction.result())).parsed == ["ab"]


async def test_every_reader_gets_the_values_from_the_start(tiny_model: Model) -> None:
    prediction = saying(tiny_model, '{"x":1,"label":"abc"}', Point)

    async def read() -> list[Any]:
        return [value async for value in prediction.partial_values()]

    together = await soon(asyncio.gather(read(), read()))
    later = await read()
    assert {type(values[-1]) for values in (*together, later)} == {Point}
    assert later == [Point(1, "abc")]  # all that there was, in one piece


async def test_a_cancelled_anext_of_the_values_loses_nothing(tiny_model: Model, gate: Gate) -> None:
    prediction = tiny_model.complete("x", logits_processor=Says("[1,2]", gate), schema=list[int])
    values = prediction.partial_values()
    gate.allow()
    assert await soon(anext(values)) == []
    waiting = asyncio.ensure_future(anext(values))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.open()
    rest = [value async for value in values]
    assert rest[-1] == [1, 2]


async def test_dropping_the_values_cancels(tiny_model: Model, gate: Gate) -> None:
    prediction = tiny_model.complete("x", logits_processor=Says("[1,2]", gate), schema=list[int])
    gate.allow()
    async for value in prediction.partial_values():
        assert value == []
        break
    gate.open()
    assert (await soon(prediction.result())).stop_reason == "cancelled"


async def test_a_long_answer_is_replayed_in_several_values(tiny_model: Model) -> None:
    text = json.dumps(["word"] * 150, separators=(",", ":"))
    prediction = saying(tiny_model, text, list[str], token_batching=TokenBatching(tokens=1000))
    await soon(prediction.result())
    values = [value async for value in prediction.partial_values()]
    assert values[-1] == ["word"] * 150
