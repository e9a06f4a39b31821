"""From drawn tokens to text: characters, stops, the prefix, trimming and batching.

A scripted model says exactly the tokens a test wants, so the expected text is known to the byte.
"""

from __future__ import annotations

import threading
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import pytest

import llamactor
from llamactor import PredictionResult, TextDelta, TokenBatching
from tests.conftest import PATIENCE, Gate
from tests.models import (
    EOS,
    IM_END,
    IM_START,
    bpe_vocabulary,
    byte_tokens,
    spm_vocabulary,
    tiny_llama,
    tiny_scripted,
    tiny_spm,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from llamactor import Model

PROMPT = "@"
"""One token, in no script: the answer starts at the script's first token."""


class Says(Protocol):
    async def __call__(self, *parts: str | bytes | int, then: int | None = EOS) -> Model: ...


@pytest.fixture
async def says(tmp_path: Path) -> AsyncIterator[Says]:
    """Make a model that says these parts: a text or bytes that are one token, or a token's id."""
    async with AsyncExitStack() as stack:

        async def make(*parts: str | bytes | int, then: int | None = EOS) -> Model:
            vocabulary = bpe_vocabulary()
            script = [part if isinstance(part, int) else vocabulary.id(part) for part in parts]
            path = tiny_scripted(tmp_path / "scripted.gguf", script, then=then)
            loading = llamactor.load_model(path, context_size=512, sequences=2, threads=1)
            return await stack.enter_async_context(loading)

        yield make


async def say(model: Model, **options: Any) -> PredictionResult:
    """Everything the model says after the prompt."""
    return await model.complete(PROMPT, **options)


async def watch(
    model: Model, *, forced: list[int] | None = None, **options: Any
) -> tuple[list[str], PredictionResult]:
    """What each token made visible, and the result.

    The first piece is what was there before the first token, the last what only the end showed.
    Tokens are those that the model says, or `forced`, which may repeat.
    """
    texts: list[str] = []
    known = threading.Event()
    predictions: list[llamactor.Prediction] = []

    def look(tokens: list[int], logits: Any) -> None:
        assert known.wait(PATIENCE)
        texts.append(predictions[0].text)
        if forced is not None:
            logits[forced[len(tokens)] if len(tokens) < len(forced) else EOS] = 1e6

    predictions.append(model.complete(PROMPT, logits_processor=look, **options))
    known.set()
    result = await predictions[0]
    predictions.clear()  # or the callback would keep its own prediction
    texts.append(result.content)
    pieces = [new.removeprefix(old) for old, new in pairwise(["", *texts])]
    assert "".join(pieces) == result.content
    return pieces, result


def bpe_text(tokens: list[int]) -> str:
    return b"".join(bpe_vocabulary().pieces[token] for token in tokens).decode(errors="replace")


# --- characters ----------------------------------------------------------------------------------


async def test_every_token_brings_its_text_at_once(says: Says) -> None:
    pieces, result = await watch(await says("The", " old", " boat"))
    assert pieces == ["", "The", " old", " boat", ""]
    assert (result.content, result.stop_reason) == ("The old boat", "eos")


async def test_characters_split_over_tokens_come_whole(says: Says) -> None:
    model = await says("a", *byte_tokens("é€🚀")[:2], *byte_tokens("€"), "b")
    pieces, result = await watch(model)
    assert pieces == ["", "a", "", "é", "", "", "€", "b", ""]
    assert "\ufffd" not in result.content


async def test_a_token_may_end_one_character_and_begin_the_next(says: Says) -> None:
    model = await says(*byte_tokens("р"), b" \xd0", *byte_tokens(b"\xbf"))
    pieces, _ = await watch(model)
    assert pieces == ["", "", "р", " ", "п", ""]


async def test_a_character_that_never_ends_becomes_a_replacement_at_the_end(says: Says) -> None:
    pieces, result = await watch(await says("a", *byte_tokens(b"\xf0\x9f\x9a")))
    assert pieces == ["", "a", "", "", "", "\ufffd"]
    assert result.tokens == [bpe_vocabulary().id("a"), *byte_tokens(b"\xf0\x9f\x9a")]


async def test_bytes_that_are_no_text_become_replacements_where_they_stand(says: Says) -> None:
    result = await say(await says("a", *byte_tokens(b"\xff\xe2\x82"), "b"))
    assert result.content == "a\ufffd\ufffdb" == b"a\xff\xe2\x82b".decode(errors="replace")


async def test_text_of_any_bytes_is_their_lossy_text(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "bytes.gguf", speaks="bytes")
    async with llamactor.load_model(path, context_size=1024, threads=1) as model:
        for seed in range(4):
            prediction = model.complete("a", max_tokens=200, temperature=3.0, top_k=None, seed=seed)
            pieces = [piece async for piece in prediction]
            result = await prediction
            assert "".join(pieces) == result.content == bpe_text(result.tokens)


async def test_a_sentencepiece_model_keeps_its_spaces_and_joins_byte_tokens(tmp_path: Path) -> None:
    path = tiny_spm(tmp_path / "spm.gguf", speaks="bytes")
    pieces = spm_vocabulary().pieces
    async with llamactor.load_model(path, context_size=512, threads=1) as model:
        result = await model.complete("the", max_tokens=200, temperature=2.0, top_k=None, seed=1)
        data = b"".join(pieces[token] for token in result.tokens)
        assert result.content == data.decode(errors="replace")


async def test_control_tokens_in_the_answer_are_tokens_but_no_text(says: Says) -> None:
    result = await say(await says("a", IM_START, "b"))
    assert result.content == "ab"
    assert IM_START in result.tokens


# --- stops ---------------------------------------------------------------------------------------


async def test_a_stop_string_ends_the_answer_and_is_left_out(says: Says) -> None:
    result = await say(await says("The", " old", " boat", " came"), stop=" boat")
    assert (result.content, result.stop_reason) == ("The old", "stop_string")
    assert result.stop_string == " boat"
    assert len(result.tokens) == result.stats.predicted_tokens == 3


async def test_without_a_stop_there_is_no_stop_string(says: Says) -> None:
    result = await say(await says("The", " old"), stop=["boat"])
    assert (result.content, result.stop_reason, result.stop_string) == ("The old", "eos", None)


async def test_a_stop_string_is_found_across_tokens_and_inside_of_one(says: Says) -> None:
    model = await says("The", " old", " boat", " came")
    result = await say(model, stop=["d bo"])
    assert (result.content, result.stop_string) == ("The ol", "d bo")
    assert len(result.tokens) == 3
    result = await say(model, stop="ld bo")
    assert (result.content, result.stop_string) == ("The o", "ld bo")


async def test_what_may_become_a_stop_is_held_back_until_it_cannot(says: Says) -> None:
    pieces, result = await watch(await says("a", "b", "c", "d"), stop="abx")
    assert pieces == ["", "", "", "abc", "d", ""]
    assert result.stop_reason == "eos"


async def test_held_back_text_is_flushed_at_the_end_whatever_the_end(says: Says) -> None:
    model = await says("a", "b", "c", "d")
    pieces, result = await watch(model, stop="cde")
    assert (pieces, result.stop_reason) == (["", "a", "b", "", "", "cd"], "eos")
    result = await say(model, stop="bcd", max_tokens=3)
    assert (result.content, result.stop_reason, result.stop_string) == ("abc", "max_tokens", None)
    prediction = model.complete(PROMPT, stop="bcd", max_tokens=3)
    assert "".join([piece async for piece in prediction]) == "abc"


async def test_held_back_text_is_flushed_by_a_cancel(says: Says, gate: Gate) -> None:
    prediction = (await says("a", "b", "c")).complete(PROMPT, stop="bcd", logits_processor=gate)
    gate.allow(2)
    for _ in range(3):
        await gate.reached()
    assert prediction.text == "a"
    prediction.cancel()
    gate.open()
    result = await prediction
    assert result.stop_reason == "cancelled"
    assert result.content == bpe_text(result.tokens)
    assert result.content.startswith("ab")


async def test_a_stop_string_is_found_in_characters_split_over_tokens(says: Says) -> None:
    model = await says("x", *byte_tokens("🚀"), "y")
    result = await say(model, stop="🚀")
    assert (result.content, result.stop_string) == ("x", "🚀")
    assert len(result.tokens) == 5


async def test_part_of_a_character_is_held_back_beside_a_possible_stop(says: Says) -> None:
    model = await says("a", *byte_tokens("é"), "b")
    pieces, result = await watch(model, stop="éx")
    assert pieces == ["", "a", "", "", "éb", ""]
    assert result.stop_reason == "eos"


async def test_the_stop_that_starts_first_wins(says: Says) -> None:
    model = await says("a", "b", "c", "d")
    result = await say(model, stop=["bc", "abcd"])
    assert (result.content, result.stop_string) == ("", "abcd")
    result = await say(model, stop=["abcx", "bc"])
    assert (result.content, result.stop_string) == ("a", "bc")


async def test_a_stop_that_waits_for_a_longer_one_counts_at_the_end(says: Says) -> None:
    result = await say(await says("a", "b", "c"), stop=["bc", "abcd"])
    assert (result.content, result.stop_reason, result.stop_string) == ("a", "stop_string", "bc")


async def test_a_token_list_stops_with_its_last_token(says: Says) -> None:
    vocabulary = bpe_vocabulary()
    model = await says("The", " old", " boat", " came")
    stop = [vocabulary.id(" old"), vocabulary.id(" boat")]
    pieces, result = await watch(model, stop=[stop])
    assert pieces == ["", "The", "", ""]
    assert (result.content, result.stop_reason) == ("The", "stop_string")
    assert result.stop_string == " old boat"
    assert result.tokens[-2:] == stop


async def test_a_token_list_is_told_from_the_same_text_in_other_tokens(says: Says) -> None:
    model = await says("T", "h", "e", "!")
    result = await say(model, stop=[[bpe_vocabulary().id("The")]])
    assert (result.content, result.stop_reason) == ("The!", "eos")
    assert (await say(model, stop="The")).content == ""


async def test_a_control_token_can_be_a_stop(says: Says) -> None:
    result = await say(await says("a", IM_START, "b"), stop=[[IM_START]])
    assert (result.content, result.stop_reason) == ("a", "stop_string")
    assert result.stop_string == "<|im_start|>"


async def test_strings_and_token_lists_mix(says: Says) -> None:
    model = await says("a", "b", "c", "d")
    mixed = [byte_tokens("d"), "c"]
    assert (await say(model, stop=mixed)).stop_string == "c"
    assert (await say(model, stop=[byte_tokens("b"), "c"])).stop_string == "b"


async def test_no_stop_matches_in_the_prompt(says: Says) -> None:
    result = await say(await says("a", "b"), stop="@")
    assert (result.content, result.stop_reason) == ("ab", "eos")


# --- response prefix -----------------------------------------------------------------------------


async def test_the_prefix_is_content_and_comes_before_the_first_token(says: Says) -> None:
    pieces, result = await watch(await says("a", "b", "c"), response_prefix="Well: ")
    assert pieces == ["Well: ", "a", "b", "c", ""]
    assert result.content == "Well: abc"
    assert result.tokens == byte_tokens("abc")


@pytest.mark.parametrize("as_tokens", [False, True])
async def test_the_model_goes_on_from_the_prefix(says: Says, as_tokens: bool) -> None:
    model = await says("a", "b", "c", "d")
    prompt = byte_tokens(PROMPT) if as_tokens else PROMPT
    result = await model.complete(prompt, response_prefix=".b")
    assert result.content == ".bcd"
    assert result.stats.prompt_tokens == model.count_tokens(PROMPT + ".b")


@pytest.mark.parametrize("as_tokens", [False, True])
async def test_a_prefix_after_tokens_goes_on_without_a_space(
    tmp_path: Path, as_tokens: bool
) -> None:
    path = tiny_spm(tmp_path / "spm.gguf")
    async with (
        llamactor.load_model(path, context_size=256, sequences=1, threads=1) as model,
        model.create_context(context_size=256, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        prompt = model.tokenize("the sea", add_bos=True) if as_tokens else "the sea"
        result = await sequence.predict(prompt, response_prefix="side", max_tokens=1)
        assert result.content.startswith("side")
        evaluated = sequence.tokens[: result.stats.prompt_tokens]
        assert model.detokenize(evaluated) == " the seaside"


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("as_tokens", [False, True])
async def test_special_tokens_of_a_prefix_are_parsed_as_those_of_the_prompt(
    tiny_model: Model, as_tokens: bool, special: bool
) -> None:
    prompt = byte_tokens("a") if as_tokens else "a"
    async with (
        tiny_model.create_context(context_size=256, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        await sequence.predict(
            prompt, response_prefix="<|im_start|>b", special=special, max_tokens=1
        )
        assert (IM_START in sequence.tokens) is special


async def test_the_prefix_is_streamed_first(says: Says) -> None:
    model = await says("a", "b")
    prediction = model.complete(PROMPT, response_prefix="Well: ")
    reader = aiter(prediction)
    assert (await anext(reader)).startswith("Well: ")
    deltas = [event async for event in prediction.events() if isinstance(event, TextDelta)]
    assert "".join(delta.text for delta in deltas) == "Well: ab"
    assert [token for delta in deltas for token in delta.tokens] == byte_tokens("ab")


async def test_no_stop_matches_in_the_prefix(says: Says) -> None:
    model = await says("a", "b", "c")
    result = await say(model, response_prefix="c: ", stop="c")
    assert (result.content, result.stop_string) == ("c: ab", "c")


# --- trimming ------------------------------------------------------------------------------------


async def test_trailing_whitespace_stays_unless_asked(says: Says) -> None:
    model = await says("a", "\n", " ")
    assert (await say(model)).content == "a\n "
    assert (await say(model, trim_trailing_whitespace=True)).content == "a"


async def test_whitespace_is_held_until_more_text_comes(says: Says) -> None:
    pieces, result = await watch(
        await says("a", " ", "\n", "b", "\t"), trim_trailing_whitespace=True
    )
    assert pieces == ["", "a", "", "", " \nb", "", ""]
    assert len(result.tokens) == 5


async def test_whitespace_before_a_stop_is_trimmed_too(says: Says) -> None:
    model = await says("a", "\n", "b")
    assert (await say(model, stop="b", trim_trailing_whitespace=True)).content == "a"
    assert (await say(model, stop="b")).content == "a\n"


async def test_white_space_of_unicode_counts(says: Says) -> None:
    model = await says("a", *byte_tokens("\N{EM SPACE}"))
    assert (await say(model, trim_trailing_whitespace=True)).content == "a"


async def test_the_prefix_is_trimmed_if_nothing_follows(says: Says) -> None:
    model = await says("\n", "\t")
    result = await say(model, response_prefix="Well: ", trim_trailing_whitespace=True)
    assert result.content == "Well:"


# --- batching ------------------------------------------------------------------------------------

LATE = 1e6
"""Seconds nobody waits for: only the number of tokens makes a piece."""


async def test_a_piece_gathers_so_many_tokens(says: Says) -> None:
    model = await says(*"abcdefgh")
    pieces, result = await watch(model, token_batching=TokenBatching(tokens=3, interval=LATE))
    # The last letter waits: an accent could follow.
    assert pieces == ["", "", "", "ab", "", "", "cde", "", "", "fgh"]
    assert result.content == "abcdefgh"


async def test_the_tail_is_flushed_however_it_ends(says: Says) -> None:
    model = await says(*"abcdefgh")
    batching = TokenBatching(tokens=100, interval=LATE)
    result = await say(model, token_batching=batching)
    assert result.content == "abcdefgh"
    result = await say(model, token_batching=batching, max_tokens=2)
    assert result.content == "ab"
    result = await say(model, token_batching=batching, stop="d")
    assert result.content == "abc"
    prediction = model.complete(PROMPT, token_batching=batching)
    assert "".join([piece async for piece in prediction]) == "abcdefgh"


async def test_an_interval_of_zero_makes_every_token_a_piece(says: Says) -> None:
    pieces, _ = await watch(
        await says(*"abcd"), token_batching=TokenBatching(tokens=100, interval=0)
    )
    assert pieces == ["", "", "a", "b", "c", "d"]


FAMILY = "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"
ACCENTED = "e\N{COMBINING ACUTE ACCENT}\N{COMBINING CEDILLA}"
FLAGS = "\N{REGIONAL INDICATOR SYMBOL LETTER D}\N{REGIONAL INDICATOR SYMBOL LETTER E}"


@pytest.mark.parametrize("grapheme", [FAMILY, ACCENTED, FLAGS, "\r\n", "👍🏽"])
async def test_pieces_never_split_a_grapheme(tiny_model: Model, grapheme: str) -> None:
    batching = TokenBatching(tokens=1, interval=0)
    forced = byte_tokens(f"a{grapheme}{grapheme}!")
    pieces, result = await watch(tiny_model, forced=forced, token_batching=batching)
    assert [piece for piece in pieces if piece] == ["a", grapheme, grapheme, "!"]
    assert result.tokens == forced


# --- special tokens in prompts -------------------------------------------------------------------


async def test_raw_prompts_parse_special_tokens_unless_told_not_to(tiny_model: Model) -> None:
    prompt = "<|im_start|>user"
    parsed = await tiny_model.complete(prompt, max_tokens=1)
    plain = await tiny_model.complete(prompt, max_tokens=1, special=False)
    assert parsed.stats.prompt_tokens == len(tiny_model.tokenize(prompt, special=True))
    assert plain.stats.prompt_tokens == len(tiny_model.tokenize(prompt, special=False))
    assert parsed.stats.prompt_tokens < plain.stats.prompt_tokens


async def test_the_sequence_holds_what_the_prompt_was_parsed_to(tiny_model: Model) -> None:
    async with tiny_model.create_context(context_size=256, sequences=2, threads=1) as context:
        for special in (True, False):
            async with context.sequence() as sequence:
                await sequence.predict("<|im_end|>a", max_tokens=1, special=special)
                assert (IM_END in sequence.tokens) is special
