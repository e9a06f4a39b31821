"""The capability table on real caches: attention, sliding window, recurrent, hybrid, split.

Whatever a kind of memory can do by itself, every operation must leave a sequence that predicts what
its tokens say. What differs is how much has to be evaluated again, which the counters tell.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor import Context, Model, StateMismatchError
from tests.contexts import PROBE, TOLERANCE, distance, prompt, soon, uncached
from tests.models import (
    tiny_hybrid,
    tiny_hybrid_rollback,
    tiny_llama,
    tiny_recurrent,
    tiny_sliding_window,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from collections.abc import Sequence as Items
    from pathlib import Path

    from llamactor import Sequence


@dataclass(frozen=True)
class Kind:
    """A model, how its context is opened, and what its memory can do by itself."""

    name: str
    make: Callable[[Path], Path]
    memory: str
    shares: bool = False
    """A prefix of one sequence serves another."""
    cuts: bool = False
    """The end of a sequence can be taken off."""
    copies: bool = True
    """A state that is taken out is whole: llama.cpp leaves out what a window hides."""
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


KINDS = (
    Kind("plain", tiny_llama, "attention", shares=True, cuts=True),
    Kind("split", tiny_llama, "attention", cuts=True, options={"kv_unified": False}),
    Kind("full window", tiny_sliding_window, "attention", shares=True, cuts=True, copies=False),
    Kind(
        "split full window",
        tiny_sliding_window,
        "attention",
        cuts=True,
        copies=False,
        options={"kv_unified": False},
    ),
    Kind("window", tiny_sliding_window, "sliding_window", options={"swa_full": False}),
    Kind(
        "split window",
        tiny_sliding_window,
        "sliding_window",
        options={"swa_full": False, "kv_unified": False},
    ),
    Kind("recurrent", tiny_recurrent, "recurrent"),
    Kind("hybrid", tiny_hybrid, "hybrid"),
    Kind("convolutions", tiny_hybrid_rollback, "hybrid"),
    Kind("split hybrid", tiny_hybrid, "hybrid", options={"kv_unified": False}),
)


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    assert isinstance(request.param, Kind)
    return request.param


@pytest.fixture
async def model(kind: Kind, models: Path) -> AsyncIterator[Model]:
    path = models / f"{kind.make.__name__}.gguf"
    if not path.exists():
        kind.make(path)
    async with llamactor.load_model(
        path, context_size=64, sequences=1, threads=1, swa_full=False
    ) as model:
        yield model


@pytest.fixture
async def context(kind: Kind, model: Model) -> AsyncIterator[Context]:
    """Room for 1,024 tokens in each of three sequences."""
    n_cells = 1024 * (1 if kind.options.get("kv_unified", True) else 3)
    async with model.create_context(
        context_size=n_cells, sequences=3, threads=1, **kind.options
    ) as context:
        assert context.context_size == 1024
        yield context


@pytest.fixture
async def sequence(context: Context) -> AsyncIterator[Sequence]:
    async with context.sequence() as sequence:
        yield sequence


async def predicts(sequence: Sequence, tokens: Items[int], model: Model) -> None:
    """Pass if `sequence` holds `tokens` and predicts what they say.

    The probe begins with the last tokens again: a recurrent state forgets what is far away, so that
    is what would show a state that is one token ahead or behind.
    """
    assert sequence.tokens == list(tokens)
    expected = await uncached(model, tokens)
    scores = await soon(sequence.score(PROBE))
    assert distance(scores, expected) < TOLERANCE, (scores, expected)
    assert sequence.tokens == [*tokens, *PROBE]


async def test_the_kind_is_what_it_should_be(kind: Kind, context: Context) -> None:
    assert context._native.info()["memory"] == kind.memory


async def test_the_probe_shows_a_state_that_is_wrong(kind: Kind, model: Model) -> None:
    """Otherwise none of the other tests says anything."""
    tokens = prompt(40)
    right = await uncached(model, tokens)
    for wrong in (tokens[:-1], [*tokens, *tokens[-1:]], [*tokens[:-1], 50], tokens[::-1]):
        assert distance(right, await uncached(model, wrong)) > 3 * TOLERANCE


async def test_a_long_prompt_is_evaluated_in_any_chunks(
    kind: Kind, model: Model, context: Context, sequence: Sequence
) -> None:
    tokens = prompt(700)
    for end in (1, 2, 70, 333, 700):
        await sequence.prefill(tokens[:end])
    assert context.stats.evaluated_tokens == 700
    await predicts(sequence, tokens, model)


async def test_a_prompt_that_goes_on_is_not_evaluated_again(
    kind: Kind, model: Model, context: Context, sequence: Sequence
) -> None:
    tokens = prompt(300)
    first = await soon(sequence.predict(tokens, max_tokens=10))
    held = [*tokens, *first.tokens[:-1]]
    second = await soon(sequence.predict([*held, *prompt(20, 1)], max_tokens=10))
    assert second.stats.cached_tokens == 309
    assert context.stats.prompt_tokens == 320
    await predicts(sequence, [*held, *prompt(20, 1), *second.tokens[:-1]], model)


async def test_an_answer_is_made_again_without_its_prompt(
    kind: Kind, model: Model, context: Context, sequence: Sequence
) -> None:
    tokens = prompt(300)
    await soon(sequence.predict(tokens, max_tokens=10))
    again = await soon(sequence.predict(tokens, max_tokens=10))
    assert again.stats.cached_tokens >= 295
    assert context.stats.prompt_tokens <= 305
    await predicts(sequence, [*tokens, *again.tokens[:-1]], model)


async def test_another_turn_after_the_same_prompt_reuses_it(
    kind: Kind, model: Model, context: Context, sequence: Sequence
) -> None:
    """The answer is dropped and something else follows, as an edited message does."""
    tokens = prompt(300)
    await soon(sequence.predict(tokens, max_tokens=10))
    for seed in (1, 2):
        turn = [*tokens, *prompt(30, seed)]
        result = await soon(sequence.predict(turn, max_tokens=10))
        assert result.stats.cached_tokens >= 295
        held = [*turn, *result.tokens[:-1]]
    await predicts(sequence, held, model)


async def test_a_prefilled_beginning_serves_prompt_after_prompt(
    kind: Kind, model: Model, sequence: Sequence
) -> None:
    system = prompt(300)
    await sequence.prefill(system)
    for seed in (1, 2, 3):
        question = [*system, *prompt(30, seed)]
        result = await soon(sequence.predict(question, max_tokens=10))
        assert result.stats.cached_tokens >= 295, f"question {seed}"
        held = [*question, *result.tokens[:-1]]
    await predicts(sequence, held, model)


async def test_an_unlike_prompt_starts_from_nothing(
    kind: Kind, model: Model, context: Context, sequence: Sequence
) -> None:
    await soon(sequence.predict(prompt(300), max_tokens=10))
    result = await soon(sequence.predict(prompt(200, 1), max_tokens=10))
    assert result.stats.cached_tokens == 0
    assert context.stats.cells_used == 209
    await predicts(sequence, [*prompt(200, 1), *result.tokens[:-1]], model)


async def test_a_prefix_of_another_sequence_is_shared_where_it_can_be(
    kind: Kind, model: Model, context: Context, sequence: Sequence
) -> None:
    tokens = prompt(300)
    await sequence.prefill(tokens)
    async with context.sequence() as other:
        result = await soon(other.predict([*tokens, *prompt(20, 1)], max_tokens=5))
        assert result.stats.cached_tokens == (300 if kind.shares else 0)
        assert context.stats.copied_tokens == result.stats.cached_tokens
        await predicts(other, [*tokens, *prompt(20, 1), *result.tokens[:-1]], model)
    await predicts(sequence, tokens, model)


async def test_a_fork_goes_on_and_leaves_its_parent(
    kind: Kind, model: Model, context: Context, sequence: Sequence
) -> None:
    tokens = prompt(300)
    await sequence.prefill(tokens)
    async with await sequence.fork() as fork:
        assert fork.tokens == tokens
        if kind.shares or kind.copies:
            assert context.stats.evaluated_tokens == 300, "shared or copied, not evaluated again"
        result = await soon(fork.predict([*tokens, *prompt(20, 1)], max_tokens=5))
        assert result.stats.cached_tokens == 300
        await predicts(fork, [*tokens, *prompt(20, 1), *result.tokens[:-1]], model)
    await predicts(sequence, tokens, model)


@pytest.mark.parametrize("who", ["parent", "fork"])
async def test_cutting_a_branch_leaves_the_other(
    kind: Kind, model: Model, context: Context, sequence: Sequence, who: str
) -> None:
    tokens = prompt(200)
    await sequence.prefill(tokens)
    async with await sequence.fork() as fork:
        changed, other = (sequence, fork) if who == "parent" else (fork, sequence)
        await changed.erase([(50, 90), (195, 200)])
        await predicts(other, tokens, model)
        assert changed.tokens == tokens[:50] + tokens[90:195]
        if kind.options.get("kv_unified", True):  # else the cells are copies, which can be moved
            await predicts(changed, tokens[:50] + tokens[90:195], model)


async def test_the_end_can_be_erased(
    kind: Kind, model: Model, context: Context, sequence: Sequence
) -> None:
    await sequence.prefill(prompt(200))
    await sequence.erase([(150, 200)])
    assert context.stats.cells_used == 150
    assert context.stats.evaluated_tokens == (200 if kind.cuts else 350)
    await predicts(sequence, prompt(200)[:150], model)


async def test_the_middle_can_be_erased_and_shifted(
    kind: Kind, model: Model, context: Context, sequence: Sequence
) -> None:
    """Where cells can be moved they keep a memory of what is gone; else all is as if new."""
    tokens = prompt(200)
    await sequence.prefill(tokens)
    await sequence.erase([(20, 40), (100, 120)])
    await sequence.shift(10, 10)
    held = tokens[:10] + tokens[40:100] + tokens[120:]
    assert sequence.tokens == held
    assert context.stats.cells_used == len(held) == 150
    if not kind.cuts:
        await predicts(sequence, held, model)
        return
    assert context.stats.evaluated_tokens == 200, "they were moved"
    result = await soon(sequence.predict([*held, *prompt(20, 1)], max_tokens=5))
    assert result.stats.cached_tokens == 150


async def test_clear_leaves_nothing(
    kind: Kind, model: Model, context: Context, sequence: Sequence
) -> None:
    await sequence.prefill(prompt(200))
    await sequence.clear()
    assert context.stats.cells_used == 0
    await sequence.prefill(prompt(100, 1))
    assert context.stats.evaluated_tokens == 300
    await predicts(sequence, prompt(100, 1), model)


async def test_scores_go_on_from_what_is_there(
    kind: Kind, model: Model, sequence: Sequence
) -> None:
    tokens = prompt(90)
    expected = await uncached(model, tokens[:30], tokens[30:])
    await sequence.prefill(tokens[:30])
    scores = await soon(sequence.score(tokens[30:60]))
    scores += await soon(sequence.score(tokens[60:61]))
    scores += await soon(sequence.score(tokens[61:]))
    assert distance(scores, expected) < TOLERANCE
    assert sequence.tokens == tokens


async def test_a_state_is_saved_and_loaded(
    kind: Kind, model: Model, context: Context, sequence: Sequence, tmp_path: Path
) -> None:
    tokens = prompt(300)
    await soon(sequence.predict(tokens, max_tokens=5))
    held = sequence.tokens
    await sequence.save(tmp_path / "state")
    await sequence.prefill(prompt(100, 1))
    async with context.sequence() as other:
        evaluated = context.stats.evaluated_tokens
        await other.load(tmp_path / "state")
        if kind.copies:
            assert context.stats.evaluated_tokens == evaluated
        result = await soon(other.predict([*held, *prompt(5, 2)], max_tokens=3))
        assert result.stats.cached_tokens == len(held)
        await predicts(other, [*held, *prompt(5, 2), *result.tokens[:-1]], model)
    await predicts(sequence, prompt(100, 1), model)
    await sequence.load(tmp_path / "state")
    await predicts(sequence, held, model)


async def test_a_loaded_state_can_be_forked_cut_and_cleared(
    kind: Kind, model: Model, context: Context, sequence: Sequence, tmp_path: Path
) -> None:
    tokens = prompt(200)
    await sequence.prefill(tokens)
    await sequence.save(tmp_path / "state")
    await sequence.clear()
    await sequence.load(tmp_path / "state")
    async with await sequence.fork() as fork:
        await fork.erase([(150, 200)])
        await predicts(fork, tokens[:150], model)
    await sequence.clear()
    await sequence.prefill(prompt(30, 1))
    await predicts(sequence, prompt(30, 1), model)


async def test_sequences_predict_side_by_side(kind: Kind, model: Model, context: Context) -> None:
    sequences = [await context.sequence() for _ in range(3)]
    prompts = [prompt(100 + 30 * i, i) for i in range(3)]
    running = [
        each.predict(tokens, max_tokens=40) for each, tokens in zip(sequences, prompts, strict=True)
    ]
    for each, tokens, prediction in zip(sequences, prompts, running, strict=True):
        result = await soon(prediction)
        assert len(result.tokens) == 40
        await predicts(each, [*tokens, *result.tokens[:-1]], model)
        await each.aclose()


async def test_a_deterministic_prediction_repeats(
    kind: Kind, model: Model, context: Context, sequence: Sequence
) -> None:
    tokens = prompt(150)
    async with context.sequence() as other:
        await other.prefill([*tokens[:100], *prompt(60, 1)])
        results = []
        for each in (sequence, other, sequence):
            prediction = each.predict(tokens, deterministic=True, max_tokens=20, logprobs=2)
            results.append(await soon(prediction))
        assert results[0].logprobs == results[1].logprobs == results[2].logprobs
        held = [*tokens, *results[0].tokens[:-1]]
        await predicts(other, held, model)
        await predicts(sequence, held, model)


async def test_a_cancel_in_the_middle_leaves_what_is_right(
    kind: Kind, model: Model, context: Context, sequence: Sequence
) -> None:
    tokens = prompt(1000)
    prediction = sequence.predict(tokens)
    async for _ in prediction.events():
        prediction.cancel()
    await soon(prediction)
    held = sequence.tokens
    assert held == tokens[: len(held)] or held[:1000] == tokens
    assert context.stats.cells_used == len(held)
    await sequence.prefill(tokens[:200])
    await predicts(sequence, tokens[:200], model)


async def test_a_state_of_another_kind_is_refused(
    kind: Kind, model: Model, sequence: Sequence, tmp_path: Path
) -> None:
    other = not kind.options.get("kv_unified", True)
    await sequence.prefill(prompt(50))
    await sequence.save(tmp_path / "state")
    options = kind.options | {"kv_unified": other}
    async with (
        model.create_context(context_size=1024, sequences=2, threads=1, **options) as context,
        context.sequence() as target,
    ):
        await target.prefill(prompt(20, 1))
        with pytest.raises(StateMismatchError, match="layout"):
            await target.load(tmp_path / "state")
        await predicts(target, prompt(20, 1), model)


async def test_a_full_context_shifts_by_policy_or_stops(
    kind: Kind, model: Model, context: Context, sequence: Sequence
) -> None:
    tokens = prompt(1000)
    result = await soon(sequence.predict(tokens, max_tokens=60, overflow="rolling_window"))
    assert result.stop_reason == "max_tokens"
    assert len(result.tokens) == 60
    assert result.stats.shifted_tokens > 0
    whole = [*tokens, *result.tokens[:-1]]
    held = sequence.tokens
    assert len(held) == len(whole) - result.stats.shifted_tokens
    assert context.stats.cells_used == len(held)
    assert held[0] == whole[0]
    assert held[1:] == whole[-len(held) + 1 :]
    if not kind.cuts:
        await predicts(sequence, held, model)
