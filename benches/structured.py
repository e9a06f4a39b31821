"""What a schema costs: tokens per second beside free text, and compiling one of 40 properties.

    python -m benches.structured [--rounds 7] [--tokens 128] [--model smollm2]

Two constrained texts stand between two free ones of the same length on one sequence, so every ratio
compares the same moment of the machine. Compiling is the processor time of a call that is
refused before anything is evaluated, because its limit is below the shortest answer: with a schema
that is new, and once more with the same one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
from time import process_time
from typing import TYPE_CHECKING, Any, NamedTuple

import llamactor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PROMPT = "A list of people with their names, ages and towns, as JSON:\n"
PROPERTIES = 40
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "town": {"type": "string"},
        "married": {"type": "boolean"},
    },
    "required": ["name", "age", "town", "married"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 16}
"""More than is measured of any answer."""

KINDS: tuple[dict[str, Any], ...] = (
    {"type": "string", "maxLength": 40},
    {"type": "integer", "minimum": -5, "maximum": 1000},
    {"type": "number"},
    {"type": "boolean"},
    {"enum": ["red", "green", "blue", None]},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 8},
    {"type": "string", "format": "date-time"},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}]},
)


class Round(NamedTuple):
    """One measurement of everything."""

    speed: float
    """Tokens per second with a schema, as a share of those without."""
    compiling: float
    """Milliseconds."""
    again: float
    """Milliseconds."""


def properties(number: int) -> dict[str, Any]:
    """Return a schema of its own of 40 properties."""
    named = {f"field_{number}_{i}": KINDS[i % len(KINDS)] for i in range(PROPERTIES)}
    return {"type": "object", "properties": named, "required": list(named)[::2]}


async def speed(sequence: llamactor.Sequence, tokens: int, **options: Any) -> float:
    """Return tokens per second of an answer of so many tokens."""
    if "schema" not in options:
        options["ignore_eos"] = True
    prediction = sequence.predict(PROMPT, **options)
    count = 0
    async with prediction:
        async for _ in prediction:
            count = prediction.stats.predicted_tokens
            if count >= tokens:
                return prediction.stats.tokens_per_second
    raise SystemExit(f"an answer had {count} tokens instead of {tokens}")


async def refused(sequence: llamactor.Sequence, schema: dict[str, Any]) -> float:
    """Return the milliseconds until an answer is refused that has no room."""
    start = process_time()
    with contextlib.suppress(llamactor.GrammarError):
        await sequence.predict(PROMPT, schema=schema, max_tokens=1)
    return (process_time() - start) * 1e3


async def measured(sequence: llamactor.Sequence, number: int, tokens: int) -> Round:
    """Measure one round."""
    free = await speed(sequence, tokens)
    kept = await speed(sequence, tokens, schema=PEOPLE)
    kept += await speed(sequence, tokens, schema=PEOPLE)
    free += await speed(sequence, tokens)
    schema = properties(number)
    new, known = await refused(sequence, schema), await refused(sequence, schema)
    return Round(kept / free, new, known)


def line(name: str, values: Iterable[float], unit: str, bound: str) -> str:
    """Return a line of the table: the median, its range, the bound."""
    ordered = sorted(values)
    middle = statistics.median(ordered)
    return f"{name:34} {middle:8.2f} {unit:2}  {ordered[0]:.2f}-{ordered[-1]:.2f}   bound {bound}"


def show(rounds: Sequence[Round]) -> None:
    """Print the table."""
    print(line("speed with a schema", (one.speed for one in rounds), "×", "≥ 0.95"))
    print(line("compiling 40 properties", (one.compiling for one in rounds), "ms", "≤ 50"))
    print(line("using them again", (one.again for one in rounds), "ms", "≤ 1"))


async def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    async with (
        llamactor.load_model(args.model, context_size=64, sequences=1, threads=1) as model,
        model.create_context(context_size=2048, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        await measured(sequence, args.rounds, args.tokens)  # vocabulary, caches, pages
        show([await measured(sequence, number, args.tokens) for number in range(args.rounds)])


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
