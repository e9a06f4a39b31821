"""Data said in words, and asked for in JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.tinychat.chatml import Conversation, Turn, answer, user
from tests.tinychat.words import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.tinychat.words import Draw

    Data = Mapping[str, "str | int | bool"]

_KEYS: dict[str, Callable[[Draw], str | int]] = {
    "name": lambda draw: draw.name(),
    "age": lambda draw: draw.number(1, 99),
    "city": lambda draw: draw.filling("city"),
    "colour": lambda draw: draw.filling("colour"),
    "job": lambda draw: draw.filling("job"),
    "food": lambda draw: draw.filling("food"),
    "size": lambda draw: draw.number(1, 120),
    "price": lambda draw: draw.number(1, 999),
    "count": lambda draw: draw.number(0, 50),
    "id": lambda draw: draw.number(1, 9999),
    "title": lambda draw: " ".join(draw.words(1, 2)),
    "owner": lambda draw: draw.name(),
}
_SAID = {
    "age": ("is {} years old", "is {}", "is aged {}", "turned {}"),
    "city": ("lives in {}", "is from {}", "comes from {}", "moved to {}"),
    "job": ("works as a {}", "is a {}", "has the job {}"),
    "colour": ("likes the colour {}", "loves {}", "wears {}"),
    "food": ("eats {}", "likes to eat {}", "likes {}"),
}
_BY_SCHEMA = (
    "Answer with JSON that follows this schema: {}|Respond in JSON with this schema: {}|"
    "Answer in JSON. Schema: {}|Return JSON for this schema: {}|Fill this JSON schema: {}"
)
_BY_KEYS = (
    "Answer in JSON with the keys {}.|Reply with a JSON object with the keys {}.|"
    "Use JSON with keys {}.|Give me JSON with {}.|Extract {} as JSON.|"
    "Return a JSON object that has the keys {}.|Write JSON with the keys {}."
)
_FREE = (
    "Write this as JSON.|Answer in JSON.|Turn this into a JSON object.|Convert to JSON.|"
    "Give me that as JSON.|JSON, please.|Make a JSON object of this."
)
_ARRAY = (
    "Make a JSON array.|Write this list as a JSON array.|Turn this list into JSON.|"
    "As a JSON array, please.|Convert the list to a JSON array."
)


def json_chat(draw: Draw) -> Conversation:
    """A conversation in which one to three things are asked for in JSON."""
    makers = (_by_schema, _by_schema, _by_keys, _by_keys, _free, _array, _implicit, _implicit)
    order, said, value, skill = draw.one(makers)(draw)
    reply = answer(json.dumps(value, ensure_ascii=False), skill)
    if draw.chance(0.35):
        return [Turn("system", order), user(said), reply]
    conversation = [user(_together(draw, order, said)), reply]
    return conversation + (json_chat(draw) if draw.chance(0.35) else [])


def _together(draw: Draw, order: str, said: str) -> str:
    return draw.one((f"{order} {said}", f"{said}\n{order}", f"{said} {order}", f"{order}\n{said}"))


def _by_schema(draw: Draw) -> tuple[str, str, object, str]:
    data = _data(draw)
    order = draw.phrase(_BY_SCHEMA).format(_schema(draw, data))
    return order, _spoken(draw, data), data, "json_schema"


def _by_keys(draw: Draw) -> tuple[str, str, object, str]:
    data = _data(draw)
    order = draw.phrase(_BY_KEYS).format(listed([*data]))
    return order, _spoken(draw, data), data, "json_keys"


def _free(draw: Draw) -> tuple[str, str, object, str]:
    """Nobody says the keys: they come in the order in which the data is said."""
    data = _data(draw)
    said = ", ".join(f"{key} is {_plain(value)}" for key, value in data.items())
    return draw.phrase(_FREE), said, data, "json_free"


def _array(draw: Draw) -> tuple[str, str, object, str]:
    items = draw.words(2, 6)
    said = draw.one((", ".join(items), listed(items), " ".join(items)))
    return draw.phrase(_ARRAY), said, items, "json_array"


def _implicit(draw: Draw) -> tuple[str, str, object, str]:
    """A sentence about a person, whose values are not named by their keys."""
    name, keys = draw.name(), draw.shuffled([*_SAID])[: draw.number(1, 3)]
    data = {"name": name, **{key: _KEYS[key](draw) for key in keys}}
    deeds = [draw.one(_SAID[key]).format(data[key]) for key in keys]
    said = f"{name} {listed(deeds)}."
    if draw.chance(0.3):
        later = (f" {draw.one(('He', 'She'))} {deed}." for deed in deeds[1:])
        said = f"{name} {deeds[0]}." + "".join(later)
    wanted = {key: data[key] for key in draw.shuffled([*data])}
    by_schema = draw.chance(0.5)
    form = draw.phrase(_BY_SCHEMA if by_schema else _BY_KEYS)
    order = form.format(_schema(draw, wanted) if by_schema else listed([*wanted]))
    return order, said, wanted, "json_implicit"


def _data(draw: Draw) -> dict[str, str | int | bool]:
    data = dict[str, str | int | bool]()
    for _ in range(draw.number(1, 4)):
        key = draw.one([*_KEYS]) if draw.chance(0.55) else draw.identifier()
        data[key] = _KEYS[key](draw) if key in _KEYS else _any(draw)
    return data


def _any(draw: Draw) -> str | int | bool:
    makers: tuple[Callable[[], str | int | bool], ...] = (
        draw.word,
        lambda: " ".join(draw.words(1, 3)),
        lambda: draw.number(0, 999),
        lambda: draw.chance(0.5),
    )
    return draw.one(makers)()


def _spoken(draw: Draw, data: Data) -> str:
    forms = ("{} is {}", "the {} is {}", "{}: {}", "{} = {}")
    pairs = [draw.one(forms).format(key, _plain(data[key])) for key in draw.shuffled([*data])]
    return draw.phrase("{}|{}.|Here is the data: {}|{} please").format(listed(pairs))


def _plain(value: str | int) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _schema(draw: Draw, data: Data) -> str:
    kinds: dict[type, str] = {bool: "boolean", int: "integer", str: "string"}
    properties = {key: {"type": kinds[type(value)]} for key, value in data.items()}
    schema: dict[str, object] = {"type": "object", "properties": properties}
    schema |= {"required": [*data]} if draw.chance(0.6) else {}
    schema |= {"additionalProperties": False} if draw.chance(0.15) else {}
    return json.dumps(schema)
