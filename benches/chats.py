"""What a chat's memory is worth: time to first token with an empty cache, a full one, a parked one.

    python -m benches.chats [--rounds 5] [--history 1500] [--model smollm2]

Each round is a new chat with a long history. Its first turn evaluates everything. The second turn
evaluates what is new. Then other chats take the sequences and the cells, so that the chat's state
is parked, and the third turn begins with putting it back. Reported are the medians and the ratios
to the first turn of the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from typing import TYPE_CHECKING, NamedTuple

import llamactor
from llamactor import AssistantMessage, ChatSession, Context, UserMessage

if TYPE_CHECKING:
    from llamactor.chat.messages import Message


SEQUENCES = 2

WORDS = ("river", "stone", "letter", "green", "table", "winter", "song", "train", "paper", "light")


class Round(NamedTuple):
    """Seconds to the first token."""

    first: float
    second: float
    parked: float


def history(model: llamactor.Model, tokens: int, draw: random.Random) -> list[Message]:
    """Turns of about so many tokens in all."""
    messages: list[Message] = []
    size = 0
    while size < tokens:
        words = [" ".join(draw.choices(WORDS, k=40)) for _ in range(2)]
        messages += [UserMessage(words[0]), AssistantMessage(words[1])]
        size += sum(model.count_tokens(text) + 5 for text in words)
    return messages


async def first_token(chat: ChatSession, text: str, source: str | None) -> float:
    """Seconds to the first token of an answer whose prefix must come from `source`."""
    stats = (await chat.prompt(text, max_tokens=4)).stats
    found = stats.prefix_source if stats.cached_tokens * 2 > stats.prompt_tokens else None
    if found != source:
        raise SystemExit(f"the prefix came from {found}, not {source}")
    return stats.time_to_first_token


async def measured(model: llamactor.Model, context: Context, tokens: int, seed: int) -> Round:
    """One round."""
    draw = random.Random(seed)
    chat = ChatSession(context, history=history(model, tokens, draw))
    first = await first_token(chat, "Say it again.", None)
    second = await first_token(chat, "And once more.", "cells")
    for number in range(SEQUENCES):
        async with ChatSession(context, history=history(model, 200, draw)) as other:
            await other.prompt(f"Number {number}.", max_tokens=4)
    parked = await first_token(chat, "What was that?", "host")
    await chat.aclose()
    return Round(first, second, parked)


async def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    async with (
        llamactor.load_model(args.model, context_size=64, sequences=1, threads=1) as model,
        model.create_context(context_size=4096, sequences=SEQUENCES, threads=1) as context,
    ):
        rounds = [await measured(model, context, args.history, seed) for seed in range(args.rounds)]
    print(f"{args.history} tokens of history, medians of {args.rounds} rounds")
    for name in Round._fields:
        seconds = statistics.median(getattr(one, name) for one in rounds)
        ratio = statistics.median(getattr(one, name) / one.first for one in rounds)
        print(f"{name:8} {seconds * 1e3:9.1f} ms   {ratio:6.3f} of the first")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--history", type=int, default=1500)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
