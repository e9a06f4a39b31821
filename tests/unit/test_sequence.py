"""Sequences: what they hold, what they reuse, how they are cut, forked, saved and scored."""

from __future__ import annotations

import asyncio
import math
import os
import stat
from typing import TYPE_CHECKING

import pytest

import llamactor
from llamactor import (
    BusyError,
    ContextOverflowError,
    Model,
    Sequence,
    StateMismatchError,
)
from tests.contexts import (
    PROBE,
    TOLERANCE,
    distance,
    prompt,
    remembers,
    soon,
    uncached,
    until,
    waiting,
)
from tests.models import BOS, VOCAB_SIZE, tiny_llama, tiny_lora

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from llamactor import Context
    from tests.conftest import Gate


@pytest.fixture
async def context(tiny_model: Model) -> AsyncIterator[Context]:
    """2,048 cells and four sequences."""
    async with tiny_model.create_context(context_size=2048, sequences=4, threads=1) as context:
        yield context


@pytest.fixture
async def sequence(context: Context) -> AsyncIterator[Sequence]:
    async with context.sequence() as sequence:
        yield sequence


@pytest.fixture(scope="session")
def shallow_path(models: Path) -> Path:
    """A Llama of one layer: its keys and values depend on nothing but their own token.

    Moved cells are then exactly what evaluating the tokens at their new places would give.
    """
    return tiny_llama(models / "shallow.gguf", layers=1)


@pytest.fixture
async def shallow(shallow_path: Path) -> AsyncIterator[Model]:
    async with llamactor.load_model(shallow_path, context_size=512, threads=1) as model:
        yield model


# --- what it holds --------------------------------------------------------------------------------


async def test_a_new_sequence_is_empty(sequence: Sequence) -> None:
    assert sequence.tokens == []
    assert sequence.usage == llamactor.SequenceUsage()
    assert not sequence.closed


async def test_after_a_prediction_it_holds_the_prompt_and_all_but_the_last_token(
    sequence: Sequence,
) -> None:
    tokens = prompt(20)
    result = await soon(sequence.predict(tokens, max_tokens=9))
    assert sequence.tokens == [*tokens, *result.tokens[:-1]]


async def test_a_prompt_of_text_is_tokenised_with_the_model_s_own_bos(
    tiny_model: Model, sequence: Sequence
) -> None:
    await sequence.prefill("once upon <|im_start|>")
    with_special = tiny_model.tokenize("once upon <|im_start|>", add_bos=True, special=True)
    assert sequence.tokens == with_special
    await sequence.prefill("once upon <|im_start|>", special=False)
    assert sequence.tokens == tiny_model.tokenize("once upon <|im_start|>", add_bos=True)
    assert len(sequence.tokens) > len(with_special)


async def test_prefill_says_how_many_tokens_it_evaluated(
    context: Context, sequence: Sequence
) -> None:
    tokens = prompt(50)
    assert await sequence.prefill(tokens) == 50
    assert await sequence.prefill(tokens) == 0
    assert await sequence.prefill(tokens[:30]) == 0
    assert sequence.tokens == tokens[:30]
    assert await sequence.prefill([*tokens[:30], *prompt(5, 1)]) == 5
    assert sequence.tokens == [*tokens[:30], *prompt(5, 1)]
    assert context.stats.evaluated_tokens == 55


async def test_a_second_prompt_evaluates_only_what_is_new(
    context: Context, sequence: Sequence
) -> None:
    tokens = prompt(100)
    first = await soon(sequence.predict(tokens, max_tokens=5))
    assert (first.stats.prompt_tokens, first.stats.cached_tokens) == (100, 0)
    evaluated = context.stats.evaluated_tokens
    longer = [*tokens, *first.tokens, *prompt(10, 1)]
    second = await soon(sequence.predict(longer, max_tokens=1))
    assert (second.stats.prompt_tokens, second.stats.cached_tokens) == (115, 104)
    assert context.stats.evaluated_tokens == evaluated + 11
    assert context.stats.cells_used == 115


async def test_the_same_prompt_again_evaluates_its_last_token(
    context: Context, sequence: Sequence
) -> None:
    tokens = prompt(100)
    await soon(sequence.predict(tokens, max_tokens=1))
    evaluated = context.stats.evaluated_tokens
    again = await soon(sequence.predict(tokens, max_tokens=1))
    assert again.stats.cached_tokens == 99
    assert context.stats.evaluated_tokens == evaluated + 1


async def test_an_unlike_prompt_replaces_what_was_there(
    tiny_model: Model, context: Context, sequence: Sequence
) -> None:
    await sequence.prefill(prompt(100))
    await sequence.prefill(prompt(40, 1))
    assert context.stats.cells_used == 40
    await remembers(sequence, prompt(40, 1), tiny_model)


async def test_usage_counts_what_this_holder_did(context: Context) -> None:
    tokens = prompt(30)
    async with context.sequence() as sequence:
        await soon(sequence.predict(tokens, max_tokens=4))
        await soon(sequence.predict([*sequence.tokens, *prompt(3, 1)], max_tokens=2))
        usage = sequence.usage
        assert (usage.prompt_tokens, usage.cached_tokens, usage.predicted_tokens) == (33, 33, 6)
        number = sequence.id
    others = [await context.sequence() for _ in range(4)]
    again = next(each for each in others if each.id == number)
    assert again.usage == llamactor.SequenceUsage()
    for each in others:
        await each.aclose()


# --- clear, erase, shift --------------------------------------------------------------------------


async def test_clear_forgets_everything(
    tiny_model: Model, context: Context, sequence: Sequence
) -> None:
    await sequence.prefill(prompt(100))
    await sequence.clear()
    assert sequence.tokens == []
    assert context.stats.cells_used == 0
    await sequence.prefill(prompt(30, 1))
    await remembers(sequence, prompt(30, 1), tiny_model)


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        [(5, 5)],
        [(0, 100)],
        [(90, 100)],
        [(0, 10)],
        [(20, 60)],
        [(70, 80), (5, 15), (40, 41)],
        [(10, 20), (20, 30), (30, 31)],
        [(99, 100), (0, 1), (50, 50)],
    ],
)
async def test_erase_removes_ranges_in_any_order_and_closes_the_gaps(
    shallow: Model, ranges: list[tuple[int, int]]
) -> None:
    tokens = prompt(100)
    kept = [t for i, t in enumerate(tokens) if not any(a <= i < b for a, b in ranges)]
    async with (
        shallow.create_context(context_size=512, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        await sequence.prefill(tokens)
        await sequence.erase(ranges)
        assert sequence.tokens == kept
        assert context.stats.cells_used == len(kept)
        assert context.stats.evaluated_tokens == 100, "the cells were moved"
        if kept:
            await remembers(sequence, kept, shallow)


async def test_an_iterable_of_ranges_is_enough(sequence: Sequence) -> None:
    await sequence.prefill(prompt(30))
    await sequence.erase((n, n + 1) for n in range(0, 30, 2))
    assert sequence.tokens == prompt(30)[1::2]


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        ([(5, 15), (10, 20)], "overlap"),
        ([(0, 31)], "the sequence has 30 tokens"),
        ([(-1, 3)], "-1"),
        ([(9, 3)], "3"),
        ([(1, 2, 3)], "pair"),
    ],
)
async def test_ranges_that_make_no_sense_change_nothing(
    sequence: Sequence, ranges: list[tuple[int, int]], says: str
) -> None:
    await sequence.prefill(prompt(30))
    with pytest.raises(ValueError, match=says):
        await sequence.erase(ranges)
    assert sequence.tokens == prompt(30)


async def test_erasing_the_end_is_exact(tiny_model: Model, sequence: Sequence) -> None:
    await sequence.prefill(prompt(100))
    await sequence.erase([(60, 100)])
    await remembers(sequence, prompt(100)[:60], tiny_model)


@pytest.mark.parametrize(("n_keep", "n_discard"), [(0, 0), (0, 30), (10, 50), (1, 99), (100, 0)])
async def test_shift_drops_tokens_after_the_first_and_moves_the_rest(
    shallow: Model, n_keep: int, n_discard: int
) -> None:
    tokens = prompt(100)
    kept = tokens[:n_keep] + tokens[n_keep + n_discard :]
    async with (
        shallow.create_context(context_size=512, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        await sequence.prefill(tokens)
        await sequence.shift(n_keep, n_discard)
        assert context.stats.cells_used == len(kept)
        await remembers(sequence, kept, shallow)


async def test_a_shift_beyond_the_end_changes_nothing(sequence: Sequence) -> None:
    await sequence.prefill(prompt(30))
    with pytest.raises(ValueError, match="at most the 30 tokens"):
        await sequence.shift(20, 11)
    assert sequence.tokens == prompt(30)


async def test_many_cuts_and_prompts_in_turn_stay_right(shallow: Model) -> None:
    async with (
        shallow.create_context(context_size=512, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        held: list[int] = []
        for round_ in range(20):
            held = [*held, *prompt(40, round_)]
            await sequence.prefill(held)
            await sequence.shift(7, 11)
            held = held[:7] + held[18:]
            await sequence.erase([(len(held) - 9, len(held) - 4), (3, 15)])
            del held[len(held) - 9 : len(held) - 4]
            del held[3:15]
            assert sequence.tokens == held
            assert context.stats.cells_used == len(held)
        await remembers(sequence, held, shallow)


async def test_moved_cells_serve_nobody_but_their_owner(
    tiny_model: Model, context: Context, sequence: Sequence
) -> None:
    """They were computed beside tokens that are gone: no prefix for anybody else."""
    tokens = prompt(200)
    kept = tokens[:20] + tokens[120:]
    await sequence.prefill(tokens)
    await sequence.erase([(20, 120)])
    async with context.sequence() as other:
        assert await other.prefill(kept) == 80
        await remembers(other, kept, tiny_model)


async def test_moved_cells_of_a_former_holder_serve_nobody(tiny_model: Model) -> None:
    tokens = prompt(200)
    kept = tokens[:20] + tokens[120:]
    async with tiny_model.create_context(context_size=512, sequences=1, threads=1) as context:
        async with context.sequence() as sequence:
            await sequence.prefill(tokens)
            await sequence.erase([(20, 120)])
        async with context.sequence() as sequence:
            assert await sequence.prefill(kept) == 80
            await remembers(sequence, kept, tiny_model)


async def test_moved_cells_stay_private_through_a_file(
    tiny_model: Model, context: Context, sequence: Sequence, tmp_path: Path
) -> None:
    tokens = prompt(200)
    kept = tokens[:20] + tokens[120:]
    await sequence.prefill(tokens)
    await sequence.erase([(20, 120)])
    await sequence.save(tmp_path / "state")
    await sequence.clear()
    await sequence.load(tmp_path / "state")
    async with context.sequence() as other:
        assert await other.prefill(kept) >= 80
        await remembers(other, kept, tiny_model)


# --- fork -----------------------------------------------------------------------------------------


async def test_a_fork_shares_the_cells_of_its_parent(
    tiny_model: Model, context: Context, sequence: Sequence
) -> None:
    tokens = prompt(300)
    await sequence.prefill(tokens)
    async with await sequence.fork() as fork:
        assert fork.id != sequence.id
        assert fork.tokens == tokens
        assert context.stats.cells_used == 300
        assert context.stats.evaluated_tokens == 300
        result = await soon(fork.predict([*tokens, *prompt(10, 1)], max_tokens=1))
        assert result.stats.cached_tokens == 300
        assert context.stats.cells_used == 310
        await sequence.prefill([*tokens, *prompt(20, 2)])
        assert context.stats.cells_used == 330
        await remembers(fork, [*tokens, *prompt(10, 1)], tiny_model)
        await remembers(sequence, [*tokens, *prompt(20, 2)], tiny_model)


@pytest.mark.parametrize("cut", ["erase", "shift", "clear", "another prompt"])
@pytest.mark.parametrize("who", ["parent", "fork"])
async def test_cutting_one_branch_leaves_the_other_as_it_was(
    tiny_model: Model, context: Context, sequence: Sequence, cut: str, who: str
) -> None:
    tokens = prompt(200)
    await sequence.prefill(tokens)
    async with await sequence.fork() as fork:
        changed, other = (sequence, fork) if who == "parent" else (fork, sequence)
        left = tokens[:50] + tokens[90:]
        match cut:
            case "erase":
                await changed.erase([(50, 90)])
            case "shift":
                await changed.shift(50, 40)
            case "clear":
                await changed.clear()
                left = []
            case _:
                left = [*tokens[:100], *prompt(30, 5)]
                await changed.prefill(left)
        assert changed.tokens == left
        await remembers(other, tokens, tiny_model)
        if left:
            await remembers(changed, left, tiny_model)


async def test_forks_of_forks(tiny_model: Model, context: Context, sequence: Sequence) -> None:
    await sequence.prefill(prompt(60))
    first = await sequence.fork()
    await first.prefill([*prompt(60), *prompt(10, 1)])
    second = await first.fork()
    await second.prefill([*prompt(60), *prompt(10, 1), *prompt(10, 2)])
    assert context.stats.cells_used == 80
    await sequence.clear()
    assert context.stats.cells_used == 80
    await first.aclose()
    await remembers(second, [*prompt(60), *prompt(10, 1), *prompt(10, 2)], tiny_model)
    await second.aclose()


async def test_a_fork_of_nothing_is_empty(sequence: Sequence) -> None:
    async with await sequence.fork() as fork:
        assert fork.tokens == []


async def test_a_fork_waits_for_the_prediction_before_it(
    context: Context, sequence: Sequence, gate: Gate
) -> None:
    prediction = sequence.predict(prompt(10), logits_processor=gate, max_tokens=5)
    await gate.reached()
    forking = await waiting(sequence.fork())
    gate.open()
    result = await soon(prediction)
    async with await soon(forking) as fork:
        assert fork.tokens == [*prompt(10), *result.tokens[:-1]]


async def test_without_a_free_sequence_a_fork_is_busy_at_once(tiny_model: Model) -> None:
    async with (
        tiny_model.create_context(context_size=256, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        with pytest.raises(BusyError, match="all 1 sequences"):
            await sequence.fork()
        with pytest.raises(BusyError, match=r"within 0\.01 s"):
            await sequence.fork(timeout=0.01)
        assert context.stats.sequences_waiting == 0
        assert await sequence.prefill(prompt(5)) == 5


async def test_forks_and_callers_wait_in_one_queue(tiny_model: Model) -> None:
    async with tiny_model.create_context(context_size=256, sequences=2, threads=1) as context:
        sequence, other = await context.sequence(), await context.sequence()
        await sequence.prefill(prompt(20))
        served: list[str] = []

        async def fork() -> None:
            async with await sequence.fork(timeout=None) as fork:
                served.append(f"fork of {len(fork.tokens)}")

        async def acquire() -> None:
            async with context.sequence():
                served.append("caller")

        tasks = [await waiting(acquire()), await waiting(fork()), await waiting(acquire())]
        await other.aclose()
        await soon(asyncio.gather(*tasks))
        assert served == ["caller", "fork of 20", "caller"]
        await sequence.aclose()


async def test_a_cancelled_fork_leaves_the_queue(tiny_model: Model) -> None:
    async with tiny_model.create_context(context_size=256, sequences=2, threads=1) as context:
        sequence, other = await context.sequence(), await context.sequence()
        forking = await waiting(sequence.fork(timeout=None))
        await until(lambda: context.stats.sequences_waiting == 1)
        forking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await forking
        await until(lambda: context.stats.sequences_waiting == 0)
        await other.aclose()
        await until(lambda: context.stats.sequences_active == 1)
        await sequence.aclose()


# --- score ----------------------------------------------------------------------------------------


async def test_scoring_appends_to_what_is_there(tiny_model: Model, sequence: Sequence) -> None:
    tokens = prompt(60)
    whole = await sequence.score(tokens)
    assert sequence.tokens == tokens
    assert len(whole) == 60
    assert math.isnan(whole[0]), "nothing comes before it"
    assert all(value < 0 for value in whole[1:])
    await sequence.clear()
    parts: list[float] = []
    for start in (0, 1, 2, 20, 59):
        end = {0: 1, 1: 2, 2: 20, 20: 59, 59: 60}[start]
        parts += await sequence.score(tokens[start:end])
        assert sequence.tokens == tokens[:end]
    assert math.isnan(parts[0])
    assert distance(parts[1:], whole[1:]) < TOLERANCE


async def test_scores_are_the_log_probabilities_of_the_prediction(
    tiny_model: Model, sequence: Sequence
) -> None:
    tokens = prompt(30)
    result = await soon(sequence.predict(tokens, max_tokens=15, logprobs=0))
    assert result.logprobs is not None
    scores = await uncached(tiny_model, tokens, result.tokens)
    assert distance([each.logprob for each in result.logprobs], scores) < TOLERANCE
    first = await soon(sequence.predict(tokens, max_tokens=1, logprobs=VOCAB_SIZE))
    assert first.logprobs is not None
    probabilities = [math.exp(each.logprob) for each in first.logprobs[0].top]
    assert sum(probabilities) == pytest.approx(1, abs=1e-4)


async def test_scores_in_a_long_text_do_not_depend_on_the_width_of_a_batch(
    tiny_model: Model,
) -> None:
    tokens = prompt(700)
    expected = await uncached(tiny_model, tokens[:300], tokens[300:])
    for batch, ubatch in ((16, 16), (512, 32)):
        async with (
            tiny_model.create_context(
                context_size=1024, sequences=1, threads=1, batch_size=batch, ubatch_size=ubatch
            ) as context,
            context.sequence() as sequence,
        ):
            await sequence.prefill(tokens[:300])
            scores = await soon(sequence.score(tokens[300:]))
            assert distance(scores, expected) < TOLERANCE


async def test_scoring_more_than_fits_changes_nothing(tiny_model: Model) -> None:
    async with (
        tiny_model.create_context(context_size=64, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        await sequence.score(prompt(40))
        with pytest.raises(ContextOverflowError, match="64"):
            await sequence.score(prompt(25))
        assert sequence.tokens == prompt(40)
        assert len(await sequence.score(prompt(24))) == 24


async def test_prefilling_more_than_fits_changes_nothing(tiny_model: Model) -> None:
    async with (
        tiny_model.create_context(context_size=64, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        await sequence.prefill(prompt(40))
        with pytest.raises(ContextOverflowError, match=r"65.*64"):
            await sequence.prefill(prompt(65))
        assert sequence.tokens == prompt(40)
        assert await sequence.prefill(prompt(64)) >= 24


async def test_wrong_tokens_are_refused_at_the_call(sequence: Sequence) -> None:
    for tokens in ([], [-1], [VOCAB_SIZE], [2**40]):
        with pytest.raises(ValueError):
            await sequence.score(tokens)
        with pytest.raises(ValueError):
            _ = sequence.predict(tokens)
        with pytest.raises(ValueError):
            await sequence.prefill(tokens)
    assert sequence.tokens == []


# --- save and load --------------------------------------------------------------------------------


async def test_a_saved_state_comes_back(
    tiny_model: Model, context: Context, sequence: Sequence, tmp_path: Path
) -> None:
    path = tmp_path / "state with spaces é"
    tokens = prompt(150)
    await sequence.prefill(tokens)
    await sequence.save(path)
    await sequence.prefill(prompt(20, 1))
    await sequence.load(str(path))
    assert sequence.tokens == tokens
    assert context.stats.cells_used == 150
    evaluated = context.stats.evaluated_tokens
    await remembers(sequence, tokens, tiny_model)
    assert context.stats.evaluated_tokens == evaluated + len(PROBE) + 1


async def test_a_state_goes_to_another_sequence_context_and_size(
    tiny_model: Model, sequence: Sequence, tmp_path: Path
) -> None:
    await sequence.prefill(prompt(150))
    await sequence.save(tmp_path / "state")
    for size, sequences in ((256, 1), (4096, 8), (200, 3)):
        async with (
            tiny_model.create_context(context_size=size, sequences=sequences, threads=1) as other,
            other.sequence() as target,
        ):
            await target.load(tmp_path / "state")
            await remembers(target, prompt(150), tiny_model)


async def test_an_empty_state_comes_back_empty(sequence: Sequence, tmp_path: Path) -> None:
    await sequence.save(tmp_path / "state")
    await sequence.prefill(prompt(20))
    await sequence.load(tmp_path / "state")
    assert sequence.tokens == []


async def test_loading_into_a_fork_leaves_its_parent(
    tiny_model: Model, sequence: Sequence, tmp_path: Path
) -> None:
    await sequence.prefill(prompt(50, 1))
    await sequence.save(tmp_path / "state")
    await sequence.prefill(prompt(100))
    async with await sequence.fork() as fork:
        await fork.load(tmp_path / "state")
        await remembers(fork, prompt(50, 1), tiny_model)
    await remembers(sequence, prompt(100), tiny_model)


async def refused(model: Model, path: Path, **options: object) -> None:
    """Pass if a context of `model` refuses the state at `path` and is none the worse for it."""
    async with (
        model.create_context(**({"context_size": 512, "threads": 1} | options)) as context,  # type: ignore[arg-type]
        context.sequence() as sequence,
    ):
        await sequence.prefill(prompt(30, 7))
        with pytest.raises(StateMismatchError, match=path.name):
            await sequence.load(path)
        assert context.stats.cells_used == 30
        assert sequence.tokens == prompt(30, 7)
        assert len(await sequence.score(PROBE)) == len(PROBE)


@pytest.fixture
async def state(sequence: Sequence, tmp_path: Path) -> Path:
    """A saved state of 40 tokens."""
    await sequence.prefill(prompt(40))
    await sequence.save(tmp_path / "state")
    return tmp_path / "state"


async def test_a_state_of_another_model_is_refused(state: Path, tmp_path: Path) -> None:
    for name, path in {
        "seed": tiny_llama(tmp_path / "seed.gguf", seed=1),
        "quantised": tiny_llama(tmp_path / "quantised.gguf", quantised=True),
        "layers": tiny_llama(tmp_path / "layers.gguf", layers=3),
    }.items():
        async with llamactor.load_model(path, context_size=64, threads=1) as other:
            assert name
            await refused(other, state)


async def test_a_state_of_another_layout_is_refused(tiny_model: Model, state: Path) -> None:
    await refused(tiny_model, state, kv_type_k="q8_0")
    await refused(tiny_model, state, kv_type_v="f32")
    await refused(tiny_model, state, rope_freq_base=5000.0)
    await refused(tiny_model, state, kv_unified=False, sequences=2)


async def test_a_state_made_without_the_adapter_is_refused(
    tiny_model_path: Path, state: Path, tmp_path: Path
) -> None:
    adapter = tiny_lora(tmp_path / "lora.gguf")
    for lora in ([adapter], [(adapter, 0.5)]):
        async with llamactor.load_model(
            tiny_model_path, context_size=64, threads=1, lora=lora
        ) as model:
            await refused(model, state)


async def test_a_state_with_an_adapter_comes_back_with_the_same_one(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    adapter = tiny_lora(tmp_path / "lora.gguf")
    async with llamactor.load_model(
        tiny_model_path, context_size=512, threads=1, lora=[(adapter, 0.5)]
    ) as model:
        async with (
            model.create_context(context_size=512, sequences=1) as context,
            context.sequence() as sequence,
        ):
            await sequence.prefill(prompt(40))
            await sequence.save(tmp_path / "with adapter")
        async with (
            model.create_context(context_size=512, sequences=1) as context,
            context.sequence() as sequence,
        ):
            await sequence.load(tmp_path / "with adapter")
            await remembers(sequence, prompt(40), model)


async def test_a_damaged_state_is_refused(tiny_model: Model, state: Path) -> None:
    whole = state.read_bytes()
    damaged = [whole[:n] for n in (0, 1, 15, 16, 40, 75, 76, 100, len(whole) // 2, len(whole) - 1)]
    damaged += [
        whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :]
        for at in (0, 17, 25, 37, 45, 53, 61, 80, len(whole) // 2, len(whole) - 1)
    ]
    damaged.append(whole + b"\0")
    for content in damaged:
        state.write_bytes(content)
        await refused(tiny_model, state)


async def test_a_state_that_is_too_big_changes_nothing(
    tiny_model: Model, sequence: Sequence, tmp_path: Path
) -> None:
    await sequence.prefill(prompt(400))
    await sequence.save(tmp_path / "big")
    async with tiny_model.create_context(context_size=256, sequences=2, threads=1) as context:
        one, other = await context.sequence(), await context.sequence()
        await one.prefill(prompt(50, 1))
        await other.prefill(prompt(60, 2))
        with pytest.raises(ContextOverflowError, match=r"400 .* 256"):
            await one.load(tmp_path / "big")
        assert context.stats.cells_used == 110
        await remembers(one, prompt(50, 1), tiny_model)
        await remembers(other, prompt(60, 2), tiny_model)
        await one.aclose()
        await other.aclose()


async def test_paths_that_lead_nowhere(sequence: Sequence, tmp_path: Path) -> None:
    await sequence.prefill(prompt(20))
    with pytest.raises(FileNotFoundError):
        await sequence.load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        await sequence.save(tmp_path / "missing" / "state")
    with pytest.raises(OSError):
        await sequence.load(tmp_path)
    with pytest.raises(OSError):
        await sequence.save(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="regular"):
        await soon(sequence.load(fifo))
    for path in ("", "nul\0byte", "x" * 5000):
        with pytest.raises((ValueError, OSError)):
            await sequence.save(path)
        with pytest.raises((ValueError, OSError)):
            await sequence.load(path)
    with pytest.raises(TypeError):
        await sequence.save(7)  # type: ignore[arg-type]
    assert sequence.tokens == prompt(20)
    assert {path.name for path in tmp_path.iterdir()} == {"fifo"}


async def test_a_state_is_replaced_whole_or_not_at_all(
    tiny_model: Model, sequence: Sequence, tmp_path: Path
) -> None:
    path = tmp_path / "state"
    await sequence.prefill(prompt(40))
    await sequence.save(path)
    first = path.read_bytes()
    path.chmod(0o444)
    await sequence.prefill(prompt(50))
    await sequence.save(path)
    assert path.read_bytes() != first
    assert [each.name for each in tmp_path.iterdir()] == ["state"]
    await sequence.load(path)
    await remembers(sequence, prompt(50), tiny_model)


async def test_a_failed_save_leaves_the_old_state_and_nothing_else(
    tiny_model: Model, sequence: Sequence, tmp_path: Path
) -> None:
    """The name of a directory cannot be taken: the write fails after the content was made."""
    path = tmp_path / "state"
    path.mkdir()
    (path / "inside").touch()
    await sequence.prefill(prompt(40))
    with pytest.raises(OSError):
        await sequence.save(path)
    assert stat.S_ISDIR(path.stat().st_mode)
    assert [each.name for each in tmp_path.iterdir()] == ["state"]
    await remembers(sequence, prompt(40), tiny_model)


async def test_saving_to_one_path_from_many_sequences_leaves_one_whole_state(
    context: Context, tmp_path: Path
) -> None:
    sequences = [await context.sequence() for _ in range(4)]
    prompts = [prompt(100 + 50 * i, i) for i in range(4)]
    for each, tokens in zip(sequences, prompts, strict=True):
        await each.prefill(tokens)
    for _ in range(10):
        await asyncio.gather(*(each.save(tmp_path / "state") for each in sequences))
        await sequences[0].load(tmp_path / "state")
        assert sequences[0].tokens in prompts
        await sequences[0].prefill(prompts[0])
    assert [each.name for each in tmp_path.iterdir()] == ["state"]
    for each in sequences:
        await each.aclose()


# --- in turn --------------------------------------------------------------------------------------


async def test_calls_on_one_sequence_run_in_order(sequence: Sequence, tmp_path: Path) -> None:
    """None is awaited before the next is asked for."""
    prediction = sequence.predict(prompt(20), max_tokens=6)
    works = [
        sequence.shift(0, 0),
        sequence.save(tmp_path / "state"),
        sequence.clear(),
        sequence.prefill([BOS, *prompt(9)]),
        sequence.score(PROBE),
        sequence.load(tmp_path / "state"),
    ]
    tasks = [await waiting(work) for work in works]
    outcomes = await soon(asyncio.gather(*tasks))
    result = await prediction
    assert outcomes[3] == 10
    assert sequence.tokens == [*prompt(20), *result.tokens[:-1]]


async def test_a_second_prediction_waits_its_turn(sequence: Sequence, gate: Gate) -> None:
    turns: list[str] = []
    first = sequence.predict(prompt(10), logits_processor=gate, max_tokens=3)
    second = sequence.predict(
        prompt(10, 1), logits_processor=lambda *_: turns.append("second"), max_tokens=3
    )
    third = sequence.predict(
        prompt(10, 2), logits_processor=lambda *_: turns.append("third"), max_tokens=3
    )
    await gate.reached()
    assert second.stats.queue_time > 0
    assert second.stats.predicted_tokens == third.stats.predicted_tokens == 0
    gate.open()
    results = [await soon(each) for each in (third, second, first)]
    assert [len(result.tokens) for result in results] == [3, 3, 3]
    assert sequence.tokens[:10] == prompt(10, 2)
    assert turns == ["second"] * 3 + ["third"] * 3


async def test_closing_a_sequence_ends_what_runs_and_waits_on_it(
    sequence: Sequence, gate: Gate
) -> None:
    running = sequence.predict(prompt(10), logits_processor=gate)
    behind = sequence.predict(prompt(10, 1))
    scoring = await waiting(sequence.score(PROBE))
    await gate.reached()
    gate.allow(3)
    for _ in range(3):
        await gate.reached()
    await sequence.aclose()
    gate.open()
    for work in (running, behind, scoring):
        with pytest.raises(llamactor.ClosedError):
            await soon(work)
    with pytest.raises(llamactor.ClosedError) as failure:
        await running
    assert failure.value.partial is not None
    assert len(failure.value.partial.tokens) >= 3
