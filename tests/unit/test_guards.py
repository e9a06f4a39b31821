"""What would kill the process inside llama.cpp is refused or avoided before the call."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor import (
    ContextOverflowError,
    DecodeError,
    Dry,
    DynamicTemperature,
    Mirostat,
    Model,
    ModelLoadError,
    ModelNotFoundError,
    RepeatPenalty,
    UnsupportedError,
    Xtc,
    load_model,
)
from llamactor.options import KV_TYPES
from tests import models as gguf
from tests.conftest import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

MIB = 1024 * 1024
SIZE = gguf.VOCAB_SIZE
TOKENS = list(range(300, 900))

MAKERS: dict[str, Callable[[Path], Path]] = {
    "attention": gguf.tiny_llama,
    "sliding_window": gguf.tiny_sliding_window,
    "recurrent": gguf.tiny_recurrent,
    "hybrid": gguf.tiny_hybrid,
    "hybrid_rollback": gguf.tiny_hybrid_rollback,
}


@pytest.fixture(scope="session")
def made(models: Path) -> dict[str, Path]:
    """One file of each kind of memory."""
    return {name: make(models / f"guard-{name}.gguf") for name, make in MAKERS.items()}


@pytest.fixture(params=["bpe", "spm"])
async def vocabulary(request: pytest.FixtureRequest, models: Path) -> AsyncIterator[Model]:
    """A model of each kind of tokenizer."""
    make = gguf.tiny_llama if request.param == "bpe" else gguf.tiny_spm
    path = make(models / f"guard-{request.param}.gguf")
    async with load_model(path, context_size=256, threads=1) as model:
        yield model


# --- sizes of contexts and batches ----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 100, 255, 257])
@pytest.mark.parametrize("unified", [True, False])
async def test_a_small_context_is_filled_to_the_last_cell(
    tiny_model: Model, size: int, unified: bool
) -> None:
    options: Any = {"context_size": size, "sequences": 1, "threads": 1, "kv_unified": unified}
    async with tiny_model.create_context(**options) as context, context.sequence() as sequence:
        size = context.context_size
        result = await sequence.predict(TOKENS[:size])
        assert (result.stop_reason, result.stats.prompt_tokens) == ("context_full", size)
        with pytest.raises(ContextOverflowError, match=str(size)):
            await sequence.predict(TOKENS[: size + 1])
        for overflow in ("rolling_window", "truncate_middle", "stop_at_limit"):
            long = await sequence.predict(TOKENS[:size], max_tokens=20, overflow=overflow)
            assert long.tokens
        assert len(sequence.tokens) <= size


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"batch_size": 1}, 1),
        ({"ubatch_size": 1}, 1),
        ({"batch_size": 16, "ubatch_size": 4}, 16),
        ({"batch_size": 512}, 64),
        ({"ubatch_size": 1000}, 64),
        ({"batch_size": 2**31 - 1, "ubatch_size": 2**31 - 1}, 64),
    ],
)
async def test_batches_are_never_larger_than_the_context(
    tiny_model: Model, given: dict[str, int], size: int
) -> None:
    options: Any = {"context_size": 64, "sequences": 4, "threads": 1, **given}
    async with tiny_model.create_context(**options) as context:
        assert context._native.info()["batch_size"] == size
        async with context.sequence() as one, context.sequence() as two:
            results = await asyncio.gather(
                one.predict(TOKENS[:30], max_tokens=1), two.predict(TOKENS[40:60], max_tokens=1)
            )
        assert [len(result.tokens) for result in results] == [1, 1]
        assert context.stats.prompt_tokens == 50


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256])
async def test_prompts_at_the_edges_of_batches_are_evaluated_once(
    tiny_model: Model, length: int
) -> None:
    options: Any = {"context_size": 256, "sequences": 1, "threads": 1}
    async with (
        tiny_model.create_context(batch_size=64, ubatch_size=32, **options) as context,
        context.sequence() as sequence,
    ):
        assert await sequence.prefill(TOKENS[:length]) == length
        assert sequence.tokens == TOKENS[:length]
        assert context.stats.evaluated_tokens == length


async def test_scoring_more_places_than_one_call_has_outputs(tiny_model: Model) -> None:
    tokens = (TOKENS * 3)[:1500]
    async with (
        tiny_model.create_context(context_size=1501, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        await sequence.prefill([299])
        scores = await sequence.score(tokens)
    assert len(scores) == len(tokens)
    assert all(math.isfinite(score) and score < 0 for score in scores)


async def test_256_sequences_in_one_context(tiny_model: Model) -> None:
    async with tiny_model.create_context(context_size=1024, sequences=256, threads=1) as context:
        sequences = [await context.sequence(timeout=0) for _ in range(256)]
        assert context.try_sequence() is None
        results = await asyncio.gather(
            *(
                sequence.predict([300 + i, 301], max_tokens=2)
                for i, sequence in enumerate(sequences)
            )
        )
        assert all(len(result.tokens) == 2 for result in results)
        assert {sequence.id for sequence in sequences} == set(range(256))
        for sequence in sequences:
            await sequence.aclose()


async def test_threads_beyond_the_processors_do_not_stall(tiny_model: Model) -> None:
    options: Any = {"context_size": 64, "sequences": 1, "threads": 64, "threads_batch": 512}
    async with tiny_model.create_context(**options) as context, context.sequence() as sequence:
        info = context._native.info()
        processors = len(os.sched_getaffinity(0))
        assert max(info["threads"], info["threads_batch"]) <= processors  # type: ignore[call-overload]
        async with asyncio.timeout(PATIENCE):
            assert len((await sequence.predict(TOKENS[:4], max_tokens=2)).tokens) == 2


HUGE = """
import asyncio, resource, sys
import llamactor

async def main(path, options):
    async with llamactor.load_model(path, context_size=64, sequences=1, threads=1) as model:
        try:
            await model.create_context(threads=1, **options)
        except llamactor.InsufficientMemoryError as error:
            print(error)
        assert (await model.complete("once", max_tokens=2)).tokens

resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
asyncio.run(main(sys.argv[1], eval(sys.argv[2])))
"""


@pytest.mark.parametrize(
    "options",
    [
        {"context_size": 2**31 - 1},
        {"context_size": 2**31 - 1, "sequences": 256, "kv_unified": False},
        {"context_size": 2**26, "sequences": 1},
    ],
    ids=str,
)
def test_a_context_larger_than_memory_is_refused(
    tiny_model_path: Path, options: dict[str, int]
) -> None:
    """In a process of its own with little memory: a wrong guess must not bring others down."""
    command = [sys.executable, "-c", HUGE, str(tiny_model_path), repr(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(options["context_size"]) in done.stdout


@pytest.mark.parametrize("kind", KV_TYPES)
@pytest.mark.parametrize("attention", ["auto", "on", "off"])
async def test_every_type_of_cache_works_or_is_refused(
    tiny_model: Model, kind: str, attention: Any
) -> None:
    given: Any = {"context_size": 128, "sequences": 2, "threads": 1, "flash_attention": attention}
    values = kind if attention != "off" else "f16"
    async with (
        tiny_model.create_context(kv_type_k=kind, kv_type_v=values, **given) as context,
        context.sequence() as sequence,
    ):
        assert len((await sequence.predict(TOKENS[:40], max_tokens=4)).tokens) == 4
        await sequence.shift(2, 10)
        assert len(await sequence.score(TOKENS[:5])) == 5


async def test_heads_that_a_type_of_cache_cannot_split_are_unsupported(tmp_path: Path) -> None:
    path = gguf.tiny_llama(tmp_path / "narrow.gguf", width=32, heads=2)
    async with load_model(path, context_size=64, threads=1) as model:
        with pytest.raises(UnsupportedError, match="q8_0"):
            await model.create_context(context_size=64, kv_type_k="q8_0")
        assert (await model.complete("once", max_tokens=2)).tokens


# --- tokens and sequences -------------------------------------------------------------------------


async def test_tokens_outside_of_the_vocabulary_stop_at_the_core(tiny_model: Model) -> None:
    """Below the checks in Python: the core has its own."""
    native = tiny_model._native
    for token in (-1, SIZE, 2**31 - 1, -(2**31)):
        assert not native.is_eog(token)
        with pytest.raises(ValueError, match=str(token)):
            native.detokenize([token], True)
    async with (
        tiny_model.create_context(context_size=64, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        sequence._model = _AnyToken()  # type: ignore[assignment]
        for token in (-1, SIZE):
            with pytest.raises(ValueError, match=str(token)):
                await sequence.score([token])
            with pytest.raises(ValueError, match=str(token)):
                await sequence.prefill([token])
        assert await sequence.prefill([300]) == 1


class _AnyToken:
    """A vocabulary that lets everything through Python's checks."""

    def vocab_size(self) -> int:
        return 2**32


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "split"])
async def test_every_change_of_every_memory(
    made: dict[str, Path], kind: str, unified: bool
) -> None:
    """Forks, cuts, shifts and rolling on memories that cannot do some of it by themselves."""
    options: Any = {"context_size": 512, "sequences": 3, "threads": 1, "kv_unified": unified}
    options["swa_full"] = kind != "sliding_window"
    async with (
        load_model(made[kind], context_size=64, sequences=1, threads=1) as model,
        model.create_context(**options) as context,
        context.sequence() as sequence,
    ):
        await sequence.prefill(TOKENS[:150])
        await sequence.shift(1, 20)
        assert sequence.tokens == TOKENS[:1] + TOKENS[21:150]
        await sequence.erase([(0, 1), (5, 10), (120, 130)])
        left = TOKENS[21:150]
        assert sequence.tokens == left[:4] + left[9:119]
        branch = await sequence.fork()
        assert branch.tokens == sequence.tokens
        await branch.predict(branch.tokens[:50], max_tokens=3)
        await sequence.clear()
        assert len(await branch.score(TOKENS[:40])) == 40
        await branch.predict(TOKENS[:60], max_tokens=600, overflow="rolling_window")
        await sequence.predict(TOKENS, max_tokens=5, overflow="truncate_middle")
        await branch.aclose()


async def test_changes_that_no_longer_fit_are_refused_when_their_turn_comes(
    tiny_model: Model,
) -> None:
    """The lengths were checked at the call; the sequence was shorter by the time it ran."""
    async with (
        tiny_model.create_context(context_size=256, sequences=1, threads=1) as context,
        context.sequence() as sequence,
    ):
        await sequence.prefill(TOKENS[:100])
        outcomes = await asyncio.gather(
            sequence.erase([(0, 60)]),
            sequence.erase([(50, 100)]),
            sequence.shift(10, 90),
            sequence.erase([(20, 100)]),
            return_exceptions=True,
        )
        assert outcomes[0] is None
        assert all(outcome is None or isinstance(outcome, ValueError) for outcome in outcomes)
        assert set(sequence.tokens) <= set(TOKENS[60:100])
        assert len(await sequence.score(TOKENS[:10])) == 10


# --- samplers -------------------------------------------------------------------------------------

NEVER: dict[int | str, Any] = dict.fromkeys(range(SIZE), "never")

GREAT = 3.4e38

SAMPLERS: dict[str, dict[str, Any]] = {
    "one candidate": {"top_k": 1},
    "all candidates": {"top_k": None},
    "more candidates than tokens": {"top_k": 2**31 - 1},
    "a hair of probability": {"top_p": 1e-30},
    "only the best": {"min_p": 1.0},
    "hardly typical": {"typical_p": 1e-30},
    "no deviation": {"top_n_sigma": 1e-30},
    "great deviation": {"top_n_sigma": GREAT},
    "always exclude": {"xtc": Xtc(1.0, 0.0)},
    "exclude and keep one": {"xtc": Xtc(1.0, 0.0), "top_k": 1},
    "great temperature": {"temperature": GREAT},
    "tiny temperature": {"temperature": 1e-38},
    "dynamic from zero": {"dynamic_temperature": DynamicTemperature(1.0)},
    "dynamic and great": {"dynamic_temperature": DynamicTemperature(GREAT / 4, 100.0)},
    "dynamic with one candidate": {"dynamic_temperature": DynamicTemperature(0.5), "top_k": 1},
    "mirostat 1": {"mirostat": Mirostat(1, tau=1e-9, eta=1e9)},
    "mirostat 2": {"mirostat": Mirostat(2, tau=1e-9, eta=1e9)},
    "mirostat 2 with great surprise": {"mirostat": Mirostat(2, tau=1e30)},
    "great dry": {"dry": Dry(GREAT, 1e30, 0, breakers=("x" * 40, "\ufffd", "😀"))},
    "dry without breakers": {"dry": Dry(breakers=())},
    "great penalty": {"repeat_penalty": GREAT},
    "tiny penalty": {"repeat_penalty": 2e-38},
    "filter that lets all be punished": {
        "repeat_penalty": RepeatPenalty(2.0, punish_tokens_filter=lambda _: [*range(SIZE)] * 3)
    },
    "no sampler": {"sampler_order": []},
    "every sampler": {
        "top_n_sigma": 1.0,
        "typical_p": 0.5,
        "xtc": Xtc(0.5, 0.1),
        "dry": Dry(),
        "repeat_penalty": 1.1,
        "min_p": 0.1,
        "top_p": 0.9,
    },
    "great biases": {"logit_bias": dict.fromkeys(range(SIZE), GREAT)},
    "great negative biases": {"logit_bias": dict.fromkeys(range(SIZE), -GREAT)},
    "all but one never": {"logit_bias": NEVER | {500: 0.0}},
    "all log-probabilities": {"logprobs": SIZE, "logit_bias": {500: "never"}},
}


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_samplers_at_their_edges_draw_a_token(
    tiny_model: Model, options: dict[str, Any], temperature: float
) -> None:
    given = {"temperature": temperature, "seed": 1, "max_tokens": 6, **options}
    result = await tiny_model.complete("once upon a time", **given)
    assert len(result.tokens) == 6
    assert all(0 <= token < SIZE for token in result.tokens)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_when_no_token_is_possible_the_prediction_fails(
    tiny_model: Model, temperature: float
) -> None:
    prediction = tiny_model.complete("once", logit_bias=NEVER, temperature=temperature)
    with pytest.raises(DecodeError, match="no token"):
        await prediction
    assert (await tiny_model.complete("once", max_tokens=2)).tokens


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
async def test_a_processor_that_leaves_nothing_fails_its_prediction(
    tiny_model: Model, temperature: float, value: float
) -> None:
    def spoil(tokens: list[int], logits: memoryview[float]) -> None:
        for i in range(len(logits)):
            logits[i] = value

    with pytest.raises(DecodeError, match="no token"):
        await tiny_model.complete("once", logits_processor=spoil, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [math.nan, -math.inf, GREAT, math.inf, 0.0])
async def test_a_processor_that_spoils_half_leaves_the_rest(
    tiny_model: Model, temperature: float, value: float
) -> None:
    def spoil(tokens: list[int], logits: memoryview[float]) -> None:
        for i in range(0, len(logits), 2):
            logits[i] = value

    options: Any = {"logits_processor": spoil, "temperature": temperature, "max_tokens": 4}
    tokens = (await tiny_model.complete("once", **options)).tokens
    assert len(tokens) == 4
    if math.isnan(value) or value == -math.inf:
        assert all(token % 2 for token in tokens)


@pytest.mark.parametrize("token", [-1, SIZE, 2**31 - 1, -(2**31)])
async def test_a_filter_that_returns_no_token_fails_its_prediction(
    tiny_model: Model, token: int
) -> None:
    penalty = RepeatPenalty(2.0, punish_tokens_filter=lambda _: [token])
    with pytest.raises(ValueError, match=f"is {token}; it must be from 0 to {SIZE - 1}"):
        await tiny_model.complete("once", repeat_penalty=penalty)


# --- long texts -----------------------------------------------------------------------------------

TEXTS = {
    "letters": "a",
    "capitals": "A",
    "spaces": " ",
    "tabs": "\t",
    "lines": "\n",
    "line_ends": "\r\n",
    "digits": "1",
    "dots": ".",
    "shortened_words": "'s",
    "emoji": "😀",
    "families": "👨\u200d👩\u200d👧",
    "combining_marks": "\u0301",
    "chinese": "字",
    "arabic": "ا",
    "byte_order_marks": "\ufeff",
    "NUL": "\0",
    "special_tokens": "<|im_start|>",
    "all_sorts": "aé1 字😀\n",
}


def repeated(text: str, size: int) -> str:
    return text * (size // len(text.encode()))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
async def test_much_of_one_thing_is_tokenised(vocabulary: Model, text: str) -> None:
    """Regular expressions recurse in some tokenisers, and some take quadratic time."""
    long = repeated(text, MIB)
    async with asyncio.timeout(PATIENCE):
        tokens = await asyncio.to_thread(vocabulary.tokenize, long)
        assert await asyncio.to_thread(vocabulary.detokenize, tokens) == long
        prediction = vocabulary.complete(long)
        with pytest.raises(ContextOverflowError, match=r"prompt has \d{4,} tokens.*256"):
            await prediction


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
async def test_much_of_one_thing_is_tokenised_by_the_default_model(text: str) -> None:
    long = repeated(text, MIB)
    async with load_model("smollm2", vocab_only=True) as model, asyncio.timeout(PATIENCE):
        tokens = await asyncio.to_thread(model.tokenize, long)
        assert await asyncio.to_thread(model.detokenize, tokens) == long
        assert await asyncio.to_thread(model.tokenize, long, special=True)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a", " "], ids=["letters", "spaces"])
async def test_the_longest_text_is_tokenised(vocabulary: Model, text: str) -> None:
    long = repeated(text, 16 * MIB)
    async with asyncio.timeout(2 * PATIENCE):
        assert await asyncio.to_thread(vocabulary.count_tokens, long) >= MIB


PRE_TOKENIZER: Any = {"tokenizer.ggml.pre": "gpt-4o"}
"""Its regular expressions call themselves for each character of a match."""


async def test_a_run_that_would_overflow_the_stack_is_tokenised_or_refused(
    tiny_model_path: Path,
) -> None:
    options: Any = {"context_size": 64, "sequences": 1, "metadata_overrides": PRE_TOKENIZER}
    async with load_model(tiny_model_path, **options) as model:
        for text in ("a", " ", "."):
            long = text * 200_000
            assert model.detokenize(model.tokenize(long)) == long
            prediction = model.complete(long)
            with pytest.raises(ContextOverflowError, match=r"prompt has \d{5,} tokens.*64"):
                await prediction
            with pytest.raises(ValueError, match=r"300000 characters of one kind.*262144"):
                model.tokenize(text * 300_000)
        prediction = model.complete("a" * 300_000)
        with pytest.raises(ValueError, match="262144"):
            await prediction
        assert model.count_tokens("a b. " * 60_000) > 60_000


async def test_a_byte_that_llama_cpp_would_not_get_past_is_refused(tiny_model_path: Path) -> None:
    overrides: Any = {"tokenizer.ggml.model": "rwkv"}
    async with load_model(tiny_model_path, vocab_only=True, metadata_overrides=overrides) as model:
        assert model.tokenize("the sea")
        with pytest.raises(ValueError, match="no token for byte 0xC5"):
            model.tokenize("\u0172")


async def test_a_pre_tokenizer_that_lets_spaces_through_to_byte_pairs_is_refused(
    tiny_model_path: Path,
) -> None:
    overrides: Any = {"tokenizer.ggml.pre": "whitespace"}
    with pytest.raises(ModelLoadError, match=r"tokenizer\.ggml\.pre"):
        await load_model(tiny_model_path, vocab_only=True, metadata_overrides=overrides)


async def test_control_characters_and_half_characters_survive_tokenising(
    vocabulary: Model,
) -> None:
    text = "".join(map(chr, range(0x20))) + "\x7f\x80\x9f\ufffd\ufffe\uffff\U0010ffff"
    assert vocabulary.detokenize(vocabulary.tokenize(text)) == text
    for token in range(vocabulary.info.vocab_size):
        assert isinstance(vocabulary.detokenize([token], special=True), str)


# --- files ----------------------------------------------------------------------------------------


async def test_a_vocabulary_alone_does_all_but_generate(tiny_model_path: Path) -> None:
    async with load_model(tiny_model_path, vocab_only=True) as model:
        assert model.info.vocab_only
        assert model.detokenize(model.tokenize("the sea")) == "the sea"
        assert model.count_tokens("the sea") == len(model.tokenize("the sea"))
        assert model.metadata["general.architecture"] == "llama"
        assert model.tokens.eos == gguf.EOS
        with pytest.raises(UnsupportedError, match="vocab_only"):
            _ = model.complete("once")
        with pytest.raises(UnsupportedError, match="vocab_only"):
            await model.create_context()


@pytest.mark.parametrize(
    "options",
    [
        {"use_mmap": False},
        {"use_mlock": True},
        {"use_mmap": False, "use_mlock": True},
        {"check_tensors": True},
        {"check_tensors": True, "use_mmap": False},
        {"devices": []},
        {"devices": ["CPU"]},
        {"gpu_layers": 0},
        {"gpu_layers": 2**31 - 1, "split_mode": "row"},
        {"main_gpu": 2**31 - 1, "split_mode": "none"},
        {"tensor_split": [GREAT] * 4},
    ],
    ids=str,
)
async def test_every_way_to_load_gives_the_same_model(
    tiny_model: Model, tiny_model_path: Path, options: dict[str, Any]
) -> None:
    usual = await tiny_model.complete("once upon a time", max_tokens=8)
    async with load_model(tiny_model_path, context_size=256, threads=1, **options) as model:
        again = await model.complete("once upon a time", max_tokens=8)
    assert again.content == usual.content


async def test_damaged_weights_are_found_or_fail_the_prediction(tmp_path: Path) -> None:
    path = gguf.tiny_llama(tmp_path / "nan.gguf")
    with path.open("r+b") as file:
        file.seek(-4 * 64, os.SEEK_END)
        file.write(struct.pack("<64f", *[math.nan] * 64))
    with pytest.raises(ModelLoadError, match=r"nan\.gguf"):
        await load_model(path, check_tensors=True)
    async with load_model(path, context_size=64, threads=1) as model:
        with pytest.raises(DecodeError, match="NaN"):
            await model.complete("once upon a time")


async def test_a_split_model_without_one_of_its_parts_is_refused(tmp_path: Path) -> None:
    parts = gguf.tiny_split(tmp_path)
    content = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises((ModelLoadError, ModelNotFoundError), match="00002-of-00003"):
        await load_model(parts[0])
    for wrong in (b"", content[:1000], parts[2].read_bytes()):
        parts[1].write_bytes(wrong)
        with pytest.raises(ModelLoadError, match="00002-of-00003"):
            await load_model(parts[0])
    parts[1].write_bytes(content)
    async with load_model(parts[0], context_size=64, threads=1) as model:
        assert (await model.complete("once", max_tokens=2)).tokens


OVERRIDES: list[dict[str, Any]] = [
    {"llama.block_count": 3},
    {"llama.block_count": 5},
    {"llama.attention.head_count_kv": 0},
    {"llama.attention.head_count_kv": 3},
    {"llama.attention.key_length": 7},
    {"llama.attention.value_length": 2**31},
    {"llama.rope.dimension_count": 1},
    {"llama.rope.freq_base": 0.0},
    {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 0.0},
    {"llama.attention.layer_norm_rms_epsilon": -1.0},
    {"llama.attention.layer_norm_rms_epsilon": GREAT},
    {"llama.attention.layer_norm_epsilon": -1.0},
    {"llama.expert_count": 8, "llama.expert_used_count": 2},
    {"llama.feed_forward_length": 0},
    {"llama.vocab_size": 5},
    {"llama.vocab_size": 2**31},
    {"llama.pooling_type": 99},
    {"llama.attention.causal": False},
    {"llama.attention.sliding_window": 4},
    {"llama.nextn_predict_layers": 3},
    {"llama.n_deepstack_layers": 3},
    {"llama.logit_scale": 0.0},
    {"tokenizer.ggml.bos_token_id": 10**9},
    {"tokenizer.ggml.eos_token_id": -5},
    {"tokenizer.ggml.add_bos_token": True},
    {"tokenizer.ggml.model": "llama"},
    {"tokenizer.ggml.model": "bert"},
    {"tokenizer.ggml.model": "t5"},
    {"tokenizer.ggml.model": "rwkv"},
    {"tokenizer.ggml.model": "plamo2"},
    {"tokenizer.ggml.pre": "default"},
    {"tokenizer.ggml.pre": "nonsense"},
    {"general.alignment": 0},
    {"general.file_type": 99},
    {"general.type": "adapter"},
    {"key.that.nobody": "knows"},
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=str)
async def test_no_override_kills(tiny_model_path: Path, overrides: dict[str, Any]) -> None:
    """Whatever is not refused while loading must be answered, or fail in a typed way."""
    with contextlib.suppress(llamactor.LlamactorError, ValueError):
        async with load_model(
            tiny_model_path, context_size=64, threads=1, metadata_overrides=overrides
        ) as model:
            await model.complete("once upon a time", max_tokens=3)
            model.detokenize(range(SIZE), special=True)


async def test_several_overrides_at_once(tiny_model_path: Path, tmp_path: Path) -> None:
    overrides: Any = {
        "llama.context_length": 128,
        "general.name": "renamed",
        "tokenizer.ggml.add_bos_token": True,
        "own.number": 2.5,
    }
    options: Any = {"metadata_overrides": overrides, "sequences": 1, "threads": 1}
    for turn in range(3):
        async with (
            load_model(tiny_model_path, **options) as model,
            model.create_context(context_size=64, sequences=1, threads=1) as context,
            context.sequence() as sequence,
        ):
            assert model.info.train_context_size == 128
            assert model.metadata["general.name"] == "renamed"
            if turn:
                await sequence.load(tmp_path / "state")
                assert sequence.tokens == TOKENS[:5]
            else:
                await sequence.prefill(TOKENS[:5])
                await sequence.save(tmp_path / "state")


async def test_a_list_of_adapters(tiny_model_path: Path, tmp_path: Path) -> None:
    adapters = [gguf.tiny_lora(tmp_path / f"lora{seed}.gguf", seed=seed) for seed in range(2)]

    async def says(*lora: Any) -> list[int]:
        options: Any = {"context_size": 64, "sequences": 1, "threads": 1}
        async with load_model(tiny_model_path, lora=lora, **options) as model:
            return (await model.complete("once upon a time", max_tokens=8)).tokens

    plain, both = await says(), await says(*adapters)
    assert await says((adapters[0], 0.0), (str(adapters[1]), 0.0)) == plain
    assert both != plain
    assert await says(adapters[0], (adapters[0], -1.0)) in (plain, await says(adapters[0]))
    with pytest.raises(DecodeError, match="NaN"):
        await says((adapters[0], GREAT))
