"""What the tests of contexts and sequences share: prompts, patience, and what a cache must predict.

Greedy text is no measure for a cache: logits differ in the last bits with the width of a batch, and
one near tie later two texts have nothing in common. So a test compares the log-probabilities that a
sequence gives with those of a context that evaluated the same tokens and nothing else.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, TypeVar

from tests.conftest import PATIENCE
from tests.models import FIRST_BYTE, VOCAB_SIZE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from collections.abc import Sequence as Items

    from llamactor import Model, PredictionResult, Sequence

T = TypeVar("T")

TOLERANCE = 0.1
"""Log-probabilities of one text may differ by this much, evaluated in batches of other widths.

The kernels sum in another order and keys are stored in 16 bits; a token too many, too few or at the
wrong place moves them by far more than 1.
"""


def prompt(n_tokens: int, seed: int = 0) -> list[int]:
    """Return `n_tokens` tokens of the generated vocabulary, drawn at random."""
    draw = random.Random(seed)
    return [draw.randrange(FIRST_BYTE, VOCAB_SIZE) for _ in range(n_tokens)]


PROBE = prompt(12, seed=10_000)
"""What is scored to see what a sequence remembers."""


async def soon(awaitable: Awaitable[T]) -> T:
    """Wait, but not for ever."""
    async with asyncio.timeout(PATIENCE):
        return await awaitable


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition` holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 -- nothing announces it
            await asyncio.sleep(0.001)


async def waiting(work: Coroutine[object, object, T]) -> asyncio.Task[T]:
    """Start `work` and let it come to where it waits."""
    task = asyncio.create_task(work)
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def uncached(model: Model, tokens: Items[int], probe: Items[int] = PROBE) -> list[float]:
    """Score `probe` after `tokens` in a context that knows nothing else."""
    async with (
        model.create_context(context_size=4096, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        scores = await soon(sequence.score([*tokens, *probe]))
    return scores[len(tokens) :]


def distance(scores: Items[float], others: Items[float]) -> float:
    """Return the greatest difference between two lists of log-probabilities.

    A token of 1e-10 or less has many more bits to lose: differences count relative to -10 there.
    """
    pairs = zip(scores, others, strict=True)
    return max(abs(one - other) / max(1.0, -other / 10) for one, other in pairs)


async def remembers(sequence: Sequence, tokens: Items[int], model: Model) -> None:
    """Pass if `sequence` holds `tokens` and predicts as if they had just been evaluated."""
    assert sequence.tokens == list(tokens)
    scores = await soon(sequence.score(PROBE))
    assert sequence.tokens == [*tokens, *PROBE]
    expected = await uncached(model, tokens)
    assert distance(scores, expected) < TOLERANCE, (scores, expected)


async def plausible(
    model: Model, tokens: Items[int], result: PredictionResult, tolerance: float = TOLERANCE
) -> None:
    """Pass if every token of a greedy `result` is the likeliest after all before it, or as good."""
    async with (
        model.create_context(context_size=4096, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        scores = (await soon(sequence.score([*tokens, *result.tokens])))[len(tokens) :]
        best = []
        for n in range(len(result.tokens)):
            ahead = [*tokens, *result.tokens[:n]]
            first = await soon(sequence.predict(ahead, max_tokens=1, logprobs=1))
            assert first.logprobs is not None
            best.append(first.logprobs[0].logprob)
    assert distance(scores, best) < tolerance, (scores, best)
