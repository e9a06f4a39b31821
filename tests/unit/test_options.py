"""Options: everything is checked before anything runs, and messages say what would work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llamactor import (
    Dry,
    DynamicTemperature,
    GenerationOptions,
    Mirostat,
    Model,
    RepeatPenalty,
    TokenBatching,
    Xtc,
)
from llamactor.options import (
    ContextKeywords,
    ContextOptions,
    GenerationKeywords,
    LoadKeywords,
    LoadOptions,
    context_options,
    generation_options,
    load_options,
    native_options,
)

if TYPE_CHECKING:
    import msgspec

WRONG_TYPES: list[tuple[str, Any]] = [
    ("max_tokens", True),
    ("max_tokens", 1.5),
    ("max_tokens", "8"),
    ("stop", 3),
    ("stop", [3]),
    ("stop", b"end"),
    ("temperature", "hot"),
    ("temperature", None),
    ("temperature", True),
    ("temperature", 1 + 2j),
    ("deterministic", 1),
    ("top_k", 4.0),
    ("top_p", None),
    ("xtc", 0.5),
    ("dry", {"multiplier": 1}),
    ("mirostat", 2),
    ("dynamic_temperature", 0.5),
    ("repeat_penalty", "1.1"),
    ("logit_bias", [(1, 2.0)]),
    ("logit_bias", {1.5: 1.0}),
    ("logit_bias", {1: "always"}),
    ("seed", 1.0),
    ("sampler_order", "top_k"),
    ("logprobs", True),
    ("logits_processor", 3),
    ("ignore_eos", 0),
    ("response_prefix", b"x"),
    ("priority", None),
    ("deadline", "soon"),
    ("overflow", 3),
    ("token_batching", 10),
    ("special", None),
]

OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("max_tokens", -1, "None means no limit"),
    ("max_tokens", -1, "-1"),
    ("max_tokens", 2**31, "2147483647"),
    ("stop", "", "empty"),
    ("stop", ["end", ""], r"stop\[1\]"),
    ("stop", [[]], "empty"),
    ("stop", [[-1]], "-1"),
    ("temperature", -0.1, "-0.1"),
    ("temperature", math.nan, "finite"),
    ("temperature", math.inf, "finite"),
    ("top_k", 0, "None means all tokens"),
    ("top_p", 0.0, "above 0"),
    ("top_p", 1.1, "at most 1"),
    ("min_p", -0.1, "between 0 and 1"),
    ("typical_p", 2, "at most 1"),
    ("top_n_sigma", 0, "above 0"),
    ("repeat_penalty", 0, "above 0"),
    ("logit_bias", {-1: 1.0}, "-1"),
    ("logit_bias", {1: math.inf}, "never"),
    ("logit_bias", {1: math.nan}, "never"),
    ("seed", -1, "None draws one"),
    ("seed", 2**32 - 1, "4294967294"),
    ("sampler_order", ["top_k", "top_k"], "twice"),
    ("sampler_order", ["topk"], "'top_k'"),
    ("logprobs", -1, "None is off"),
    ("reasoning_budget", -1, "None means no limit"),
    ("deadline", 0, "above 0"),
    ("overflow", "shift", "'rolling_window'"),
    ("max_pending", 0, "None never pauses"),
    ("response_prefix", "\ud800", "lone surrogate"),
    ("stop", "\udfff", "lone surrogate"),
]

WRONG_PARTS: list[tuple[type, dict[str, Any], str]] = [
    (Xtc, {"probability": 1.5}, "xtc.probability"),
    (Xtc, {"probability": 0.5, "threshold": 0.6}, "above 0.5 nothing"),
    (Dry, {"base": 0.5}, "dry.base"),
    (Dry, {"breakers": ("",)}, r"dry.breakers\[0\]"),
    (Dry, {"last_tokens": -1}, "whole context"),
    (Mirostat, {"version": 3}, "between 1 and 2"),
    (Mirostat, {"tau": 0}, "mirostat.tau"),
    (DynamicTemperature, {"range": -1}, "dynamic_temperature.range"),
    (RepeatPenalty, {"penalty": 0}, "1 is off"),
    (RepeatPenalty, {"presence_penalty": 3}, "between -2 and 2"),
    (TokenBatching, {"tokens": 0}, "token_batching.tokens"),
    (TokenBatching, {"interval": math.nan}, "finite"),
]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_a_wrong_type_is_a_type_error_that_names_the_option(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        generation_options({name: value})


@pytest.mark.parametrize(("name", "value", "says"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_a_value_error_that_says_what_works(
    name: str, value: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=name):
        generation_options({name: value})
    with pytest.raises(ValueError, match=says):
        GenerationOptions(**{name: value})


@pytest.mark.parametrize(("kind", "values", "says"), WRONG_PARTS)
def test_parts_check_themselves(kind: type, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kind(**values)


def test_an_unknown_option_names_near_matches() -> None:
    with pytest.raises(TypeError, match=r"unknown generation option 'temprature'.*'temperature'"):
        generation_options({"temprature": 1})
    with pytest.raises(TypeError, match=r"unknown context option 'context'.*'context_size'"):
        context_options({"context": 1})
    with pytest.raises(TypeError, match=r"unknown load option 'gpu_layer'.*'gpu_layers'"):
        load_options({"gpu_layer": 1})


def test_keywords_win_over_options() -> None:
    base = GenerationOptions(temperature=0.5, max_tokens=10)
    merged = generation_options({"options": base, "max_tokens": 20})
    assert (merged.temperature, merged.max_tokens) == (0.5, 20)
    assert base.max_tokens == 10
    assert generation_options({"options": base}) is base
    assert generation_options({"options": None, "seed": 1}).seed == 1
    with pytest.raises(TypeError, match="GenerationOptions"):
        generation_options({"options": {"seed": 1}})
    with pytest.raises(ValueError, match="max_tokens"):
        generation_options({"options": base, "max_tokens": -1})


def test_numbers_of_numpy_are_numbers() -> None:
    options = generation_options({"max_tokens": np.int64(3), "temperature": np.float32(0.5)})
    assert (options.max_tokens, options.temperature) == (3, 0.5)


@pytest.mark.parametrize(
    ("keywords", "structs"),
    [
        (GenerationKeywords, (GenerationOptions,)),
        (ContextKeywords, (ContextOptions,)),
        (LoadKeywords, (LoadOptions, ContextOptions)),
    ],
)
def test_keywords_and_structs_name_the_same_options(
    keywords: type, structs: tuple[type[msgspec.Struct], ...]
) -> None:
    fields = {name for struct in structs for name in struct.__struct_fields__}
    assert set(keywords.__annotations__) | set(_inherited(keywords)) == fields | _extra(keywords)


def _inherited(keywords: type) -> dict[str, object]:
    return {} if keywords is not LoadKeywords else ContextKeywords.__annotations__


def _extra(keywords: type) -> set[str]:
    return {"options"} if keywords is GenerationKeywords else set()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sequences": 0}, "sequences must be between 1 and 256, not 0"),
        ({"sequences": 257}, "not 257"),
        ({"context_size": 0}, '"auto" fits the model'),
        ({"batch_size": 64, "ubatch_size": 128}, r"at most batch_size \(64\), not 128"),
        ({"threads": 0}, "leaves the loop a core"),
        ({"flash_attention": "yes"}, "'auto', 'on', 'off'"),
        ({"kv_type_k": "q3_k"}, "'q8_0'"),
        ({"rope_freq_base": 0}, "above 0"),
    ],
)
def test_context_options_out_of_range(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        context_options(values)


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"gpu_layers": -1}, ValueError, '"auto" means all layers'),
        ({"gpu_layers": True}, TypeError, "gpu_layers"),
        ({"split_mode": "tensor"}, ValueError, "'layer'"),
        ({"use_mmap": 1}, TypeError, "use_mmap"),
        ({"tensor_split": [0.0]}, ValueError, "above 0"),
        ({"tensor_split": "1,2"}, TypeError, "tensor_split"),
        ({"metadata_overrides": {"": 1}}, ValueError, "empty"),
        ({"metadata_overrides": {"k": "v" * 128}}, ValueError, "127 bytes"),
        ({"metadata_overrides": {"k": 2**63}}, ValueError, "metadata_overrides"),
        ({"metadata_overrides": {"k": None}}, TypeError, "metadata_overrides"),
        ({"lora": "adapter.gguf"}, TypeError, "must be a list"),
        ({"lora": ["a\0b"]}, ValueError, "NUL"),
        ({"lora": [("a", math.nan)]}, ValueError, "finite"),
        ({"devices": [""]}, ValueError, "empty"),
    ],
)
def test_wrong_load_options(values: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        load_options(values)


def test_auto_context_size_fits_the_model() -> None:
    options = ContextOptions()
    assert options.native(2048)["context_size"] == 2048
    assert options.native(131072)["context_size"] == 8192
    assert ContextOptions(context_size=100).native(2048)["context_size"] == 100


async def test_a_bias_by_text_is_for_exactly_one_token(tiny_model: Model) -> None:
    token = tiny_model.tokenize("a")[0]
    bias: dict[int | str, Any] = {"a": "never", token + 1: 2}
    native = native_options(GenerationOptions(logit_bias=bias), tiny_model._native)
    assert native["logit_bias"] == [(token, -math.inf), (token + 1, 2.0)]
    several = tiny_model.tokenize("xyzzy")
    with pytest.raises(ValueError, match=f"not one token but {len(several)}") as error:
        _ = tiny_model.complete("once", logit_bias={"xyzzy": 1.0})
    assert str(several[0]) in str(error.value)


async def test_tokens_must_be_in_the_vocabulary(tiny_model: Model) -> None:
    size = tiny_model.info.vocab_size
    wrong: list[dict[str, Any]] = [
        {"logit_bias": {size: 1.0}},
        {"stop": [[size]]},
        {"logprobs": size + 1},
    ]
    for options in wrong:
        with pytest.raises(ValueError, match=str(size)):
            _ = tiny_model.complete("once", **options)
    with pytest.raises(ValueError, match=r"prompt\[1\].*vocabulary"):
        _ = tiny_model.complete([0, size])


async def test_a_forbidden_token_does_not_come(tiny_model: Model) -> None:
    usual = (await tiny_model.complete("once", max_tokens=1)).tokens[0]
    options = GenerationOptions(logit_bias={usual: "never"}, max_tokens=1)
    assert (await tiny_model.complete("once", options=options)).tokens != [usual]


async def test_tokenising_refuses_what_it_cannot_do(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match="16 MiB"):
        tiny_model.tokenize("a" * (16 * 1024 * 1024 + 1))
    with pytest.raises(ValueError, match="lone surrogate"):
        tiny_model.count_tokens("a\ud800")
    with pytest.raises(TypeError, match="text must be a str"):
        tiny_model.tokenize(Path("a"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens\[0\]"):
        tiny_model.detokenize([-1])
    assert tiny_model.detokenize([]) == ""
