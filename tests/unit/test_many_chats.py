"""Far more chats than sequences: each keeps its memory, and what it has evaluated comes back."""

from __future__ import annotations

import asyncio
import collections
import random
import re
from typing import TYPE_CHECKING

import pytest

import llamactor
from llamactor import ChatSession
from tests.conftest import TINYCHAT
from tests.usage import Usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from llamactor import Context, Model, PredictionResult

N_CHATS = 200
SEQUENCES = 4
HOST_BYTES = 16 << 20
DISK_BYTES = 24 << 20

GLUE = 16
"""Tokens that all prompts begin with, and a few by chance."""

WORD = re.compile(r"\w+")

ROUNDS = ("Hi, my name is {}.", "What is 2+3?", "What is my name?")

ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
VOWELS = ("a", "e", "i", "o", "u")
KNOWN = ("Ada", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Iris", "Jonas")


def names(n: int) -> list[str]:
    """As many different names; most are made up, so that nobody can have learnt them."""
    draw = random.Random(11)
    made = list(KNOWN)
    while len(made) < n:
        syllables = ["".join((draw.choice(ONSETS), draw.choice(VOWELS))) for _ in range(2)]
        name = "".join(syllables).capitalize() + draw.choice(("", "n", "l", "r"))
        if name not in made:
            made.append(name)
    return made


@pytest.fixture
async def narrow() -> AsyncIterator[tuple[Model, Context]]:
    """Tinychat in 4 sequences, with less room for parked states than 200 chats need."""
    async with (
        llamactor.load_model(TINYCHAT, context_size=64, sequences=1, threads=1) as model,
        model.create_context(
            context_size=2048,
            sequences=SEQUENCES,
            threads=1,
            parking_bytes=HOST_BYTES,
            parking_disk_bytes=DISK_BYTES,
        ) as context,
    ):
        yield model, context


async def alone(model: Model, name: str) -> str:
    """What a chat that has a context to itself answers in the end."""
    async with model.create_context(context_size=256, sequences=1, threads=1) as context:
        session = ChatSession(context, max_tokens=40)
        *_, last = [await session.prompt(text.format(name)) for text in ROUNDS]
        await session.aclose()
        return last.content


async def told(session: ChatSession, text: str, context: Context) -> PredictionResult:
    """The answer; the budgets are looked at while others work."""
    result = await session.prompt(text)
    stats = context.stats
    assert stats.parked_bytes <= HOST_BYTES
    assert stats.parked_disk_bytes <= DISK_BYTES
    return result


def hits(results: Iterable[PredictionResult]) -> collections.Counter[str]:
    """Where the histories were found; what the template says to everybody is no history."""
    return collections.Counter(
        str(result.stats.prefix_source) if result.stats.cached_tokens > GLUE else "evaluated"
        for result in results
    )


async def test_two_hundred_chats_over_four_sequences_each_keep_their_own_memory(
    narrow: tuple[Model, Context],
) -> None:
    model, context = narrow
    everybody = names(N_CHATS)
    chats = {name: ChatSession(context, max_tokens=40) for name in everybody}
    resident, answers, order = [], [], random.Random(5)
    for text in ROUNDS:
        order.shuffle(everybody)
        results = await asyncio.gather(
            *(told(chats[name], text.format(name), context) for name in everybody)
        )
        answers.append(dict(zip(everybody, results, strict=True)))
        resident.append(Usage.now().resident)
    said = {name: set(WORD.findall(result.content)) for name, result in answers[-1].items()}
    remembered = {name for name in everybody if name in said[name]}
    able = remembered | {
        name for name in everybody if name in WORD.findall(await alone(model, name))
    }
    assert len(remembered) >= 0.95 * len(able)
    assert len(able) >= 0.9 * N_CHATS
    assert not [name for name in able if said[name] & set(everybody) - {name}]
    assert resident[2] - resident[1] < HOST_BYTES
    assert set(hits(answers[-1].values())) >= {"host", "disk", "evaluated"}
    for chat in chats.values():
        await chat.aclose()
    stats = context.stats
    assert (stats.parked_states, stats.parked_bytes, stats.parked_disk_bytes) == (0, 0, 0)


async def test_idle_chats_keep_their_cells_while_there_is_room(
    narrow: tuple[Model, Context],
) -> None:
    _, context = narrow
    chats = [ChatSession(context, max_tokens=10) for _ in range(SEQUENCES)]
    for number, chat in enumerate(chats):
        await chat.prompt(f"Hi, my name is {KNOWN[number]}.")
    for chat in reversed(chats):
        result = await chat.prompt("What is my name?")
        assert result.stats.prefix_source == "cells"
    assert context.stats.parked_states == 0
    for chat in chats:
        await chat.aclose()


async def test_the_chat_that_spoke_longest_ago_is_parked_first(
    narrow: tuple[Model, Context],
) -> None:
    _, context = narrow
    chats = [ChatSession(context, max_tokens=10) for _ in range(SEQUENCES + 1)]
    for number, chat in enumerate(chats):
        await chat.prompt(f"Hi, my name is {KNOWN[number]}.")
    assert context.stats.parked_states == 1
    second = await chats[1].prompt("What is my name?")
    first = await chats[0].prompt("What is my name?")
    assert (second.stats.prefix_source, first.stats.prefix_source) == ("cells", "host")
    assert "Ada" in first.content
    assert "Ben" in second.content
    for chat in chats:
        await chat.aclose()


async def test_without_room_for_parked_states_a_chat_is_evaluated_again(
    tinychat: Model,
) -> None:
    async with tinychat.create_context(
        context_size=512, sequences=1, parking_bytes=0, threads=1
    ) as context:
        one, other = (ChatSession(context, max_tokens=20) for _ in range(2))
        await one.prompt("Hi, my name is Ada.")
        await other.prompt("Hi, my name is Ben.")
        result = await one.prompt("What is my name?")
        assert "Ada" in result.content
        assert context.stats.parked_states == 0
        assert result.stats.cached_tokens < result.stats.prompt_tokens // 2
        await one.aclose()
        await other.aclose()


async def test_plain_predictions_find_sequences_between_idle_chats(
    narrow: tuple[Model, Context],
) -> None:
    """An idle chat holds nothing that others would have to wait for."""
    _, context = narrow
    chats = [ChatSession(context, max_tokens=10) for _ in range(SEQUENCES)]
    for number, chat in enumerate(chats):
        await chat.prompt(f"Hi, my name is {KNOWN[number]}.")
    held = [await context.sequence(timeout=0) for _ in range(SEQUENCES)]
    for sequence in held:
        assert sequence.tokens == []
        await sequence.prefill("Once upon a time there was a sequence")
        await sequence.aclose()
    for number, chat in enumerate(chats):
        result = await chat.prompt("What is my name?")
        assert KNOWN[number] in result.content
        assert result.stats.prefix_source == "host"
        await chat.aclose()
