"""Answers to random schemas parse and validate, however few tokens they may have."""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING, TypeAlias

import jsonschema

from llamactor import GrammarError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from llamactor import Model, PredictionResult

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
Maker: TypeAlias = "Callable[[random.Random, int], dict[str, Json]]"

SCHEMAS = 300
"""Random schemas, each with a random limit."""

REFUSALS = ("no finite document", "shortest")
"""Why a schema may get no answer: nothing fulfils it, or all that does is too long."""

FORMATS = (
    "date",
    "time",
    "date-time",
    "duration",
    "uuid",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uri",
)
PATTERNS = ("^[a-f]{2,5}$", r"\d+", "^(ab|c)*$", "é.", r"^[^a-z]\w", "x$", "^$|^a")
NAMES = ("a", "name", "", 'b"', "é", "c/d")


def number(chance: random.Random, depth: int) -> dict[str, Json]:
    least = chance.randint(-50, 50)
    return chance.choice(
        [
            {"type": "integer", "minimum": least, "maximum": least + chance.randint(0, 200)},
            {"type": "number", "exclusiveMinimum": least / 4, "maximum": 1000.5},
            {"type": ["integer", "null"], "multipleOf": chance.choice([1, 7, 100])},
            {"type": "number", "multipleOf": 0.5, "exclusiveMaximum": least},
        ]
    )


def text(chance: random.Random, depth: int) -> dict[str, Json]:
    shortest = chance.randint(0, 4)
    return chance.choice(
        [
            {"type": "string", "minLength": shortest, "maxLength": shortest + chance.randint(0, 9)},
            {"type": "string", "pattern": chance.choice(PATTERNS), "maxLength": 12},
            {"type": "string", "format": chance.choice(FORMATS)},
            {"type": "string"},
        ]
    )


def value(chance: random.Random, depth: int) -> dict[str, Json]:
    return chance.choice(
        [
            {"enum": [1, 'é"', None, True, [1, {"a": "b"}]]},
            {"const": chance.choice(["x", "\x01\n", -0.5, {"k": []}])},
            {"type": ["boolean", "null"]},
            {},
        ]
    )


def array(chance: random.Random, depth: int) -> dict[str, Json]:
    made: dict[str, Json] = {"type": "array", "minItems": chance.randint(0, 3)}
    if chance.random() < 0.5:
        made["prefixItems"] = [schema(chance, depth) for _ in range(chance.randint(1, 3))]
    if chance.random() < 0.7:
        made["items"] = schema(chance, depth)
    if chance.random() < 0.5:
        made["maxItems"] = chance.randint(3, 6)
    return made


def object_(chance: random.Random, depth: int) -> dict[str, Json]:
    names = chance.sample(NAMES, chance.randint(0, 5))
    made: dict[str, Json] = {
        "type": "object",
        "properties": {name: schema(chance, depth) for name in names},
        "required": [name for name in names if chance.random() < 0.4],
    }
    if chance.random() < 0.6:
        made["additionalProperties"] = chance.choice([False, schema(chance, depth)])
    if chance.random() < 0.3:
        made |= {"minProperties": chance.randint(0, 3), "maxProperties": chance.randint(4, 7)}
    return made


def joined(chance: random.Random, depth: int) -> dict[str, Json]:
    tagged: list[Json] = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "x": schema(chance, depth)},
            "required": ["kind"],
        }
        for kind in ("a", "b")
    ]
    return chance.choice(
        [
            {"anyOf": [schema(chance, depth) for _ in range(chance.randint(1, 3))]},
            {"allOf": [object_(chance, depth), object_(chance, depth)]},
            {"oneOf": [*tagged, {"type": "integer"}]},
            {"$ref": f"#/$defs/{chance.choice(['tree', 'list'])}"},
        ]
    )


def schema(chance: random.Random, depth: int) -> dict[str, Json]:
    """A random schema over all keywords."""
    makers: list[Maker] = [number, text, value]
    if depth > 0:
        makers += [array, array, object_, object_, object_, joined, joined]
    return chance.choice(makers)(chance, depth - 1)


def document(chance: random.Random) -> dict[str, Json]:
    """A random schema with what it may refer to."""
    tree: dict[str, Json] = {"items": {"$ref": "#/$defs/tree"}, "type": ["array", "boolean"]}
    chain: dict[str, Json] = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]}},
        "required": ["next"],
    }
    return schema(chance, 3) | {"$defs": {"tree": tree, "list": chain}}


async def answer(
    model: Model, wanted: dict[str, Json], limit: int, seed: int
) -> PredictionResult | GrammarError:
    """What the model says at temperature 1, or why it says nothing."""
    prediction = model.complete("@", schema=wanted, max_tokens=limit, temperature=1.0, seed=seed)
    try:
        return await prediction
    except GrammarError as refused:
        return refused


def check(wanted: dict[str, Json], result: PredictionResult) -> None:
    found = json.loads(result.content)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(wanted, format_checker=checker).validate(found)


async def test_every_answer_to_a_random_schema_validates(tiny_model: Model) -> None:
    chance = random.Random(4)
    cases = [(document(chance), chance.randint(1, 120), seed) for seed in range(SCHEMAS)]
    places = asyncio.Semaphore(4)

    async def one(wanted: dict[str, Json], limit: int, seed: int) -> bool:
        async with places:
            result = await answer(tiny_model, wanted, limit, seed)
        if isinstance(result, GrammarError):
            assert any(why in str(result) for why in REFUSALS), result
            return False
        assert result.stats.predicted_tokens <= limit
        check(wanted, result)
        return True

    answered = sum(await asyncio.gather(*(one(*case) for case in cases)))
    assert answered > SCHEMAS // 2
