"""Generation options on a real model, where what they do can be read."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from llamactor import (
    Dry,
    Mirostat,
    RepeatPenalty,
    TextDelta,
    TokenBatching,
    Xtc,
)

if TYPE_CHECKING:
    from llamactor import Model

pytestmark = pytest.mark.model

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
CAPITAL = CHAT.format("What is the capital of France? Answer with one sentence.")


async def test_a_question_is_answered_and_ends_by_itself(smollm2: Model) -> None:
    prediction = smollm2.complete(CAPITAL, max_tokens=60)
    pieces = [piece async for piece in prediction]
    result = await prediction
    assert "Paris" in result.content
    assert (result.stop_reason, result.content) == ("eos", "".join(pieces))
    assert "<|im_end|>" not in result.content
    assert result.content == smollm2.detokenize(result.tokens)


async def test_special_tokens_count_as_one_only_if_parsed(smollm2: Model) -> None:
    parsed = await smollm2.complete(CAPITAL, max_tokens=1)
    plain = await smollm2.complete(CAPITAL, max_tokens=1, special=False)
    assert parsed.stats.prompt_tokens == len(smollm2.tokenize(CAPITAL, special=True))
    assert plain.stats.prompt_tokens == len(smollm2.tokenize(CAPITAL, special=False))
    assert plain.stats.prompt_tokens > parsed.stats.prompt_tokens + 8


async def test_stop_strings_cut_the_answer_where_they_stand(smollm2: Model) -> None:
    whole = (await smollm2.complete(CAPITAL, max_tokens=30)).content
    stop = whole[len(whole) // 2 :][:6]
    result = await smollm2.complete(CAPITAL, max_tokens=30, stop=[stop, "never said"])
    assert result.content == whole[: whole.index(stop)]
    assert (result.stop_reason, result.stop_string) == ("stop_string", stop)


async def test_a_response_prefix_steers_the_answer(smollm2: Model) -> None:
    prefix = "The capital of Italy is Rome, and the capital of France is"
    prediction = smollm2.complete(CAPITAL, response_prefix=prefix, max_tokens=8)
    events = [event async for event in prediction.events()]
    result = await prediction
    assert result.content.startswith(prefix + " Paris")
    first = next(event for event in events if isinstance(event, TextDelta))
    assert first.text.startswith(prefix)
    assert len(result.tokens) == result.stats.predicted_tokens < 8
    assert smollm2.detokenize(result.tokens) == result.content.removeprefix(prefix)


async def test_the_reported_seed_reproduces_an_answer(smollm2: Model) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "max_tokens": 20, "deterministic": True}
    first = await smollm2.complete("Once upon a time", **options)
    second = await smollm2.complete("Once upon a time", **options)
    again = await smollm2.complete("Once upon a time", **options, seed=first.seed)
    assert first.seed != second.seed
    assert first.tokens != second.tokens
    assert again.tokens == first.tokens


async def test_logprobs_equal_the_score_of_the_same_tokens(smollm2: Model) -> None:
    context = smollm2.create_context(context_size=512, sequences=2, threads=1)
    async with context as opened, opened.sequence() as one, opened.sequence() as other:
        result = await one.predict(CAPITAL, max_tokens=10, logprobs=3)
        await other.prefill(CAPITAL)
        scored = await other.score(result.tokens)
    assert result.logprobs is not None
    assert [entry.logprob for entry in result.logprobs] == pytest.approx(scored, abs=0.05)
    for entry in result.logprobs:
        assert entry.token == entry.top[0].token
        assert entry.text == smollm2.detokenize([entry.token], special=True)


async def test_every_sampler_makes_text(smollm2: Model) -> None:
    options: list[dict[str, Any]] = [
        {"top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"typical_p": 0.5},
        {"top_n_sigma": 1.0},
        {"xtc": Xtc(0.5)},
        {"dry": Dry()},
        {"mirostat": Mirostat(1)},
        {"mirostat": Mirostat(2)},
        {"repeat_penalty": RepeatPenalty(1.3, penalize_newline=False)},
    ]
    predictions = [
        smollm2.complete("Once upon a time", temperature=0.8, seed=1, max_tokens=12, **each)
        for each in options
    ]
    results = await asyncio.gather(*(prediction.result() for prediction in predictions))
    assert all(len(result.tokens) == 12 for result in results)
    assert all(result.content.isprintable() or "\n" in result.content for result in results)


async def test_a_penalty_ends_a_loop(smollm2: Model) -> None:
    prompt = "the cat and the cat and the cat and the cat and"
    looped = await smollm2.complete(prompt, max_tokens=24)
    assert looped.content.count(" cat") >= 6
    penalised = await smollm2.complete(prompt, max_tokens=24, repeat_penalty=1.5)
    dry = await smollm2.complete(prompt, max_tokens=24, dry=Dry(2.0))
    assert penalised.content.count(" cat") <= 2
    assert dry.content.count(" cat") < 6


@pytest.mark.parametrize("batching", [None, TokenBatching(tokens=1, interval=0)])
async def test_unicode_comes_in_whole_characters_and_graphemes(
    smollm2: Model, batching: TokenBatching | None
) -> None:
    line = "🚀👩‍👩‍👧 déjà vu 日本語 नमस्ते!"
    script = smollm2.tokenize(line)
    split = [token for token in script if "\ufffd" in smollm2.detokenize([token])]
    assert len(split) > 5

    def dictate(tokens: list[int], logits: Any) -> None:
        logits[script[len(tokens)]] = 1e6

    prediction = smollm2.complete(
        "once", logits_processor=dictate, max_tokens=len(script), token_batching=batching
    )
    pieces = [piece async for piece in prediction]
    assert "".join(pieces) == (await prediction).content == line
    assert not [piece for piece in pieces if "\ufffd" in piece]
    if batching is not None:
        assert any("👩‍👩‍👧" in piece for piece in pieces)
        assert not [piece for piece in pieces if piece.startswith("\N{ZERO WIDTH JOINER}")]


async def test_eight_at_once_are_the_eight_one_by_one(smollm2: Model) -> None:
    prompts = [f"{n} + {n} =" for n in range(1, 9)]
    options: dict[str, Any] = {"max_tokens": 8, "deterministic": True}
    together = await asyncio.gather(*(smollm2.complete(p, **options).result() for p in prompts))
    for prompt, result in zip(prompts, together, strict=True):
        assert (await smollm2.complete(prompt, **options)).tokens == result.tokens
