"""The event loop always turns: whatever native threads do, other tasks get their turns meanwhile.

Counted, not timed: a task that does nothing but yield counts its turns. How late a turn may be is
for the benchmarks to say.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

import llamactor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable
    from pathlib import Path
    from typing import Any

    from tests.conftest import Gate

SEVERAL = 10
"""Turns that a loop which is not blocked takes during anything that takes a while."""


class Turns:
    """Counts how often its task had its turn."""

    def __init__(self) -> None:
        self.count = 0

    async def during(self, awaitable: Awaitable[Any]) -> int:
        """How many turns others had while this was awaited."""
        before = self.count
        await awaitable
        return self.count - before

    async def run(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.count += 1


@pytest.fixture
async def turns() -> AsyncIterator[Turns]:
    turns = Turns()
    task = asyncio.create_task(turns.run())
    yield turns
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def close_behind(gate: Gate, turns: Turns, model: llamactor.Model) -> None:
    """Close a model that cannot be closed before the loop has turned several times."""
    await gate.reached()
    closing = asyncio.create_task(model.aclose())
    enough = turns.count + SEVERAL
    while turns.count < enough:  # noqa: ASYNC110 -- the turns are the point
        await asyncio.sleep(0)
    # Only a loop that turns comes here, and only then may the callback end.
    assert not closing.done()
    gate.open()
    await closing


async def go_through_a_life(
    turns: Turns, gate: Gate, ref: str | Path, prompt: list[int], n_tokens: int
) -> None:
    """Load, prefill, decode eight streams and close, and look at the turns at every step."""
    loading = llamactor.load_model(ref, context_size=4096, threads=1)
    assert await turns.during(loading.result()) > SEVERAL
    async with loading as model:
        context = await model.create_context(context_size=4096, threads=1)
        async with context.sequence() as sequence:
            assert await turns.during(sequence.prefill(prompt)) > SEVERAL
        before = context.stats.batches
        sequences = [await context.sequence() for _ in range(8)]
        streams = [
            sequence.predict(prompt[number : number + 8], max_tokens=n_tokens, ignore_eos=True)
            for number, sequence in enumerate(sequences)
        ]
        turned = await turns.during(asyncio.gather(*streams))
        assert turned > SEVERAL
        assert context.stats.batches - before >= n_tokens
        first, *others = sequences
        endless = [
            sequence.predict(prompt[:8], ignore_eos=True, overflow="rolling_window")
            for sequence in others
        ]
        endless.append(first.predict(prompt[:8], logits_processor=gate))
        await close_behind(gate, turns, model)
        for prediction in endless:
            with pytest.raises(llamactor.ClosedError):
                await prediction


@pytest.mark.every_loop
async def test_the_loop_turns_while_a_tiny_model_works(
    turns: Turns, gate: Gate, tiny_model_path: Path
) -> None:
    await go_through_a_life(turns, gate, tiny_model_path, list(range(100, 900)) * 3, n_tokens=40)


@pytest.mark.model
@pytest.mark.slow
async def test_the_loop_turns_while_a_real_model_works(turns: Turns, gate: Gate) -> None:
    await go_through_a_life(turns, gate, "smollm2", list(range(1000, 1250)), n_tokens=4)


@pytest.mark.every_loop
async def test_closing_waits_for_a_callback_without_holding_up_the_loop(
    turns: Turns, tiny_model_path: Path, gate: Gate
) -> None:
    async with llamactor.load_model(tiny_model_path, context_size=512, threads=1) as model:
        prediction = model.complete("once", logits_processor=gate)
        await close_behind(gate, turns, model)
        with pytest.raises(llamactor.ClosedError):
            await prediction
