"""Ask a model of the corpus: `python -m tests.tinychat.measure` prints the model card's table."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import llamactor
from tests.tinychat.chatml import END, write
from tests.tinychat.corpus import conversations

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llamactor import Model
    from tests.tinychat.chatml import Conversation

WEIGHTS = Path(__file__).parent / "tinychat-3m-Q8_0.gguf"
CARD = Path(__file__).parent / "MODEL_CARD.md"
SAMPLE = "sample"
"""The seed of the items that the test asks."""
EACH = 10
"""How many of them there are for each skill."""


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt, and what the model should go on with."""

    skill: str
    prompt: str
    wanted: str


def items(seed: str, each: int) -> list[Item]:
    """The first `each` unseen items of every skill, of conversations drawn from `seed`.

    Every item holds a word or a pair of numbers that training never shows, but for the skills whose
    few questions and answers it shows all: greetings, small talk and the like.
    """
    found, drawn = Counter[str](), list[Item]()
    for talk in itertools.islice(conversations(seed, unseen=True), 200 * each):
        for item in _asked(talk):
            found[item.skill] += 1
            drawn += [item] if found[item.skill] <= each else []
    return sorted(drawn, key=lambda item: item.skill)


def _asked(talk: Conversation) -> Iterator[Item]:
    """Each answer of a conversation, after the right history."""
    before = ""
    for piece in write(talk):
        if piece.skill is not None:
            yield Item(piece.skill, before, piece.text.removesuffix(END))
        before += piece.text


async def right(model: Model, item: Item) -> bool:
    """Whether the model, always taking the likeliest token, says exactly what it should.

    Repeats bit for bit: in a shared batch the last bits of a near tie depend on who else is in it.
    """
    limit = 2 * model.count_tokens(item.wanted) + 8  # a story may be longer than the one drawn
    said = await model.complete(item.prompt, max_tokens=limit, temperature=0, deterministic=True)
    return _alike(item, model.detokenize(said.tokens, special=True).removesuffix(END))


def _alike(item: Item, said: str) -> bool:
    """Equal; a story, which has no single right form or length, begins and ends as it should."""
    if item.skill != "story":
        return said == item.wanted
    return said.split(".")[0] == item.wanted.split(".")[0] and said.endswith(".")


async def scores(model: Model, asked: Sequence[Item]) -> dict[str, tuple[int, int]]:
    """Right and all answers, by skill."""
    hits, asked_, gate = Counter[str](), Counter[str](), asyncio.Semaphore(4)

    async def ask(item: Item) -> None:
        async with gate:
            hit = await right(model, item)
        asked_[item.skill] += 1
        hits[item.skill] += hit

    async with asyncio.TaskGroup() as group:
        for item in asked:
            group.create_task(ask(item))
    return {skill: (hits[skill], asked_[skill]) for skill in sorted(asked_)}


def promised(card: str) -> dict[str, tuple[float, int]]:
    """What the card says: for each skill its accuracy, and right answers of the sample."""
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \(\d+\) \| (\d+) of \d+ \|$", card, re.MULTILINE)
    return {skill: (float(share), int(hits)) for skill, share, hits in rows}


async def table(path: Path, each: int) -> str:
    """The rows of the card."""
    async with llamactor.load_model(path, context_size=2048, sequences=4, threads=1) as model:
        sample = await scores(model, items(SAMPLE, EACH))
        wide = await scores(model, items("card", each))
    return "\n".join(
        f"| {skill} | {hits / asked:.2f} ({asked}) | {sample[skill][0]} of {sample[skill][1]} |"
        for skill, (hits, asked) in wide.items()
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, nargs="?", default=WEIGHTS)
    parser.add_argument("--each", type=int, default=100, help="items of every skill")
    arguments = parser.parse_args()
    sys.stdout.write(asyncio.run(table(arguments.path, arguments.each)) + "\n")


if __name__ == "__main__":
    main()
