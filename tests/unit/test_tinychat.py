"""The chat model of the tests is the one of its card, and says what the card says."""

from __future__ import annotations

import hashlib
import re
from itertools import groupby
from typing import TYPE_CHECKING

import pytest

from tests.conftest import TINYCHAT

if TYPE_CHECKING:
    from llamactor import Model

CARD = (TINYCHAT.parent / "MODEL_CARD.md").read_text(encoding="utf-8")


def conversations() -> list[list[tuple[str, str]]]:
    """What was said and answered, by the card."""
    table = CARD.partition("| said | answered |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in table.splitlines()]
    groups = groupby(rows, key=lambda row: bool(row[0]))
    return [[(row[0], row[1]) for row in group] for said, group in groups if said]


def test_the_weights_are_small_and_the_ones_of_the_card() -> None:
    data = TINYCHAT.read_bytes()
    assert len(data) <= 4_000_000
    assert f"{len(data):,} bytes" in CARD
    assert hashlib.sha256(data).hexdigest() in CARD


def test_the_card_has_conversations() -> None:
    assert len(conversations()) >= 5


@pytest.mark.parametrize("talk", conversations(), ids=lambda talk: re.sub(r"\W+", "-", talk[0][0]))
async def test_it_answers_as_the_card_says(tinychat: Model, talk: list[tuple[str, str]]) -> None:
    async with tinychat.chat(max_tokens=60) as session:
        for said, answered in talk:
            assert (await session.prompt(said)).content == answered
