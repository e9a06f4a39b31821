"""How tokens are drawn: every sampling option, greedy and at random.

Most tests replace the model's logits by a known distribution over a few letters (`only`), so the
samplers' supports are known exactly; the others take the tiny random model as it is. Seeds are
fixed, and bounds are wide enough for any seed.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

import llamactor
from llamactor import (
    Dry,
    DynamicTemperature,
    LlamactorError,
    Mirostat,
    PredictionResult,
    RepeatPenalty,
    Xtc,
)
from llamactor.errors import DecodeError
from tests.models import EOS, IM_END, VOCAB_SIZE, byte_tokens, tiny_scripted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from llamactor import Model

Row = npt.NDArray[np.float32]

A, B, C, D, E = byte_tokens("abcde")
NEWLINE = byte_tokens("\n")[0]
PROMPT = "once"
MANY = 300
"""Draws; a token of probability 5 % is missed by all of them once in five million cases."""


def only(logits: Mapping[int, float]) -> Callable[[list[int], Any], None]:
    """A processor that leaves nothing but these logits."""
    row = np.full(VOCAB_SIZE, -np.inf, np.float32)
    row[list(logits)] = list(logits.values())

    def replace(tokens: list[int], view: Any) -> None:
        np.asarray(view)[:] = row

    return replace


def likely(*probabilities: float) -> Callable[[list[int], Any], None]:
    """A processor after which A, B, C … have these probabilities."""
    return only({A + i: math.log(p) for i, p in enumerate(probabilities)})


def scores(*logits: float) -> Callable[[list[int], Any], None]:
    """A processor after which A, B, C … have these logits."""
    return only({A + i: logit for i, logit in enumerate(logits)})


async def generate(model: Model, **options: Any) -> PredictionResult:
    return await model.complete(PROMPT, **({"ignore_eos": True, "seed": 1} | options))


async def draws(model: Model, processor: Any, **options: Any) -> Counter[int]:
    """How often each token comes in many draws from the same distribution."""
    options = {"temperature": 1.0, "max_tokens": MANY} | options
    return Counter((await generate(model, logits_processor=processor, **options)).tokens)


async def text(model: Model, processor: Any, max_tokens: int = 6, **options: Any) -> str:
    """What a greedy answer says; A, B, C … are letters."""
    result = await generate(model, logits_processor=processor, max_tokens=max_tokens, **options)
    return result.content


async def first_row(model: Model, prompt: str = PROMPT) -> Row:
    """The logits for the first token after the prompt."""
    rows: list[Row] = []

    def keep(tokens: list[int], logits: Any) -> None:
        rows.append(np.array(logits, np.float32))

    await model.complete(prompt, max_tokens=1, logits_processor=keep)
    return rows[0]


def log_softmax(row: Row) -> npt.NDArray[np.float64]:
    wide = row.astype(np.float64)
    wide -= wide.max()
    return np.asarray(wide - np.log(np.exp(wide).sum()))


# --- temperature and seeds -----------------------------------------------------------------------


async def test_temperature_zero_takes_the_likeliest_token_whatever_the_seed(
    tiny_model: Model,
) -> None:
    best = int((await first_row(tiny_model)).argmax())
    for seed in range(5):
        assert (await generate(tiny_model, max_tokens=1, seed=seed)).tokens == [best]
    assert set(await draws(tiny_model, likely(0.4, 0.6), temperature=0.0)) == {B}


async def test_temperature_sharpens_and_flattens(tiny_model: Model) -> None:
    counts = {t: await draws(tiny_model, likely(0.1, 0.9), temperature=t) for t in (0.2, 1.0, 10.0)}
    assert counts[0.2][A] == 0
    assert 5 < counts[1.0][A] < 75
    assert 90 < counts[10.0][A] < 180


@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-6])
async def test_a_tiny_temperature_is_almost_greedy(tiny_model: Model, temperature: float) -> None:
    greedy = await generate(tiny_model, max_tokens=20)
    cold = await generate(tiny_model, max_tokens=20, temperature=temperature)
    assert cold.tokens == greedy.tokens


async def test_the_same_seed_repeats_and_another_does_not(tiny_model: Model) -> None:
    answers = [
        (await generate(tiny_model, temperature=2.0, max_tokens=30, seed=seed)).tokens
        for seed in (7, 7, 8, 2**32 - 2, 2**32 - 2, 0)
    ]
    assert answers[0] == answers[1]
    assert answers[3] == answers[4]
    assert len({tuple(answer) for answer in answers}) == 4


async def test_a_given_seed_is_reported_and_a_drawn_one_reproduces(tiny_model: Model) -> None:
    assert (await generate(tiny_model, max_tokens=1, seed=12345)).seed == 12345
    options: dict[str, Any] = {"temperature": 2.0, "max_tokens": 30}
    drawn = [await generate(tiny_model, **options, seed=None) for _ in range(3)]
    assert len({result.seed for result in drawn}) == 3
    for result in drawn:
        again = await generate(tiny_model, **options, seed=result.seed)
        assert (again.tokens, again.seed) == (result.tokens, result.seed)


async def test_deterministic_repeats_bit_for_bit_beside_others(tiny_model: Model) -> None:
    options: dict[str, Any] = {
        "temperature": 2.0,
        "max_tokens": 30,
        "deterministic": True,
        "logprobs": 0,
    }
    alone = await generate(tiny_model, **options)
    crowd = [tiny_model.complete(f"{i} times", max_tokens=60, ignore_eos=True) for i in range(3)]
    beside = await generate(tiny_model, **options)
    await asyncio.gather(*(prediction.result() for prediction in crowd))
    assert beside.tokens == alone.tokens
    assert beside.logprobs == alone.logprobs


# --- truncation ----------------------------------------------------------------------------------


async def test_top_k_draws_only_from_the_best(tiny_model: Model) -> None:
    best = (await generate(tiny_model, max_tokens=1, logprobs=3)).logprobs
    assert best is not None
    three = {entry.token for entry in best[0].top}
    options: dict[str, Any] = {"max_tokens": 1, "temperature": 5.0}
    drawn = [await generate(tiny_model, **options, top_k=3, seed=i) for i in range(200)]
    assert {result.tokens[0] for result in drawn} == three
    free = [await generate(tiny_model, **options, top_k=None, seed=i) for i in range(200)]
    assert len({result.tokens[0] for result in free}) > 40


async def test_top_k_is_40_unless_told_otherwise(tiny_model: Model) -> None:
    falling = only({100 + i: -0.001 * i for i in range(60)})
    options: dict[str, Any] = {"max_tokens": 700}
    assert set(await draws(tiny_model, falling, **options)) == set(range(100, 140))
    assert set(await draws(tiny_model, falling, top_k=None, **options)) == set(range(100, 160))


SUPPORTS: list[tuple[dict[str, Any], tuple[float, ...], str]] = [
    ({}, (0.4, 0.3, 0.2, 0.1), "abcd"),
    ({"top_k": 2}, (0.4, 0.3, 0.2, 0.1), "ab"),
    ({"top_p": 0.6}, (0.4, 0.3, 0.2, 0.1), "ab"),
    ({"top_p": 0.8}, (0.4, 0.3, 0.2, 0.1), "abc"),
    ({"top_p": 0.01}, (0.4, 0.3, 0.2, 0.1), "a"),
    ({"min_p": 0.4}, (0.4, 0.3, 0.2, 0.1), "abc"),
    ({"min_p": 0.6}, (0.4, 0.3, 0.2, 0.1), "ab"),
    ({"min_p": 1.0}, (0.4, 0.3, 0.2, 0.1), "a"),
    # The entropy is 1.36 nats; A is less, C no more surprising than usual.
    ({"typical_p": 0.2}, (0.45, 0.2, 0.2, 0.15), "bc"),
    ({"typical_p": 1.0}, (0.45, 0.2, 0.2, 0.15), "abcd"),
    ({"xtc": Xtc(1.0, 0.15)}, (0.4, 0.3, 0.2, 0.1), "cd"),
    ({"xtc": Xtc(1.0, 0.25)}, (0.4, 0.3, 0.2, 0.1), "bcd"),
    ({"xtc": Xtc(1.0, 0.5)}, (0.4, 0.3, 0.2, 0.1), "abcd"),
    ({"xtc": Xtc(0.0, 0.1)}, (0.4, 0.3, 0.2, 0.1), "abcd"),
    ({"top_k": 3, "min_p": 0.6}, (0.4, 0.3, 0.2, 0.1), "ab"),
]


@pytest.mark.parametrize(("options", "probabilities", "support"), SUPPORTS)
async def test_a_truncation_keeps_exactly_its_support(
    tiny_model: Model, options: dict[str, Any], probabilities: tuple[float, ...], support: str
) -> None:
    drawn = await draws(tiny_model, likely(*probabilities), **options)
    assert "".join(chr(token - byte_tokens(b"\0")[0]) for token in sorted(drawn)) == support


async def test_xtc_happens_as_often_as_said(tiny_model: Model) -> None:
    # When it happens, only B stays.
    often = await draws(tiny_model, likely(0.9, 0.1), xtc=Xtc(0.5, 0.05))
    seldom = await draws(tiny_model, likely(0.9, 0.1), xtc=Xtc(0.05, 0.05))
    assert 100 < often[B] < 230
    assert 10 < seldom[B] < 90


async def test_top_n_sigma_keeps_logits_near_the_best(tiny_model: Model) -> None:
    # Mean 1, standard deviation 1.73 (1.84 of a sample).
    row = scores(4, 3.5, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.5, 2, 2, 2)
    near = set(await draws(tiny_model, row, top_n_sigma=0.5, temperature=3.0))
    assert near == {A, B}
    wide = set(await draws(tiny_model, row, top_n_sigma=5.0, temperature=3.0))
    assert len(wide) == 16


async def test_greedy_leaves_truncation_out(tiny_model: Model) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "xtc": Xtc(1.0, 0.05), "typical_p": 0.2}
    assert set(await draws(tiny_model, likely(0.45, 0.2, 0.2, 0.15), **options)) == {A}


NATIVE: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_k": None, "top_p": 0.5},
    {"min_p": 0.3},
    {"typical_p": 0.5},
    {"top_n_sigma": 0.05},
    {"xtc": Xtc(0.5, 0.01)},
    {"dry": Dry(allowed_length=1)},
    {"mirostat": Mirostat(1)},
    {"mirostat": Mirostat(2)},
    {"dynamic_temperature": DynamicTemperature(1.0)},
    {"repeat_penalty": RepeatPenalty(1.5, 8, 0.5, 0.5)},
    {"logit_bias": {"a": 5.0, "b": "never"}},
    {"sampler_order": ["temperature"]},
]


@pytest.mark.parametrize("options", NATIVE, ids=str)
async def test_a_processor_that_changes_nothing_changes_nothing(
    tiny_model: Model, options: dict[str, Any]
) -> None:
    options = {"temperature": 1.5, "max_tokens": 60} | options
    native = await generate(tiny_model, **options)
    called = await generate(tiny_model, **options, logits_processor=lambda tokens, logits: None)
    assert called.tokens == native.tokens


CHANGES = [options for options in NATIVE[2:] if "dry" not in options]


@pytest.mark.parametrize("options", CHANGES, ids=str)
async def test_every_option_changes_what_is_drawn(
    tiny_model: Model, options: dict[str, Any]
) -> None:
    base: dict[str, Any] = {"temperature": 3.0, "max_tokens": 60, "top_k": 100}
    plain = await generate(tiny_model, **base)
    changed = await generate(tiny_model, **(base | options))
    assert changed.tokens != plain.tokens


# --- mirostat and dynamic temperature ------------------------------------------------------------

ZIPF = only({100 + i: -math.log(i + 1) for i in range(200)})


@pytest.mark.parametrize("version", [1, 2])
async def test_mirostat_holds_the_surprise_at_its_target(
    tiny_model: Model, version: Literal[1, 2]
) -> None:
    low = await draws(tiny_model, ZIPF, mirostat=Mirostat(version, tau=0.5, eta=0.1))
    high = await draws(tiny_model, ZIPF, mirostat=Mirostat(version, tau=5.0, eta=0.1))
    assert len(low) < 20
    assert len(high) > 40


@pytest.mark.parametrize("version", [1, 2])
async def test_mirostat_takes_the_place_of_truncation(
    tiny_model: Model, version: Literal[1, 2]
) -> None:
    mirostat = Mirostat(version, tau=5.0)
    drawn = await draws(tiny_model, ZIPF, mirostat=mirostat, top_k=1, top_p=0.1, min_p=1.0)
    assert len(drawn) > 20


@pytest.mark.parametrize("version", [1, 2])
async def test_mirostat_learns_at_its_rate(tiny_model: Model, version: Literal[1, 2]) -> None:
    # It starts at twice the target, 0.2 bits, where only the best is left.
    slow = await draws(
        tiny_model, ZIPF, mirostat=Mirostat(version, tau=0.1, eta=1e-4), max_tokens=50
    )
    fast = await draws(
        tiny_model, ZIPF, mirostat=Mirostat(version, tau=0.1, eta=30.0), max_tokens=50
    )
    assert len(slow) < len(fast)


async def test_the_two_mirostats_differ(tiny_model: Model) -> None:
    first, second = [
        await generate(
            tiny_model, logits_processor=ZIPF, max_tokens=50, temperature=1.0, mirostat=Mirostat(v)
        )
        for v in (1, 2)
    ]
    assert first.tokens != second.tokens


async def test_dynamic_temperature_follows_the_entropy(tiny_model: Model) -> None:
    sure, unsure = likely(0.96, 0.02, 0.02), likely(0.34, 0.33, 0.33)
    dynamic = DynamicTemperature(1.0)
    assert set(await draws(tiny_model, sure, dynamic_temperature=dynamic)) == {A}
    assert set(await draws(tiny_model, unsure, dynamic_temperature=dynamic)) == {A, B, C}
    # A range of 0 is the plain temperature.
    plain = DynamicTemperature(0.0)
    assert set(await draws(tiny_model, sure, dynamic_temperature=plain)) == {A, B, C}


async def test_dynamic_temperature_reaches_its_range_both_ways(tiny_model: Model) -> None:
    even = likely(0.4, 0.3, 0.3)
    cold = await draws(tiny_model, even, temperature=0.01)
    warm = await draws(
        tiny_model, even, temperature=0.01, dynamic_temperature=DynamicTemperature(2.0)
    )
    assert set(cold) == {A}
    assert set(warm) == {A, B, C}


async def test_the_exponent_bends_dynamic_temperature(tiny_model: Model) -> None:
    uneven = likely(0.7, 0.2, 0.1)
    straight = await draws(tiny_model, uneven, dynamic_temperature=DynamicTemperature(1.0))
    bent = await draws(tiny_model, uneven, dynamic_temperature=DynamicTemperature(1.0, 30.0))
    assert set(straight) == {A, B, C}
    assert set(bent) == {A}


# --- penalties -----------------------------------------------------------------------------------

CLOSE = scores(2.0, 1.9)
"""B overtakes A when A costs a little."""


async def test_without_a_penalty_the_best_comes_again_and_again(tiny_model: Model) -> None:
    assert await text(tiny_model, CLOSE) == "aaaaaa"
    assert await text(tiny_model, CLOSE, repeat_penalty=1.0) == "aaaaaa"


async def test_a_repeat_penalty_divides_the_logits_of_what_was_said(tiny_model: Model) -> None:
    # 2.0, then 1.82 against 1.9, then 1.82 against 1.73.
    assert await text(tiny_model, CLOSE, repeat_penalty=1.1) == "abaaaa"
    assert await text(tiny_model, CLOSE, repeat_penalty=RepeatPenalty(1.1)) == "abaaaa"
    assert await text(tiny_model, CLOSE, repeat_penalty=1.01) == "aaaaaa"
    # Negative logits are multiplied.
    assert await text(tiny_model, scores(-1.9, -2.0), repeat_penalty=1.1) == "abaaaa"


async def test_the_window_of_a_penalty_moves_on(tiny_model: Model) -> None:
    window = RepeatPenalty(1.1, last_tokens=1)
    assert await text(tiny_model, CLOSE, repeat_penalty=window) == "ababab"
    falling = scores(2.0, 1.99, 1.98, 1.97)
    assert await text(tiny_model, falling, repeat_penalty=RepeatPenalty(1.1, 2)) == "abcabc"
    assert await text(tiny_model, falling, repeat_penalty=RepeatPenalty(1.1, None)) == "abcdaa"


async def test_a_frequency_penalty_grows_with_every_time(tiny_model: Model) -> None:
    row = scores(2.0, 1.85)
    penalty = RepeatPenalty(1.0, frequency_penalty=0.1)
    # A falls to 1.9, to 1.8, then B takes its turn: 1.75.
    assert await text(tiny_model, row, repeat_penalty=penalty) == "aababa"


async def test_a_presence_penalty_counts_once(tiny_model: Model) -> None:
    penalty = RepeatPenalty(1.0, presence_penalty=0.15)
    assert await text(tiny_model, CLOSE, repeat_penalty=penalty) == "abaaaa"
    wish = RepeatPenalty(1.0, presence_penalty=-1.0)
    assert await text(tiny_model, CLOSE, repeat_penalty=wish) == "aaaaaa"


async def test_the_newline_may_be_spared(tiny_model: Model) -> None:
    row = only({NEWLINE: 2.0, B: 1.9})
    assert await text(tiny_model, row, repeat_penalty=1.1) == "\nb\n\n\n\n"
    spared = RepeatPenalty(1.1, penalize_newline=False)
    assert await text(tiny_model, row, repeat_penalty=spared) == "\n" * 6


async def test_a_penalty_does_not_look_at_the_prompt(tiny_model: Model) -> None:
    prompt = byte_tokens("aaaa")
    options: dict[str, Any] = {"logits_processor": CLOSE, "repeat_penalty": 1.1, "max_tokens": 2}
    assert (await tiny_model.complete(prompt, **options)).content == "ab"


async def test_the_filter_sees_the_window_and_chooses_what_is_punished(tiny_model: Model) -> None:
    seen: list[list[int]] = []

    def spare_all(tokens: list[int]) -> list[int]:
        seen.append(tokens)
        return []

    penalty = RepeatPenalty(1.1, last_tokens=2, punish_tokens_filter=spare_all)
    assert await text(tiny_model, CLOSE, 4, repeat_penalty=penalty) == "aaaa"
    assert seen == [[], [A], [A, A], [A, A]]
    penalty = RepeatPenalty(1.1, punish_tokens_filter=lambda tokens: [A])
    assert await text(tiny_model, CLOSE, 4, repeat_penalty=penalty) == "bbbb"


def answer_with(answer: list[int], tokens: list[int]) -> list[int]:
    return answer


async def test_the_filter_may_name_a_token_several_times(tiny_model: Model) -> None:
    row = scores(2.0, 1.75)
    for punished, expected in (([A] * 2, "aa"), ([A] * 3, "bb")):
        penalty = RepeatPenalty(
            1.0,
            frequency_penalty=0.1,
            punish_tokens_filter=partial(answer_with, punished),
        )
        assert await text(tiny_model, row, 2, repeat_penalty=penalty) == expected


async def test_a_filter_that_raises_fails_the_prediction_with_the_partial(
    tiny_model: Model,
) -> None:
    def break_down(tokens: list[int]) -> list[int]:
        if len(tokens) == 2:
            raise LookupError("no such penalty")
        return tokens

    penalty = RepeatPenalty(1.1, punish_tokens_filter=break_down)
    with pytest.raises(LookupError, match="no such penalty") as failure:
        await text(tiny_model, CLOSE, repeat_penalty=penalty)
    so_far: PredictionResult = failure.value.partial  # type: ignore[attr-defined]
    assert (so_far.content, so_far.stop_reason) == ("ab", None)


@pytest.mark.parametrize(
    ("answer", "error"),
    [(None, TypeError), (["a"], TypeError), ([VOCAB_SIZE], ValueError), ([-1], ValueError)],
)
async def test_a_filter_that_answers_nonsense_fails_the_prediction(
    tiny_model: Model, answer: Any, error: type[Exception]
) -> None:
    penalty = RepeatPenalty(1.1, punish_tokens_filter=lambda tokens: answer)
    with pytest.raises(error):
        await text(tiny_model, CLOSE, repeat_penalty=penalty)
    assert await text(tiny_model, CLOSE, 2) == "aa"


# --- dry -----------------------------------------------------------------------------------------


async def test_dry_breaks_a_repetition(tiny_model: Model) -> None:
    row = scores(2.0, 1.0, 0.5)
    assert await text(tiny_model, row, 8) == "aaaaaaaa"
    broken = await text(tiny_model, row, 8, dry=Dry(5.0))
    assert broken.startswith("aaa")
    assert set(broken) > {"a"}
    assert await text(tiny_model, row, 8, dry=Dry(0.0)) == "aaaaaaaa"


async def test_dry_allows_a_length(tiny_model: Model) -> None:
    row = scores(2.0, 1.0)
    lengths = [
        (await text(tiny_model, row, 20, dry=Dry(9.0, allowed_length=n))).index("b")
        for n in (1, 2, 5)
    ]
    assert lengths == sorted(set(lengths))


async def test_the_penalty_of_dry_grows_with_its_base(tiny_model: Model) -> None:
    row = scores(10.0, 1.0)
    steep = await text(tiny_model, row, 12, dry=Dry(0.5, base=3.0))
    gentle = await text(tiny_model, row, 12, dry=Dry(0.5, base=1.2))
    assert "b" in steep
    assert "b" not in gentle


async def test_dry_does_not_reach_across_its_breakers(tiny_model: Model) -> None:
    row = scores(2.0, 1.0)
    assert "b" in await text(tiny_model, row, 20, dry=Dry(9.0))
    assert await text(tiny_model, row, 20, dry=Dry(9.0, breakers=("a",))) == "a" * 20


@pytest.mark.parametrize("breakers", [("x",) * 100, ("a\0b",)])
async def test_breakers_dry_cannot_take_are_refused_at_the_call(
    tiny_model: Model, breakers: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="breaker"):
        _ = tiny_model.complete(PROMPT, dry=Dry(breakers=breakers))


async def test_dry_looks_at_the_prompt_but_no_further_than_its_window(tmp_path: Path) -> None:
    path = tiny_scripted(tmp_path / "scripted.gguf", byte_tokens("xyz"), then=EOS)
    async with llamactor.load_model(path, context_size=256, threads=1) as model:

        async def after(prompt: str, dry: Dry | None) -> list[int]:
            prediction = model.complete(byte_tokens(prompt), max_tokens=1, dry=dry)
            return (await prediction).tokens

        z = byte_tokens("z")
        assert await after("xyzxy", None) == z
        assert await after("xyzxy", Dry(1e4)) != z
        assert await after("xyzxy", Dry(1e4, last_tokens=2)) == z
        assert await after("abcxy", Dry(1e4)) == z


# --- biases and the order ------------------------------------------------------------------------


async def test_a_bias_moves_a_token_by_id_and_by_text(tiny_model: Model) -> None:
    row = scores(2.0, 1.0)
    assert await text(tiny_model, row, 2, logit_bias={B: 0.5}) == "aa"
    assert await text(tiny_model, row, 2, logit_bias={B: 1.5}) == "bb"
    assert await text(tiny_model, row, 2, logit_bias={"b": 1.5}) == "bb"
    assert await text(tiny_model, row, 2, logit_bias={A: -1.5}) == "bb"
    assert await text(tiny_model, row, 2, logit_bias={A: -1.5, "b": -1.5}) == "aa"


async def test_never_is_never(tiny_model: Model) -> None:
    assert await text(tiny_model, scores(1e30, 1.0), 2, logit_bias={"a": "never"}) == "bb"
    drawn = await draws(tiny_model, likely(0.9, 0.1), logit_bias={"a": "never"})
    assert set(drawn) == {B}


async def test_a_bias_works_without_callbacks(tiny_model: Model) -> None:
    row = await first_row(tiny_model)
    best, second = (int(token) for token in np.argsort(-row)[:2])
    result = await generate(tiny_model, max_tokens=1, logit_bias={best: "never"})
    assert result.tokens == [second]
    result = await generate(tiny_model, max_tokens=3, logit_bias={"<|im_start|>": 1e4})
    assert result.tokens == [2, 2, 2]


async def test_a_bias_can_end_the_answer(tiny_model: Model) -> None:
    result = await tiny_model.complete(PROMPT, logit_bias={IM_END: 1e4}, max_tokens=5)
    assert (result.stop_reason, result.tokens, result.content) == ("eos", [], "")


async def test_ignore_eos_goes_on_with_other_tokens(tmp_path: Path) -> None:
    path = tiny_scripted(tmp_path / "scripted.gguf", byte_tokens("ab"), then=EOS)
    async with llamactor.load_model(path, context_size=256, threads=1) as model:
        result = await model.complete("@", max_tokens=20)
        assert (result.content, result.stop_reason) == ("ab", "eos")
        result = await model.complete("@", max_tokens=20, ignore_eos=True)
        assert (len(result.tokens), result.stop_reason) == (20, "max_tokens")
        assert result.content.startswith("ab")
        assert not {EOS, IM_END} & set(result.tokens)


async def test_samplers_act_in_their_order(tiny_model: Model) -> None:
    row = likely(0.5, 0.3, 0.2)
    options: dict[str, Any] = {"temperature": 100.0, "top_p": 0.45}
    cut_first = await draws(tiny_model, row, **options, sampler_order=["top_p", "temperature"])
    flat_first = await draws(tiny_model, row, **options, sampler_order=["temperature", "top_p"])
    assert set(cut_first) == {A}
    assert len(flat_first) == 2


async def test_samplers_left_out_of_the_order_do_not_act(tiny_model: Model) -> None:
    assert set(await draws(tiny_model, likely(0.6, 0.4), top_k=1)) == {A}
    assert set(await draws(tiny_model, likely(0.6, 0.4), top_k=1, sampler_order=[])) == {A, B}
    cold = await draws(tiny_model, likely(0.6, 0.4), temperature=0.01, sampler_order=["top_k"])
    assert set(cold) == {A, B}
    penalised: dict[str, Any] = {"repeat_penalty": 1.1, "sampler_order": ["top_k"]}
    assert await text(tiny_model, CLOSE, **penalised) == "aaaaaa"


async def test_penalties_may_come_after_a_cut(tiny_model: Model) -> None:
    options: dict[str, Any] = {"top_k": 1, "repeat_penalty": 100.0, "max_tokens": 10}
    usual = await draws(tiny_model, CLOSE, **options)
    late = await draws(tiny_model, CLOSE, **options, sampler_order=["top_k", "penalties"])
    assert set(usual) == {A, B}
    assert set(late) == {A}


# --- log-probabilities ---------------------------------------------------------------------------


async def test_logprobs_are_off_unless_asked_for(tiny_model: Model) -> None:
    assert (await generate(tiny_model, max_tokens=2)).logprobs is None


async def test_logprobs_0_is_of_the_chosen_tokens_only(tiny_model: Model) -> None:
    result = await generate(tiny_model, max_tokens=5, logprobs=0)
    assert result.logprobs is not None
    assert [entry.token for entry in result.logprobs] == result.tokens
    assert "".join(entry.text for entry in result.logprobs) == result.content
    assert all(entry.top == () and entry.logprob < 0 for entry in result.logprobs)


async def test_logprobs_n_is_also_of_the_n_best(tiny_model: Model) -> None:
    result = await generate(tiny_model, max_tokens=5, logprobs=4, temperature=3.0)
    assert result.logprobs is not None
    for entry in result.logprobs:
        values = [other.logprob for other in entry.top]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) < 1
        assert entry.logprob <= values[0] or entry.token == entry.top[0].token


async def test_logprobs_of_the_whole_vocabulary_add_up_to_one(tiny_model: Model) -> None:
    result = await generate(tiny_model, max_tokens=2, logprobs=VOCAB_SIZE)
    assert result.logprobs is not None
    for entry in result.logprobs:
        assert len({other.token for other in entry.top}) == VOCAB_SIZE
        total = sum(math.exp(other.logprob) for other in entry.top)
        assert total == pytest.approx(1, abs=1e-5)


async def test_logprobs_are_the_models_own_before_any_sampler(tiny_model: Model) -> None:
    expected = log_softmax(await first_row(tiny_model))
    result = await generate(
        tiny_model,
        max_tokens=1,
        logprobs=10,
        temperature=5.0,
        top_k=3,
        repeat_penalty=2.0,
        logit_bias={A: 3.0},
    )
    assert result.logprobs is not None
    (entry,) = result.logprobs
    assert entry.logprob == pytest.approx(expected[entry.token], abs=1e-4)
    assert [other.token for other in entry.top] == list(np.argsort(-expected, kind="stable")[:10])
    for other in entry.top:
        assert other.logprob == pytest.approx(expected[other.token], abs=1e-4)


async def test_logprobs_equal_the_score_of_the_same_tokens(tiny_model: Model) -> None:
    async with tiny_model.create_context(context_size=256, sequences=2, threads=1) as context:
        async with context.sequence() as sequence:
            result = await sequence.predict(
                PROMPT, max_tokens=20, temperature=2.0, seed=3, logprobs=0
            )
        async with context.sequence() as sequence:
            await sequence.prefill(PROMPT)
            scored = await sequence.score(result.tokens)
    assert result.logprobs is not None
    assert [entry.logprob for entry in result.logprobs] == pytest.approx(scored, abs=1e-3)


async def test_logprobs_of_nothing_are_an_empty_list(tiny_model: Model) -> None:
    result = await tiny_model.complete(PROMPT, logit_bias={EOS: 1e4}, logprobs=2)
    assert (result.tokens, result.logprobs) == ([], [])


async def test_the_text_of_a_logprob_shows_special_and_partial_tokens(tiny_model: Model) -> None:
    for token, shown in ((2, "<|im_start|>"), (byte_tokens("é")[0], "\ufffd")):
        result = await generate(tiny_model, max_tokens=1, logprobs=1, logit_bias={token: 1e4})
        assert result.logprobs is not None
        assert (result.logprobs[0].token, result.logprobs[0].text) == (token, shown)


# --- logits processors ---------------------------------------------------------------------------


async def test_a_processor_edits_all_logits_in_place(tiny_model: Model) -> None:
    views: list[tuple[str, int, bool, tuple[int, ...] | None]] = []

    def choose(tokens: list[int], logits: Any) -> None:
        views.append((logits.format, logits.nbytes, logits.readonly, logits.shape))
        logits[C] = 1e6

    assert await text(tiny_model, choose, 2) == "cc"
    assert views == [("f", 4 * VOCAB_SIZE, False, (VOCAB_SIZE,))] * 2


async def test_a_processor_sees_the_tokens_generated_so_far(tiny_model: Model) -> None:
    seen: list[list[int]] = []
    script = [D, A, C]

    def follow(tokens: list[int], logits: Any) -> None:
        seen.append(list(tokens))
        logits[script[len(tokens)]] = 1e6

    assert await text(tiny_model, follow, 3) == "dac"
    assert seen == [[], [D], [D, A]]


async def test_a_processor_may_keep_its_view(tiny_model: Model) -> None:
    views: list[Any] = []
    result = await generate(
        tiny_model, max_tokens=3, logits_processor=lambda tokens, logits: views.append(logits)
    )
    expected = log_softmax(await first_row(tiny_model))
    assert int(np.asarray(views[0]).argmax()) == result.tokens[0]
    assert log_softmax(np.asarray(views[0])) == pytest.approx(expected, abs=1e-4)


async def test_an_error_in_a_processor_reaches_the_await_with_the_partial(
    tiny_model: Model,
) -> None:
    error = LookupError("out of letters")

    def break_down(tokens: list[int], logits: Any) -> None:
        logits[B] = 1e6
        if len(tokens) == 3:
            raise error

    prediction = tiny_model.complete(PROMPT, logits_processor=break_down, logprobs=0)
    for _ in range(2):
        with pytest.raises(LookupError) as failure:
            await prediction
        assert failure.value is error
        so_far: PredictionResult = failure.value.partial  # type: ignore[attr-defined]
        assert (so_far.content, so_far.tokens, so_far.stop_reason) == ("bbb", [B, B, B], None)
        assert so_far.stats.predicted_tokens == 3
    pieces: list[str] = []
    with pytest.raises(LookupError):
        pieces.extend([piece async for piece in prediction])
    assert (await generate(tiny_model, max_tokens=1)).stop_reason == "max_tokens"


async def test_a_system_exit_in_a_processor_fails_only_its_prediction(tiny_model: Model) -> None:
    def leave(tokens: list[int], logits: Any) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        await generate(tiny_model, logits_processor=leave)
    assert (await generate(tiny_model, max_tokens=1)).stop_reason == "max_tokens"


@pytest.mark.parametrize("value", [-math.inf, math.nan])
async def test_a_processor_that_leaves_nothing_to_draw_is_a_decode_error(
    tiny_model: Model, value: float
) -> None:
    def forbid_all(tokens: list[int], logits: Any) -> None:
        np.asarray(logits)[:] = value

    for temperature in (0.0, 1.0):
        with pytest.raises(DecodeError, match="no token can be drawn") as failure:
            await generate(tiny_model, logits_processor=forbid_all, temperature=temperature)
        assert isinstance(failure.value, LlamactorError)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_logits_that_are_no_numbers_are_never_drawn(
    tiny_model: Model, temperature: float
) -> None:
    def spoil(tokens: list[int], logits: Any) -> None:
        row = np.asarray(logits)
        row[:] = np.nan
        row[[A, B]] = 1.0, -np.inf

    drawn = await draws(tiny_model, spoil, temperature=temperature, max_tokens=20)
    assert set(drawn) == {A}


async def test_infinite_logits_are_drawn(tiny_model: Model) -> None:
    row = only({A: math.inf, B: 1.0})
    for options in ({"temperature": 0.0}, {"temperature": 1.0}, {"top_k": None, "top_p": 0.5}):
        assert set(await draws(tiny_model, row, max_tokens=10, **options)) == {A}
