"""Wrong input: every bad call has its exception and a message that names value and limit."""
# ruff: noqa: E501 -- a row of the table stays one line

from __future__ import annotations

import asyncio
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

import llamactor
from llamactor import (
    ClosedError,
    ContextOverflowError,
    Dry,
    DynamicTemperature,
    GenerationOptions,
    Mirostat,
    ModelLoadError,
    ModelNotFoundError,
    RepeatPenalty,
    StateMismatchError,
    TokenBatching,
    UnsupportedError,
    Xtc,
    load_model,
)
from tests import models as gguf
from tests.conftest import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1024 * 1024
CONTEXT = 256
SIZE = gguf.VOCAB_SIZE
PROMPT = list(range(300, 310))


@dataclass
class World:
    """What the calls are made on; deliberately untyped, since most of them are wrong by type."""

    model: Any
    context: Any
    sequence: Any
    """Holds the ten tokens of PROMPT."""
    closed_model: Any
    closed_context: Any
    closed_sequence: Any
    orphan: Any
    """A sequence whose model was closed."""
    vocabulary: Any
    """A model loaded with vocab_only=True."""
    encoder: Any
    good: Path
    files: Path
    """A directory with saved states and broken files."""
    answer: Any
    """What the model said before anything bad was called."""

    def load(self, **options: Any) -> Any:
        return load_model(self.good, **options)

    def complete(self, **options: Any) -> Any:
        return self.model.complete("once", max_tokens=1, **options)

    def open(self, **options: Any) -> Any:
        return self.model.create_context(**options)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    files = tmp_path_factory.mktemp("bad")
    good = gguf.tiny_llama(files / "good.gguf")
    gguf.tiny_lora(files / "lora.gguf")
    gguf.tiny_lora(files / "wide.gguf", width=128)
    gguf.tiny_lora(files / "mamba.gguf", architecture="mamba")
    gguf.tiny_split(files)
    gguf.no_vocab(files / "mute.gguf")
    gguf.malformed(files / "malformed")
    gguf.poisoned(files / "poisoned")
    gguf.poisoned_loras(files / "loras")
    options: Any = {"context_size": CONTEXT, "sequences": 2, "threads": 1}
    async with (
        load_model(good, **options) as model,
        load_model(good, **options) as closed_model,
        load_model(good, vocab_only=True) as vocabulary,
        load_model(gguf.tiny_encoder(files / "encoder.gguf")) as encoder,
        model.create_context(**options) as context,
        model.create_context(**options) as closed_context,
        context.sequence() as sequence,
        context.sequence() as closed_sequence,
    ):
        await sequence.prefill(PROMPT)
        await write_states(files, sequence, model, options)
        orphan = await (await closed_model.create_context(**options)).sequence()
        await closed_model.aclose()
        await closed_context.aclose()
        await closed_sequence.aclose()
        answer = await model.complete("once", max_tokens=8)
        yield World(
            model=model,
            context=context,
            sequence=sequence,
            closed_model=closed_model,
            closed_context=closed_context,
            closed_sequence=closed_sequence,
            orphan=orphan,
            vocabulary=vocabulary,
            encoder=encoder,
            good=good,
            files=files,
            answer=answer.tokens,
        )


async def write_states(files: Path, sequence: Any, model: Any, options: Any) -> None:
    """Save a state here, one with another layout, one of another model, and damaged ones."""
    await sequence.save(files / "state")
    state = (files / "state").read_bytes()
    (files / "cut").write_bytes(state[:-100])
    (files / "changed").write_bytes(state[:200] + bytes([state[200] ^ 1]) + state[201:])
    (files / "other_version").write_bytes(state[:16] + b"\x63" + state[17:])
    (files / "text").write_text("not a state\n" * 20)
    (files / "empty").touch()
    async with (
        model.create_context(kv_type_k="f32", **options) as context,
        context.sequence() as other,
    ):
        await other.prefill(PROMPT)
        await other.save(files / "other_layout")
    async with (
        load_model(gguf.tiny_llama(files / "other.gguf", seed=1), **options) as model_two,
        model_two.create_context(**options) as context,
        context.sequence() as other,
    ):
        await other.prefill(PROMPT)
        await other.save(files / "other_model")


class Bad:
    """One bad call: what is wrong, the call, the exception, and words of its message in order."""

    def __init__(
        self, what: str, call: Callable[[World], object], error: type[Exception], *says: str
    ) -> None:
        self.what = what
        self.call = call
        self.error = error
        self.says = says

    def __repr__(self) -> str:
        return self.what


# fmt: off
BAD = [
    # --- names of options
    Bad("unknown option of load", lambda w: w.load(gpu_layer=1), TypeError, "gpu_layer", "'gpu_layers'"),
    Bad("unknown option of a context", lambda w: w.open(sequence=1), TypeError, "'sequence'", "'sequences'"),
    Bad("unknown option of a prediction", lambda w: w.complete(temprature=1), TypeError, "temprature", "'temperature'"),
    Bad("unknown option like no other", lambda w: w.complete(zzz=1), TypeError, "zzz", "known: ", "top_k"),
    Bad("options of another class", lambda w: w.complete(options={"seed": 1}), TypeError, "options", "GenerationOptions", "dict"),
    Bad("a bad keyword over good options", lambda w: w.complete(options=GenerationOptions(), top_k=0), ValueError, "top_k", "0"),

    # --- references and paths
    Bad("ref of a wrong type", lambda w: load_model(7), TypeError, "ref", "7 (int)"),  # type: ignore[arg-type]
    Bad("ref of bytes", lambda w: load_model(b"a.gguf"), TypeError, "ref", "b'a.gguf'"),  # type: ignore[arg-type]
    Bad("empty ref", lambda w: load_model(""), ValueError, "ref", "empty"),
    Bad("NUL in a ref", lambda w: load_model("a\0b.gguf"), ValueError, "NUL", r"a\x00b"),
    Bad("NUL in a pathlib path", lambda w: load_model(Path("a\0b.gguf")), ValueError, "NUL"),
    Bad("file that is not there", lambda w: load_model(w.files / "none.gguf"), ModelNotFoundError, "none.gguf"),
    Bad("name nobody knows", lambda w: load_model("smollm3"), ModelNotFoundError, "'smollm3'", '"smollm2"'),
    Bad("package that is not there", lambda w: load_model("pkg:llm_nothing"), ModelNotFoundError, "'llm_nothing'", "pip install"),
    Bad("package that is no name", lambda w: load_model("pkg:../etc"), ModelNotFoundError, "../etc"),
    Bad("package without a model", lambda w: load_model("pkg:json"), ModelNotFoundError, "'json'", "0: none"),
    Bad("model to download, offline", lambda w: load_model("hf:a/b"), llamactor.DownloadError, "hf:a/b", "HF_HUB_OFFLINE"),
    Bad("directory", lambda w: load_model(w.files), ModelLoadError, "is a directory", ".gguf"),
    Bad("path through a file", lambda w: load_model(w.good / "x.gguf"), llamactor.LlamactorError, "x.gguf"),
    Bad("path that is too long", lambda w: load_model("/" + "x" * 5000 + ".gguf"), llamactor.LlamactorError, "xxx"),
    Bad("device", lambda w: load_model("/dev/zero"), ModelLoadError, "/dev/zero", "regular file"),
    Bad("later part of a split model", lambda w: load_model(w.files / "tiny-split-00002-of-00003.gguf"), ModelLoadError, "part 2 of 3", "00001"),
    Bad("model without a tokenizer", lambda w: load_model(w.files / "mute.gguf"), ModelLoadError, "no_vocab"),
    Bad("model without a tokenizer, words only", lambda w: load_model(w.files / "mute.gguf", vocab_only=True), ModelLoadError, "no_vocab"),
    Bad("adapter as a model", lambda w: load_model(w.files / "lora.gguf"), ModelLoadError, "lora.gguf"),

    # --- load options
    Bad("negative layers", lambda w: w.load(gpu_layers=-1), ValueError, "gpu_layers", "0", "-1", '"auto"'),
    Bad("layers as text", lambda w: w.load(gpu_layers="all"), TypeError, "gpu_layers", "'all'", '"auto"'),
    Bad("layers beyond 32 bits", lambda w: w.load(gpu_layers=2**31), ValueError, "2147483647", "2147483648"),
    Bad("main GPU below zero", lambda w: w.load(main_gpu=-1), ValueError, "main_gpu", "-1"),
    Bad("unknown split mode", lambda w: w.load(split_mode="tensor"), ValueError, "'layer'", "'tensor'"),
    Bad("unknown device", lambda w: w.load(devices=["CUDA9"]), ValueError, "CUDA9", "CPU"),
    Bad("device of a wrong type", lambda w: w.load(devices=[0]), TypeError, "devices[0]", "0 (int)"),
    Bad("devices as one text", lambda w: w.load(devices="CPU"), TypeError, "devices", "list"),
    Bad("too many shares", lambda w: w.load(tensor_split=[1.0] * 1000), ValueError, "1000", "at most"),
    Bad("negative share", lambda w: w.load(tensor_split=[-1.0]), ValueError, "tensor_split[0]", "-1.0"),
    Bad("share that is no number", lambda w: w.load(tensor_split=[math.nan]), ValueError, "tensor_split[0]", "nan"),
    Bad("no share at all", lambda w: w.load(tensor_split=[]), ValueError, "tensor_split", "above 0"),
    Bad("mmap as a number", lambda w: w.load(use_mmap=1), TypeError, "use_mmap", "1 (int)"),

    # --- metadata overrides
    Bad("overrides as a list", lambda w: w.load(metadata_overrides=[("a", 1)]), TypeError, "metadata_overrides", "list"),
    Bad("override of a long key", lambda w: w.load(metadata_overrides={"k" * 128: 1}), ValueError, "127", "kkk"),
    Bad("override of a key with NUL", lambda w: w.load(metadata_overrides={"a\0": 1}), ValueError, "NUL"),
    Bad("override with a long text", lambda w: w.load(metadata_overrides={"k": "v" * 128}), ValueError, "127", "vvv"),
    Bad("override with a list", lambda w: w.load(metadata_overrides={"k": [1]}), TypeError, "'k'", "list"),
    Bad("override beyond 64 bits", lambda w: w.load(metadata_overrides={"k": 2**63}), ValueError, "9223372036854775807"),
    Bad("override that is no number", lambda w: w.load(metadata_overrides={"k": math.nan}), ValueError, "nan"),
    Bad("override to no layers", lambda w: w.load(metadata_overrides={"llama.block_count": 0}), ModelLoadError, "block_count", "0", "512"),
    Bad("override to a negative width", lambda w: w.load(metadata_overrides={"llama.embedding_length": -1}), ModelLoadError, "embedding_length", "-1"),
    Bad("override to no heads", lambda w: w.load(metadata_overrides={"llama.attention.head_count": 0}), ModelLoadError, "head_count", "0"),
    Bad("override to a huge context", lambda w: w.load(metadata_overrides={"llama.context_length": 2**32 - 1}), ModelLoadError, "4294967295"),
    Bad("override of a wrong type", lambda w: w.load(metadata_overrides={"llama.context_length": "many"}), ModelLoadError, "context_length"),
    Bad("override to a negative epsilon", lambda w: w.load(metadata_overrides={"llama.attention.layer_norm_rms_epsilon": -1.0}), ModelLoadError, "epsilon", "-1"),
    Bad("override to another tokenizer", lambda w: w.load(metadata_overrides={"tokenizer.ggml.model": "no_vocab"}), ModelLoadError, "no_vocab"),
    Bad("override of the architecture", lambda w: w.load(metadata_overrides={"general.architecture": "mamba"}), ModelLoadError, "mamba"),
    Bad("override of the parts", lambda w: w.load(metadata_overrides={"split.count": 9}), ModelLoadError, "split.count"),

    # --- adapters
    Bad("adapter as one path", lambda w: w.load(lora="a.gguf"), TypeError, "lora", "list"),
    Bad("adapter that is not there", lambda w: w.load(lora=["none.gguf"]), ModelNotFoundError, "none.gguf"),
    Bad("adapter with NUL", lambda w: w.load(lora=["a\0b"]), ValueError, "lora[0]", "NUL"),
    Bad("adapter with a scale as text", lambda w: w.load(lora=[("a", "1")]), TypeError, "lora[0] scale", "'1'"),
    Bad("adapter with an infinite scale", lambda w: w.load(lora=[("a", math.inf)]), ValueError, "lora[0] scale", "inf"),
    Bad("adapter that is a model", lambda w: w.load(lora=[w.good]), ModelLoadError, "good.gguf", "adapter"),
    Bad("adapter of another width", lambda w: w.load(lora=[w.files / "wide.gguf"]), ModelLoadError, "wide.gguf", "shape"),
    Bad("adapter of another architecture", lambda w: w.load(lora=[w.files / "mamba.gguf"]), ModelLoadError, "mamba.gguf", "arch"),
    Bad("adapter that is a directory", lambda w: w.load(lora=[w.files]), ModelLoadError, "directory"),

    # --- contexts
    Bad("context of nothing", lambda w: w.open(context_size=0), ValueError, "context_size", "1", "0", '"auto"'),
    Bad("negative context", lambda w: w.open(context_size=-5), ValueError, "context_size", "-5"),
    Bad("context of 2**31", lambda w: w.open(context_size=2**31), ValueError, "2147483647", "2147483648"),
    Bad("context of 2**40", lambda w: w.open(context_size=2**40), ValueError, "2147483647", "1099511627776"),
    Bad("context as text", lambda w: w.open(context_size="all"), TypeError, "context_size", "'all'"),
    Bad("bad context while loading", lambda w: w.load(context_size=0), ValueError, "context_size", "0"),
    Bad("no sequence", lambda w: w.open(sequences=0), ValueError, "sequences", "between 1 and 256", "0"),
    Bad("257 sequences", lambda w: w.open(sequences=257), ValueError, "256", "257"),
    Bad("true sequences", lambda w: w.open(sequences=True), TypeError, "sequences", "True"),
    Bad("empty batches", lambda w: w.open(batch_size=0), ValueError, "batch_size", "0"),
    Bad("micro-batch over batch", lambda w: w.open(batch_size=8, ubatch_size=9), ValueError, "8", "9"),
    Bad("no thread", lambda w: w.open(threads=0), ValueError, "threads", "0", "loop a core"),
    Bad("negative threads", lambda w: w.open(threads=-1), ValueError, "threads", "-1"),
    Bad("too many threads", lambda w: w.open(threads_batch=513), ValueError, "threads_batch", "512", "513"),
    Bad("half a thread", lambda w: w.open(threads=0.5), TypeError, "threads", "0.5"),
    Bad("unknown attention", lambda w: w.open(flash_attention="yes"), ValueError, "'auto'", "'yes'"),
    Bad("unknown type of keys", lambda w: w.open(kv_type_k="q2_k"), ValueError, "'q8_0'", "'q2_k'"),
    Bad("quantised values without flash attention", lambda w: w.open(kv_type_v="q8_0", flash_attention="off"), ValueError, "kv_type_v='q8_0'", "flash_attention"),
    Bad("rope base of nothing", lambda w: w.open(rope_freq_base=0), ValueError, "rope_freq_base", "above 0", "0"),
    Bad("yarn that is no number", lambda w: w.open(yarn_beta_fast=math.nan), ValueError, "yarn_beta_fast", "nan"),
    Bad("context of words only", lambda w: w.vocabulary.create_context(), UnsupportedError, "vocab_only"),
    Bad("context of an encoder", lambda w: w.encoder.create_context(), UnsupportedError, "encoder"),
    Bad("words only complete", lambda w: w.vocabulary.complete("a"), UnsupportedError, "vocab_only"),
    Bad("encoder completes", lambda w: w.encoder.complete("a"), UnsupportedError, "decoder"),

    # --- prompts and tokens
    Bad("empty prompt", lambda w: w.model.complete(""), ValueError, "prompt", "empty"),
    Bad("prompt of no tokens", lambda w: w.model.complete([]), ValueError, "prompt", "empty"),
    Bad("prompt of a wrong type", lambda w: w.model.complete(7), TypeError, "prompt", "7 (int)"),
    Bad("prompt of bytes", lambda w: w.model.complete(b"once"), TypeError, "prompt", "b'once'"),
    Bad("prompt with a lone surrogate", lambda w: w.model.complete("a\ud800"), ValueError, "surrogate", "index 1"),
    Bad("prompt over 16 MiB", lambda w: w.model.complete("a" * (16 * MIB + 1)), ValueError, "16777217", "16777216"),
    Bad("prompt of wide characters over 16 MiB", lambda w: w.model.complete("é" * (8 * MIB + 1)), ValueError, "16777218", "16777216"),
    Bad("token over the vocabulary", lambda w: w.model.complete([1, SIZE]), ValueError, "prompt[1]", "928", "929", "929 tokens"),
    Bad("negative token", lambda w: w.model.complete([-1]), ValueError, "prompt[0]", "-1"),
    Bad("token of 2**31", lambda w: w.model.complete([2**31]), ValueError, "2147483648"),
    Bad("token that is text", lambda w: w.model.complete(["a"]), TypeError, "prompt[0]", "'a'"),
    Bad("token that is true", lambda w: w.model.complete([True]), TypeError, "prompt[0]", "True"),
    Bad("too long prompt", lambda w: w.model.complete([300] * (CONTEXT + 1)), ContextOverflowError, "257", "256", "overflow"),
    Bad("too long prompt of text", lambda w: w.model.complete("x " * CONTEXT), ContextOverflowError, "256"),
    Bad("too long prefill", lambda w: w.sequence.prefill([300] * (CONTEXT + 1)), ContextOverflowError, "257", "256"),
    Bad("too long score", lambda w: w.sequence.score([300] * (CONTEXT - 9)), ContextOverflowError, "257", "256"),
    Bad("prefix longer than the context", lambda w: w.model.complete("a", response_prefix="x " * CONTEXT), ContextOverflowError, "256"),
    Bad("empty prefill", lambda w: w.sequence.prefill(""), ValueError, "prompt", "empty"),
    Bad("empty score", lambda w: w.sequence.score([]), ValueError, "tokens", "empty"),
    Bad("score of a token over the vocabulary", lambda w: w.sequence.score([SIZE]), ValueError, "tokens[0]", "929"),
    Bad("score of text", lambda w: w.sequence.score("once"), TypeError, "tokens", "'once'"),
    Bad("tokenise no text", lambda w: w.model.tokenize(7), TypeError, "text", "7 (int)"),
    Bad("tokenise over 16 MiB", lambda w: w.model.tokenize("a" * (16 * MIB + 1)), ValueError, "16777217", "16777216"),
    Bad("tokenise a surrogate", lambda w: w.model.tokenize("\udfff"), ValueError, "surrogate", "index 0"),
    Bad("tokenise with a number for a flag", lambda w: w.model.tokenize("a", special=1), TypeError, "special", "1 (int)"),
    Bad("count over 16 MiB", lambda w: w.model.count_tokens("a" * (16 * MIB + 1)), ValueError, "16777217"),
    Bad("detokenise a token over the vocabulary", lambda w: w.model.detokenize([0, SIZE]), ValueError, "tokens[1]", "929"),
    Bad("detokenise a negative token", lambda w: w.model.detokenize([-(2**40)]), ValueError, "tokens[0]", "-1099511627776"),
    Bad("detokenise one number", lambda w: w.model.detokenize(5), TypeError, "tokens", "5 (int)"),
    Bad("detokenise too many", lambda w: w.model.detokenize([0] * (16 * MIB + 1)), ValueError, "16777217", "16777216"),

    # --- generation options
    Bad("fewer tokens than none", lambda w: w.model.complete("a", max_tokens=-1), ValueError, "max_tokens", "0", "-1", "None"),
    Bad("a fraction of tokens", lambda w: w.model.complete("a", max_tokens=1.5), TypeError, "max_tokens", "1.5"),
    Bad("temperature that is no number", lambda w: w.complete(temperature=math.nan), ValueError, "temperature", "nan"),
    Bad("infinite temperature", lambda w: w.complete(temperature=math.inf), ValueError, "temperature", "inf"),
    Bad("temperature beyond 32 bits", lambda w: w.complete(temperature=1e39), ValueError, "temperature", "1e+39"),
    Bad("negative temperature", lambda w: w.complete(temperature=-0.1), ValueError, "at least 0", "-0.1"),
    Bad("top_k of zero", lambda w: w.complete(top_k=0), ValueError, "top_k", "0", "None means all"),
    Bad("top_p over one", lambda w: w.complete(top_p=1.1), ValueError, "top_p", "at most 1", "1.1"),
    Bad("min_p that is no number", lambda w: w.complete(min_p=math.nan), ValueError, "min_p", "nan"),
    Bad("typical_p of zero", lambda w: w.complete(typical_p=0), ValueError, "typical_p", "above 0"),
    Bad("xtc as a number", lambda w: w.complete(xtc=0.5), TypeError, "xtc", "Xtc", "0.5"),
    Bad("xtc over one half", lambda w: Xtc(0.5, 0.6), ValueError, "xtc.threshold", "0.5", "0.6"),
    Bad("dry with an empty breaker", lambda w: Dry(breakers=("",)), ValueError, "dry.breakers[0]", "empty"),
    Bad("mirostat 3", lambda w: Mirostat(version=3), ValueError, "mirostat.version", "3"),  # type: ignore[arg-type]
    Bad("dynamic temperature below zero", lambda w: DynamicTemperature(-1), ValueError, "range", "-1"),
    Bad("repeat penalty of zero", lambda w: w.complete(repeat_penalty=0), ValueError, "repeat_penalty", "above 0", "0"),
    Bad("repeat penalty too small for 32 bits", lambda w: w.complete(repeat_penalty=1e-38), ValueError, "repeat_penalty", "1.18e-38", "1e-38"),
    Bad("presence penalty over two", lambda w: RepeatPenalty(presence_penalty=2.5), ValueError, "between -2 and 2", "2.5"),
    Bad("token batching of nothing", lambda w: TokenBatching(tokens=0), ValueError, "token_batching.tokens", "0"),
    Bad("bias of a token over the vocabulary", lambda w: w.complete(logit_bias={SIZE: 1.0}), ValueError, "logit_bias", "928", "929"),
    Bad("bias of a negative token", lambda w: w.complete(logit_bias={-1: 1.0}), ValueError, "logit_bias", "-1"),
    Bad("bias of several tokens", lambda w: w.complete(logit_bias={"xyzzy": 1.0}), ValueError, "'xyzzy'", "not one token"),
    Bad("bias of an empty text", lambda w: w.complete(logit_bias={"": 1.0}), ValueError, "logit_bias", "empty"),
    Bad("bias that is no number", lambda w: w.complete(logit_bias={1: math.nan}), ValueError, "logit_bias[1]", "nan", '"never"'),
    Bad("bias that says always", lambda w: w.complete(logit_bias={1: "always"}), TypeError, "logit_bias[1]", "'always'", '"never"'),
    Bad("biases as a list", lambda w: w.complete(logit_bias=[1]), TypeError, "logit_bias", "list"),
    Bad("empty stop string", lambda w: w.complete(stop=""), ValueError, "stop", "empty"),
    Bad("empty stop string among others", lambda w: w.complete(stop=["a", ""]), ValueError, "stop[1]", "empty"),
    Bad("empty stop tokens", lambda w: w.complete(stop=[[]]), ValueError, "stop[0]", "empty"),
    Bad("stop token over the vocabulary", lambda w: w.complete(stop=[[SIZE]]), ValueError, "stop[0][0]", "929"),
    Bad("stop string with a surrogate", lambda w: w.complete(stop="\udc80"), ValueError, "surrogate"),
    Bad("stop over 16 MiB", lambda w: w.complete(stop="a" * (16 * MIB + 1)), ValueError, "16777217"),
    Bad("stop that is a number", lambda w: w.complete(stop=5), TypeError, "stop", "5 (int)"),
    Bad("negative seed", lambda w: w.complete(seed=-1), ValueError, "seed", "4294967294", "-1"),
    Bad("seed that draws one", lambda w: w.complete(seed=2**32 - 1), ValueError, "4294967294", "4294967295"),
    Bad("seed as text", lambda w: w.complete(seed="1"), TypeError, "seed", "'1'"),
    Bad("unknown sampler", lambda w: w.complete(sampler_order=["topk"]), ValueError, "'top_k'", "'topk'"),
    Bad("sampler named twice", lambda w: w.complete(sampler_order=["top_k", "top_k"]), ValueError, "twice", "top_k"),
    Bad("samplers as text", lambda w: w.complete(sampler_order="top_k"), TypeError, "sampler_order", "list"),
    Bad("more log-probabilities than tokens", lambda w: w.complete(logprobs=SIZE + 1), ValueError, "logprobs", "929", "930"),
    Bad("processor that cannot be called", lambda w: w.complete(logits_processor=3), TypeError, "logits_processor", "callable"),
    Bad("prefix of bytes", lambda w: w.complete(response_prefix=b"x"), TypeError, "response_prefix", "b'x'"),
    Bad("priority beyond 32 bits", lambda w: w.complete(priority=2**31), ValueError, "priority", "2147483648"),
    Bad("deadline in the past", lambda w: w.complete(deadline=-1), ValueError, "deadline", "-1"),
    Bad("unknown overflow", lambda w: w.complete(overflow="shift"), ValueError, "'rolling_window'", "'shift'"),
    Bad("no pending tokens", lambda w: w.complete(max_pending=0), ValueError, "max_pending", "0"),

    # --- sequences
    Bad("negative timeout", lambda w: w.context.sequence(timeout=-1), ValueError, "timeout", "-1"),
    Bad("timeout as text", lambda w: w.context.sequence(timeout="1"), TypeError, "timeout", "'1'"),
    Bad("timeout that is no number", lambda w: w.sequence.fork(timeout=math.nan), ValueError, "timeout", "nan"),
    Bad("erase past the end", lambda w: w.sequence.erase([(0, 11)]), ValueError, "ranges[0] end", "10", "11"),
    Bad("erase backwards", lambda w: w.sequence.erase([(5, 4)]), ValueError, "ranges[0] end", "5", "4"),
    Bad("erase from below zero", lambda w: w.sequence.erase([(-1, 4)]), ValueError, "ranges[0] start", "-1"),
    Bad("erase twice", lambda w: w.sequence.erase([(0, 5), (4, 6)]), ValueError, "overlap", "5", "4"),
    Bad("erase a triple", lambda w: w.sequence.erase([(0, 5, 1)]), ValueError, "ranges[0]", "3 values"),
    Bad("erase one number", lambda w: w.sequence.erase(5), TypeError, "ranges", "5 (int)"),
    Bad("shift more than there is", lambda w: w.sequence.shift(1, 10), ValueError, "10", "11"),
    Bad("shift below zero", lambda w: w.sequence.shift(0, -1), ValueError, "n_discard", "-1"),
    Bad("shift by text", lambda w: w.sequence.shift("0", 1), TypeError, "n_keep", "'0'"),

    # --- state files
    Bad("save to NUL", lambda w: w.sequence.save("a\0b"), ValueError, "path", "NUL"),
    Bad("save to nothing", lambda w: w.sequence.save(""), ValueError, "path", "empty"),
    Bad("save to a number", lambda w: w.sequence.save(1), TypeError, "path", "1 (int)"),
    Bad("save into no directory", lambda w: w.sequence.save(w.files / "none" / "state"), FileNotFoundError, "none"),
    Bad("save over a directory", lambda w: w.sequence.save(w.files), OSError, "bad"),
    Bad("load what is not there", lambda w: w.sequence.load(w.files / "none"), FileNotFoundError, "none"),
    Bad("load a directory", lambda w: w.sequence.load(w.files), OSError, "regular file"),
    Bad("load a FIFO", lambda w: w.sequence.load(w.files / "malformed" / "fifo.gguf"), OSError, "fifo", "regular file"),
    Bad("load an endless device", lambda w: w.sequence.load("/dev/zero"), OSError, "/dev/zero", "regular file"),
    Bad("load an empty file", lambda w: w.sequence.load(w.files / "empty"), StateMismatchError, "empty"),
    Bad("load a text", lambda w: w.sequence.load(w.files / "text"), StateMismatchError, "text", "not a saved"),
    Bad("load a model", lambda w: w.sequence.load(w.good), StateMismatchError, "good.gguf"),
    Bad("load half a state", lambda w: w.sequence.load(w.files / "cut"), StateMismatchError, "cut", "checksum"),
    Bad("load a changed state", lambda w: w.sequence.load(w.files / "changed"), StateMismatchError, "changed", "checksum"),
    Bad("load a newer state", lambda w: w.sequence.load(w.files / "other_version"), StateMismatchError, "99", "version"),
    Bad("load a state of another layout", lambda w: w.sequence.load(w.files / "other_layout"), StateMismatchError, "layout"),
    Bad("load a state of another model", lambda w: w.sequence.load(w.files / "other_model"), StateMismatchError, "another model"),

    # --- closed objects
    Bad("closed model tokenises", lambda w: w.closed_model.tokenize("a"), ClosedError, "closed"),
    Bad("closed model detokenises", lambda w: w.closed_model.detokenize([1]), ClosedError, "closed"),
    Bad("closed model counts", lambda w: w.closed_model.count_tokens("a"), ClosedError, "closed"),
    Bad("closed model opens a context", lambda w: w.closed_model.create_context(), ClosedError, "closed"),
    Bad("closed model completes", lambda w: w.closed_model.complete("a"), ClosedError, "closed"),
    Bad("closed context gives a sequence", lambda w: w.closed_context.sequence(), ClosedError, "closed"),
    Bad("closed context gives one at once", lambda w: w.closed_context.sequence(timeout=0), ClosedError, "closed"),
    Bad("closed context tries", lambda w: w.closed_context.try_sequence(), ClosedError, "closed"),
    Bad("closed sequence predicts", lambda w: w.closed_sequence.predict("a"), ClosedError, "closed"),
    Bad("closed sequence prefills", lambda w: w.closed_sequence.prefill("a"), ClosedError, "closed"),
    Bad("closed sequence forks", lambda w: w.closed_sequence.fork(), ClosedError, "closed"),
    Bad("closed sequence erases", lambda w: w.closed_sequence.erase([]), ClosedError, "closed"),
    Bad("closed sequence shifts", lambda w: w.closed_sequence.shift(0, 0), ClosedError, "closed"),
    Bad("closed sequence clears", lambda w: w.closed_sequence.clear(), ClosedError, "closed"),
    Bad("closed sequence saves", lambda w: w.closed_sequence.save(w.files / "x"), ClosedError, "closed"),
    Bad("closed sequence loads", lambda w: w.closed_sequence.load(w.files / "state"), ClosedError, "closed"),
    Bad("closed sequence scores", lambda w: w.closed_sequence.score([1]), ClosedError, "closed"),
    Bad("closed sequence shows tokens", lambda w: w.closed_sequence.tokens, ClosedError, "closed"),
    Bad("sequence of a closed model predicts", lambda w: w.orphan.predict("a"), ClosedError, "closed"),
    Bad("sequence of a closed model prefills", lambda w: w.orphan.prefill("a"), ClosedError, "closed"),
    Bad("sequence of a closed model shifts", lambda w: w.orphan.shift(0, 0), ClosedError, "closed"),
    Bad("sequence of a closed model forks", lambda w: w.orphan.fork(), ClosedError, "closed"),
]
# fmt: on

BROKEN = [f"malformed/{name}.gguf" for name in ("directory", "fifo", *gguf._PATCHES)] + [
    f"poisoned/{name}.gguf" for name in gguf._POISON if name != "bos_out_of_range"
]


async def carry_out(call: Callable[[World], object], world: World) -> None:
    """Make the call, and wait for what it starts."""
    async with asyncio.timeout(PATIENCE):
        started = call(world)
        if inspect.isawaitable(started):
            opened = await started
            if hasattr(opened, "aclose"):
                await opened.aclose()


async def test_the_table_is_long_and_says_everything_once() -> None:
    assert len(BAD) >= 60
    assert len({bad.what for bad in BAD}) == len(BAD)


@pytest.mark.parametrize("bad", BAD, ids=repr)
async def test_a_bad_call_raises_and_says_what_was_wrong(world: World, bad: Bad) -> None:
    with pytest.raises(bad.error) as caught:
        await carry_out(bad.call, world)
    message, at = str(caught.value), 0
    for words in bad.says:
        at = message.find(words, at)
        assert at >= 0, f"{words!r} is not in its place in {message!r}"


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_file_is_refused_by_name(world: World, name: str) -> None:
    path = world.files / name
    with pytest.raises(ModelLoadError, match=path.name):
        await carry_out(lambda _: load_model(path, context_size=CONTEXT, threads=1), world)


@pytest.mark.parametrize("name", gguf._LORA_POISON)
async def test_a_broken_adapter_is_refused_by_name(world: World, name: str) -> None:
    path = world.files / "loras" / f"{name}.gguf"
    with pytest.raises(ModelLoadError, match=path.name):
        await carry_out(lambda w: w.load(lora=[path], threads=1), world)


async def test_a_special_token_outside_of_the_vocabulary_is_not_taken_over(world: World) -> None:
    path = world.files / "poisoned" / "bos_out_of_range.gguf"
    async with load_model(path, context_size=CONTEXT, threads=1) as model:
        assert model.tokens.bos is None or model.tokens.bos < SIZE
        assert (await model.complete("once", max_tokens=2)).tokens


async def test_closing_again_is_fine(world: World) -> None:
    for closed in (world.closed_model, world.closed_context, world.closed_sequence, world.orphan):
        await closed.aclose()
        assert closed.closed
        assert "closed" in repr(closed)


async def test_after_all_of_them_the_same_model_answers_as_before(world: World) -> None:
    assert (await world.model.complete("once", max_tokens=8)).tokens == world.answer
    assert world.sequence.tokens == PROMPT
    stats = world.context.stats
    assert (stats.sequences_active, stats.sequences_waiting) == (1, 0)
