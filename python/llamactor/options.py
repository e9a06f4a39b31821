"""Options of loading, contexts and generation: meaning, limits and native form.

Everything is checked here, before anything runs: an unknown name or a wrong type is a `TypeError`,
a value out of range a `ValueError`, and the message says the option, the value, the limit and what
would work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import msgspec

from llamactor import _checks as check
from llamactor.grammar import Grammar
from llamactor.schema import schema_of

if TYPE_CHECKING:
    import os

    from llamactor import _core

Overflow: TypeAlias = Literal["stop_at_limit", "truncate_middle", "rolling_window"]
ChatOverflow: TypeAlias = "Literal['erase_oldest'] | Overflow | Callable[..., Any]"
"""In a chat also the default by its name, a strategy of `context_shift`, or an async function."""
Stop: TypeAlias = "str | Sequence[str | Sequence[int]]"
LogitBias: TypeAlias = "Mapping[int | str, float | Literal['never']]"
ReasoningMarks: TypeAlias = tuple[str, str, bool, str]
"""Start tag ("" if only prompts open it), end tag, whether the prompt opened it, closing text.

The closing text is written in the model's place when the budget is used up: the end tag with the
white space that the template puts round it, such as ``"\\n</think>\\n\\n"``.
"""
MAX_BREAKERS = 64
"""Sequence breakers DRY takes at most."""
MAX_BREAKER_BYTES = 40
"""Bytes of a sequence breaker at most."""

LogitsProcessor: TypeAlias = "Callable[[list[int], memoryview[float]], None]"
TokensFilter: TypeAlias = Callable[[list[int]], list[int]]

SAMPLERS = (
    "penalties",
    "dry",
    "top_n_sigma",
    "top_k",
    "typical_p",
    "top_p",
    "min_p",
    "xtc",
    "temperature",
)
"""What `sampler_order` arranges, in the default order of llama.cpp's `common_params_sampling`."""

OVERFLOWS = ("stop_at_limit", "truncate_middle", "rolling_window")
SPLIT_MODES = ("none", "layer", "row")
FLASH_ATTENTION = ("auto", "on", "off")
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")

MAX_SEED = 2**32 - 2  # llama.cpp reads 2**32 - 1 as "draw one"
MAX_INT = 2**31 - 1
MAX_BYTES = 2**62
MAX_SECONDS = 1e9  # some thirty years
AUTO_CONTEXT_SIZE = 8192


class Xtc(msgspec.Struct, frozen=True):
    """Exclude top choices: now and then keep only the least likely of the likely tokens.

    Source: https://github.com/oobabooga/text-generation-webui/pull/6335
    """

    probability: float
    """How often it happens, 0 to 1."""
    threshold: float = 0.1
    """The probability that makes a token a top choice, 0 to 0.5 (no two can have more)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check.check_float("xtc.probability", self.probability, 0, 1)
        check.check_float(
            "xtc.threshold", self.threshold, 0, 0.5, hint="above 0.5 nothing is ever excluded"
        )


class Dry(msgspec.Struct, frozen=True):
    """Don't repeat yourself: a penalty that grows with the length of a repeated run of tokens.

    Source: https://github.com/oobabooga/text-generation-webui/pull/5677
    """

    multiplier: float = 0.8
    """Strength of the penalty; 0 is off."""
    base: float = 1.75
    """How fast it grows with the run, at least 1."""
    allowed_length: int = 2
    """Longest run, in tokens, that costs nothing."""
    last_tokens: int | None = None
    """How many last tokens are searched; None is the whole context."""
    breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """Texts over which no run goes."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check.check_float("dry.multiplier", self.multiplier, 0)
        check.check_float("dry.base", self.base, 1)
        check.check_int("dry.allowed_length", self.allowed_length, 0, MAX_INT)
        _optional_int(
            "dry.last_tokens", self.last_tokens, 1, MAX_INT, "None means the whole context"
        )
        breakers = check.check_items("dry.breakers", self.breakers)
        if len(breakers) > MAX_BREAKERS:
            raise ValueError(
                f"dry.breakers has {len(breakers)} texts; at most {MAX_BREAKERS} are possible"
            )
        for i, text in enumerate(breakers):
            _check_breaker(f"dry.breakers[{i}]", text)


def _check_breaker(name: str, text: object) -> None:
    size = len(check.check_text(name, text, empty=False).encode())
    if size > MAX_BREAKER_BYTES or "\0" in str(text):
        raise ValueError(
            f"{name} is {text!r}, {size} bytes; "
            f"at most {MAX_BREAKER_BYTES} bytes without NUL are possible"
        )


class Mirostat(msgspec.Struct, frozen=True):
    """Hold the surprise of the text at a target instead of cutting at a fixed place.

    Source: https://arxiv.org/abs/2007.14966
    """

    version: Literal[1, 2] = 2
    """Version of the algorithm."""
    tau: float = 5.0
    """Target surprise in bits."""
    eta: float = 0.1
    """Learning rate."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check.check_int("mirostat.version", self.version, 1, 2)
        check.check_float("mirostat.tau", self.tau, 0, above=True)
        check.check_float("mirostat.eta", self.eta, 0, above=True)


class DynamicTemperature(msgspec.Struct, frozen=True):
    """A temperature that follows the entropy: `temperature` plus or minus `range`.

    Source: https://arxiv.org/abs/2309.02772
    """

    range: float
    """How far it goes from `temperature` in either direction."""
    exponent: float = 1.0
    """Bends the curve from entropy to temperature."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check.check_float("dynamic_temperature.range", self.range, 0)
        check.check_float("dynamic_temperature.exponent", self.exponent, 0, above=True)


class RepeatPenalty(msgspec.Struct, frozen=True):
    """Penalties on tokens that were seen lately."""

    penalty: float = 1.1
    """Divides the logit of a seen token; 1 is off."""
    last_tokens: int | None = 64
    """How many last tokens count; None is the whole context."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit once per time the token was seen, -2 to 2."""
    presence_penalty: float = 0.0
    """Subtracted from the logit if the token was seen at all, -2 to 2."""
    penalize_newline: bool = True
    """Whether the newline token may be penalised."""
    punish_tokens_filter: TokensFilter | None = None
    """Gets the last tokens, returns those to punish; runs on the sequence's own thread."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check.check_float("repeat_penalty.penalty", self.penalty, 0, above=True, hint="1 is off")
        hint = "None means the whole context"
        _optional_int("repeat_penalty.last_tokens", self.last_tokens, 1, MAX_INT, hint)
        check.check_float("repeat_penalty.frequency_penalty", self.frequency_penalty, -2, 2)
        check.check_float("repeat_penalty.presence_penalty", self.presence_penalty, -2, 2)
        check.check_bool("repeat_penalty.penalize_newline", self.penalize_newline)
        if self.punish_tokens_filter is not None:
            check.check_callable("repeat_penalty.punish_tokens_filter", self.punish_tokens_filter)


class TokenBatching(msgspec.Struct, frozen=True):
    """Deliver text in larger pieces: after so many tokens or so much time, what comes first."""

    tokens: int = 10
    """Most tokens held back."""
    interval: float = 0.12
    """Longest time, in seconds, that text is held back."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check.check_int("token_batching.tokens", self.tokens, 1, MAX_INT)
        check.check_float("token_batching.interval", self.interval, 0, MAX_SECONDS)


class GenerationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """All options of a generation in one value; everywhere the same names are keywords.

    ``None`` always means "no limit" or "off", never 0.
    """

    max_tokens: int | None = None
    """Most tokens to generate; None ends by the other stop reasons only."""
    stop: Stop | None = None
    """A text, or a list of texts and token lists: each ends the generation and is left out.

    They count in content only, never in reasoning.
    """
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    deterministic: bool = False
    """Evaluate alone and in fixed steps, so that the same call repeats bit for bit."""
    top_k: int | None = 40
    """Draw from this many likeliest tokens; None is all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability; 1 is off."""
    min_p: float = 0.0
    """Draw from tokens at least this likely relative to the likeliest; 0 is off."""
    typical_p: float | None = None
    """Locally typical sampling, above 0 to 1."""
    top_n_sigma: float | None = None
    """Draw from logits within this many standard deviations of the best."""
    xtc: Xtc | None = None
    """Exclude top choices."""
    dry: Dry | None = None
    """Penalise repeated runs."""
    mirostat: Mirostat | None = None
    """Target a surprise; replaces the samplers that cut the distribution."""
    dynamic_temperature: DynamicTemperature | None = None
    """Let the temperature follow the entropy."""
    repeat_penalty: float | RepeatPenalty | None = None
    """A penalty (1.1 is usual), or all its settings."""
    logit_bias: LogitBias | None = None
    """Added to logits of tokens, given by id or by the text of one; "never" forbids a token."""
    seed: int | None = None
    """Seed of the draw, 0 to 2**32 - 2; None draws one, which the result reports."""
    sampler_order: Sequence[str] | None = None
    """Names from `SAMPLERS` in the order they apply; those left out are not used."""
    logprobs: int | None = None
    """Log-probabilities: 0 of the chosen tokens, n also of the n best at each place."""
    logits_processor: LogitsProcessor | None = None
    """Called as ``f(tokens, logits)`` before a token is drawn, on the sequence's own thread.

    `tokens` are those generated so far: the same list every time, to be copied rather than kept or
    changed. `logits` is a writable memoryview of float32, one per id.
    """
    ignore_eos: bool = False
    """Go on past the end-of-generation tokens."""
    grammar: Grammar | None = None
    """What the content may be; of `grammar`, `schema` and `regex` one at most."""
    schema: Any = None
    """What the content is, as JSON: a JSON Schema as a dict, or a type; see `schema_of`.

    The result's `parsed` is the value of that type; `Prediction.partial_values` has it growing.
    """
    regex: str | None = None
    """A regular expression that the content matches as a whole."""
    response_prefix: str | None = None
    """Text the answer begins with, evaluated as if the model had written it.

    A grammar, schema or regular expression counts it as a part of what must match.
    """
    trim_trailing_whitespace: bool = False
    """Leave white space at the end out of the content."""
    reasoning_budget: int | None = None
    """Most tokens of one stretch of reasoning, which is then closed as the template closes it.

    Takes effect where the chat template marks reasoning: 0 closes it at once, None never. The
    tokens that close it are among those generated.
    """
    priority: int = 0
    """Higher goes first, among those who wait for a sequence and in a batch."""
    deadline: float | None = None
    """Seconds from the call after which it fails with `DeadlineExceededError`."""
    overflow: ChatOverflow | None = None
    """What to do when the context is full.

    None stops, and refuses a prompt that does not fit; chat sessions drop the oldest turns instead.
    """
    max_pending: int | None = 1024
    """Tokens every reader may lag before the sequence pauses; None never pauses."""
    token_batching: TokenBatching | None = None
    """Deliver larger pieces."""
    special: bool = True
    """Parse special tokens such as ``<|im_start|>`` in the prompt."""

    def __post_init__(self) -> None:
        """Check every type and range that does not depend on the model."""
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if value is not None or name in _REQUIRED:
                rule(name, value)
        given = [name for name in ("grammar", "schema", "regex") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"of grammar, schema and regex one at most, not {' and '.join(given)}")


class GenerationKeywords(TypedDict, total=False):
    """The keywords of `GenerationOptions`, and `options`, a value they are laid over."""

    options: GenerationOptions | None
    max_tokens: int | None
    stop: Stop | None
    temperature: float
    deterministic: bool
    top_k: int | None
    top_p: float
    min_p: float
    typical_p: float | None
    top_n_sigma: float | None
    xtc: Xtc | None
    dry: Dry | None
    mirostat: Mirostat | None
    dynamic_temperature: DynamicTemperature | None
    repeat_penalty: float | RepeatPenalty | None
    logit_bias: LogitBias | None
    seed: int | None
    sampler_order: Sequence[str] | None
    logprobs: int | None
    logits_processor: LogitsProcessor | None
    ignore_eos: bool
    grammar: Grammar | None
    schema: Any
    regex: str | None
    response_prefix: str | None
    trim_trailing_whitespace: bool
    reasoning_budget: int | None
    priority: int
    deadline: float | None
    overflow: ChatOverflow | None
    max_pending: int | None
    token_batching: TokenBatching | None
    special: bool


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the weights are loaded."""

    gpu_layers: int | Literal["auto"] = "auto"
    """Layers kept on the device; "auto" is all."""
    devices: Sequence[str] | None = None
    """Names of the devices to use, as `llamactor.devices` says; None is all of them."""
    main_gpu: int = 0
    """The device that holds everything with ``split_mode="none"``."""
    split_mode: Literal["none", "layer", "row"] = "layer"
    """How weights spread over several devices."""
    tensor_split: Sequence[float] | None = None
    """Share of each device, in proportion; None goes by their free memory."""
    use_mmap: bool = True
    """Map the file instead of reading it."""
    use_mlock: bool = False
    """Keep the weights from being swapped out."""
    vocab_only: bool = False
    """Load the vocabulary and metadata only: tokenises, cannot generate."""
    check_tensors: bool = False
    """Validate the weights while loading."""
    metadata_overrides: Mapping[str, bool | int | float | str] = {}
    """Replaces metadata of the file by key; keys and texts have at most 127 bytes."""
    lora: Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], float]] = ()
    """Adapters, for all contexts: a path, or a path and a scale (1.0)."""
    chat_template: str | None = None
    """Jinja text of a chat template in place of the file's; None takes that."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        if self.gpu_layers != "auto":
            check.check_int(
                "gpu_layers", self.gpu_layers, 0, MAX_INT, hint='"auto" means all layers'
            )
        check.check_int("main_gpu", self.main_gpu, 0, MAX_INT)
        check.check_choice("split_mode", self.split_mode, SPLIT_MODES)
        for name in ("use_mmap", "use_mlock", "vocab_only", "check_tensors"):
            check.check_bool(name, getattr(self, name))
        if self.chat_template is not None:
            check.check_text("chat_template", self.chat_template)
        self.native()

    def native(self, *, outline: bool = False) -> dict[str, object]:
        """Return the form the native loader takes; an outline has no weights, only their sizes."""
        return {
            "gpu_layers": -1 if self.gpu_layers == "auto" else int(self.gpu_layers),
            "devices": None if self.devices is None else _texts("devices", self.devices),
            "main_gpu": self.main_gpu,
            "split_mode": self.split_mode,
            "tensor_split": None if self.tensor_split is None else _shares(self.tensor_split),
            "use_mmap": self.use_mmap,
            "use_mlock": self.use_mlock,
            "vocab_only": self.vocab_only,
            "outline": outline,
            "check_tensors": self.check_tensors,
            "metadata_overrides": _overrides(self.metadata_overrides),
            "lora": [
                _adapter(i, item) for i, item in enumerate(check.check_items("lora", self.lora))
            ],
        }


class ContextOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Size and layout of a context."""

    context_size: int | Literal["auto"] = "auto"
    """Cells, in tokens; "auto" is the trained context, at most 8192."""
    sequences: int = 8
    """How many sequences live side by side, 1 to 256."""
    batch_size: int | None = None
    """Most tokens of one decode call; None is `ubatch_size`."""
    ubatch_size: int | None = None
    """Most tokens computed at once, at most `batch_size`; None is 512, or `batch_size` if less."""
    threads: int | None = None
    """Compute threads for generation; None is the physical cores less one, at least 1.

    More than there are processors are as many as these.
    """
    threads_batch: int | None = None
    """Compute threads for prompts; None is `threads`."""
    flash_attention: Literal["auto", "on", "off"] = "auto"
    """Fused attention."""
    kv_type_k: str | None = None
    """Type of the cached keys, such as "q8_0"; None is "f16"."""
    kv_type_v: str | None = None
    """Type of the cached values; a quantised one needs flash attention."""
    kv_unified: bool = True
    """One pool of cells for all sequences, which lets them share prefixes."""
    swa_full: bool = True
    """Keep all cells of sliding-window layers, so that prefixes stay reusable."""
    rope_freq_base: float | None = None
    """Base frequency of the rotary embedding; None is the model's."""
    rope_freq_scale: float | None = None
    """Scale of the rotary embedding; None is the model's."""
    yarn_ext_factor: float | None = None
    """YaRN extrapolation mix."""
    yarn_attn_factor: float | None = None
    """YaRN magnitude scale."""
    yarn_beta_fast: float | None = None
    """YaRN low correction dimension."""
    yarn_beta_slow: float | None = None
    """YaRN high correction dimension."""
    yarn_orig_context: int | None = None
    """Context size the model was trained with, for YaRN."""
    parking_bytes: int = 512 << 20
    """Host memory for the states of chats whose cells others needed; 0 evaluates them again."""
    parking_disk_bytes: int = 1 << 30
    """Room in the folder for temporary files for what exceeds that; 0 writes nothing."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        if self.context_size != "auto":
            check.check_int(
                "context_size", self.context_size, 1, MAX_INT, hint='"auto" fits the model'
            )
        check.check_int("sequences", self.sequences, 1, 256)
        for name in ("batch_size", "ubatch_size", "yarn_orig_context"):
            _optional_int(name, getattr(self, name), 1, MAX_INT, "None is the default")
        for name in ("threads", "threads_batch"):
            _optional_int(name, getattr(self, name), 1, 512, "None leaves the loop a core")
        if (
            self.batch_size is not None
            and self.ubatch_size is not None
            and self.ubatch_size > self.batch_size
        ):
            raise ValueError(
                f"ubatch_size must be at most batch_size ({self.batch_size}), "
                f"not {self.ubatch_size}"
            )
        check.check_choice("flash_attention", self.flash_attention, FLASH_ATTENTION)
        for name in ("kv_type_k", "kv_type_v"):
            if getattr(self, name) is not None:
                check.check_choice(name, getattr(self, name), KV_TYPES)
        quantised = self.kv_type_v not in {None, "f32", "f16", "bf16"}
        if quantised and self.flash_attention == "off":
            raise ValueError(
                f"kv_type_v={self.kv_type_v!r} is quantised, which needs flash attention: "
                'use flash_attention="auto" or "on", or kv_type_v="f16"'
            )
        check.check_bool("kv_unified", self.kv_unified)
        check.check_bool("swa_full", self.swa_full)
        check.check_int("parking_bytes", self.parking_bytes, 0, MAX_BYTES)
        check.check_int("parking_disk_bytes", self.parking_disk_bytes, 0, MAX_BYTES)
        self._check_rope()

    def _check_rope(self) -> None:
        for name in ("rope_freq_base", "rope_freq_scale"):
            if getattr(self, name) is not None:
                check.check_float(name, getattr(self, name), 0, above=True)
        for name in ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"):
            if getattr(self, name) is not None:
                check.check_float(name, getattr(self, name), 0)

    def native(self, train_context_size: int) -> dict[str, object]:
        """Return the form the native context takes; "auto" becomes a size."""
        values: dict[str, object] = msgspec.structs.asdict(self)
        if self.context_size == "auto":
            values["context_size"] = min(train_context_size or AUTO_CONTEXT_SIZE, AUTO_CONTEXT_SIZE)
        return values


class ContextKeywords(TypedDict, total=False):
    """The keywords of `ContextOptions`."""

    context_size: int | Literal["auto"]
    sequences: int
    batch_size: int | None
    ubatch_size: int | None
    threads: int | None
    threads_batch: int | None
    flash_attention: Literal["auto", "on", "off"]
    kv_type_k: str | None
    kv_type_v: str | None
    kv_unified: bool
    swa_full: bool
    rope_freq_base: float | None
    rope_freq_scale: float | None
    yarn_ext_factor: float | None
    yarn_attn_factor: float | None
    yarn_beta_fast: float | None
    yarn_beta_slow: float | None
    yarn_orig_context: int | None
    parking_bytes: int
    parking_disk_bytes: int


class LoadKeywords(ContextKeywords, total=False):
    """The keywords of `LoadOptions`, and of `ContextOptions` for the default context."""

    gpu_layers: int | Literal["auto"]
    devices: Sequence[str] | None
    main_gpu: int
    split_mode: Literal["none", "layer", "row"]
    tensor_split: Sequence[float] | None
    use_mmap: bool
    use_mlock: bool
    vocab_only: bool
    check_tensors: bool
    metadata_overrides: Mapping[str, bool | int | float | str]
    lora: Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], float]]
    chat_template: str | None


_GENERATION_NAMES = (*GenerationOptions.__struct_fields__, "options")
_CONTEXT_NAMES = ContextOptions.__struct_fields__
_LOAD_NAMES = LoadOptions.__struct_fields__


def generation_options(keywords: Mapping[str, Any]) -> GenerationOptions:
    """Return one checked value from keywords and the `options` among them; keywords win."""
    if not keywords:
        return _default
    check.check_known(keywords, _GENERATION_NAMES, "generation option")
    given = dict(keywords)
    base = given.pop("options", None)
    if base is None:
        return GenerationOptions(**given)
    if not isinstance(base, GenerationOptions):
        raise TypeError(f"options must be a GenerationOptions, not {check.describe(base)}")
    return msgspec.structs.replace(base, **given) if given else base


def context_options(keywords: Mapping[str, Any]) -> ContextOptions:
    """Return the checked options of a context."""
    check.check_known(keywords, _CONTEXT_NAMES, "context option")
    return ContextOptions(**keywords)


def load_options(keywords: Mapping[str, Any]) -> tuple[LoadOptions, ContextOptions]:
    """Return the checked options of a load, and those of its default context."""
    check.check_known(keywords, (*_LOAD_NAMES, *_CONTEXT_NAMES), "load option")
    load = {name: value for name, value in keywords.items() if name in _LOAD_NAMES}
    context = {name: value for name, value in keywords.items() if name in _CONTEXT_NAMES}
    return LoadOptions(**load), ContextOptions(**context)


def native_options(
    options: GenerationOptions,
    vocabulary: _core.Model,
    reasoning: ReasoningMarks | None = None,
    calls: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Return the form the native predict takes; token options are checked against `vocabulary`.

    `reasoning` says how the prompt's template marks reasoning, where it does, and `calls` how
    answers call tools, where they may (`CallFormat.reader`).
    """
    penalty = options.repeat_penalty
    if penalty is not None and not isinstance(penalty, RepeatPenalty):
        penalty = RepeatPenalty(penalty)
    native: dict[str, object] = {name: getattr(options, name) for name in _PLAIN}
    native["reasoning"] = reasoning
    native["calls"] = calls
    native["constraint"] = _native_constraint(options)
    native["stop"] = _native_stop(options.stop, vocabulary)
    native["top_k"] = options.top_k or 0
    for name in _TUPLES:
        value = getattr(options, name)
        native[name] = None if value is None else msgspec.structs.astuple(value)
    if options.dry is not None:
        native["dry"] = (*msgspec.structs.astuple(options.dry)[:4], list(options.dry.breakers))
    native["repeat_penalty"] = None if penalty is None else _native_penalty(penalty)
    native["overflow"] = _native_overflow(options.overflow)
    native["logit_bias"] = _native_bias(options.logit_bias, vocabulary)
    native["sampler_order"] = None if options.sampler_order is None else list(options.sampler_order)
    if options.logprobs is not None:
        check.check_int("logprobs", options.logprobs, 0, vocabulary.vocab_size())
    return native


def native_prompt(prompt: object, vocabulary: _core.Model) -> str | list[int]:
    """Return a prompt as checked text or token ids."""
    if isinstance(prompt, str):
        return check.check_text("prompt", prompt, empty=False)
    return check.check_tokens("prompt", prompt, vocabulary.vocab_size())


def _native_constraint(options: GenerationOptions) -> dict[str, object] | None:
    grammar = options.grammar
    if options.schema is not None:
        grammar = Grammar.json_schema(options.schema)
    elif options.regex is not None:
        grammar = Grammar.regex(options.regex)
    return None if grammar is None else grammar.native()


def _native_overflow(overflow: object) -> object:
    if overflow is None or (isinstance(overflow, str) and overflow in OVERFLOWS):
        return overflow
    what = check.describe(overflow)
    raise ValueError(
        f"overflow={what} is for chats; here it is one of {', '.join(OVERFLOWS)}, or None"
    )


def _native_penalty(penalty: RepeatPenalty) -> tuple[object, ...]:
    first, last_tokens, *rest = msgspec.structs.astuple(penalty)
    return (first, MAX_INT if last_tokens is None else last_tokens, *rest)


def _native_stop(stop: Stop | None, vocabulary: _core.Model) -> list[str | list[int]]:
    if stop is None or isinstance(stop, str):
        return [] if stop is None else [stop]
    size = vocabulary.vocab_size()
    return [
        item if isinstance(item, str) else check.check_tokens(f"stop[{i}]", item, size)
        for i, item in enumerate(stop)
    ]


def _native_bias(bias: LogitBias | None, vocabulary: _core.Model) -> list[tuple[int, float]]:
    if bias is None:
        return []
    size = vocabulary.vocab_size()
    return [
        (_bias_token(key, vocabulary, size), _bias_value(key, value)) for key, value in bias.items()
    ]


def _bias_token(key: object, vocabulary: _core.Model, size: int) -> int:
    if not isinstance(key, str):
        return check.check_token("logit_bias key", key, size)
    text = check.check_text("logit_bias key", key, empty=False)
    tokens = vocabulary.tokenize(text, add_bos=False, special=True)
    if len(tokens) != 1:
        raise ValueError(
            f"logit_bias text {key!r} is not one token but {len(tokens)}: {tokens[:16]}; "
            "bias those by id"
        )
    return tokens[0]


def _bias_value(key: object, value: object) -> float:
    if value == "never":
        return -math.inf
    return check.check_float(
        f"logit_bias[{key!r}]", value, -math.inf, hint='"never" forbids a token'
    )


def _optional_int(name: str, value: object, low: int, high: int, hint: str) -> None:
    if value is not None:
        check.check_int(name, value, low, high, hint=hint)


def _check_stop(name: str, value: object) -> None:
    if isinstance(value, str):
        check.check_text(name, value, empty=False)
        return
    for i, item in enumerate(check.check_items(name, value)):
        if isinstance(item, str):
            check.check_text(f"{name}[{i}]", item, empty=False)
        else:
            check.check_tokens(f"{name}[{i}]", item, MAX_INT)


def _check_order(name: str, value: object) -> None:
    names = check.check_items(name, value)
    for i, sampler in enumerate(names):
        check.check_choice(f"{name}[{i}]", sampler, SAMPLERS)
    if len(set(names)) != len(names):
        raise ValueError(f"{name} names a sampler twice: {names}")


def _check_bias(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a mapping of tokens or texts to biases, not {check.describe(value)}"
        )
    for key, bias in value.items():
        if not isinstance(key, str):
            check.check_int(f"{name} key", key, 0, MAX_INT)
        _bias_value(key, bias)


def _check_overflow(name: str, value: object) -> None:
    if not callable(value):
        names = (*OVERFLOWS, "erase_oldest")
        check.check_choice(name, value, names, hint="None stops at the limit")


def _check_penalty(name: str, value: object) -> None:
    if not isinstance(value, RepeatPenalty):
        check.check_float(name, value, 0, above=True, hint="or a RepeatPenalty; None is off")


def _instance(kind: type) -> Callable[[str, object], None]:
    def rule(name: str, value: object) -> None:
        if not isinstance(value, kind):
            raise TypeError(
                f"{name} must be {kind.__name__}(...) or None, not {check.describe(value)}"
            )

    return rule


def _integer(low: int, high: int = MAX_INT, hint: str = "") -> Callable[[str, object], object]:
    return lambda name, value: check.check_int(name, value, low, high, hint=hint)


def _real(
    low: float, high: float | None = None, *, above: bool = False, hint: str = ""
) -> Callable[[str, object], object]:
    return lambda name, value: check.check_float(name, value, low, high, above=above, hint=hint)


def _texts(name: str, value: object) -> list[str]:
    return [
        check.check_text(f"{name}[{i}]", item, empty=False)
        for i, item in enumerate(check.check_items(name, value))
    ]


def _shares(value: object) -> list[float]:
    shares = [
        check.check_float(f"tensor_split[{i}]", x, 0)
        for i, x in enumerate(check.check_items("tensor_split", value))
    ]
    if not any(shares):
        raise ValueError("tensor_split must give some device a share above 0")
    return shares


def _overrides(value: object) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise TypeError(f"metadata_overrides must be a mapping, not {check.describe(value)}")
    return {_override_key(key): _override_value(key, item) for key, item in value.items()}


def _override_key(key: object) -> str:
    text = check.check_text("metadata_overrides key", key, empty=False)
    if "\0" in text or len(text.encode()) > 127:
        raise ValueError(
            f"metadata_overrides key must be at most 127 bytes without NUL, not {text[:60]!r}"
        )
    return text


def _override_value(key: object, value: object) -> object:
    name = f"metadata_overrides[{key!r}]"
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return check.check_int(name, value, -(2**63), 2**63 - 1)
    if isinstance(value, float):
        return check.check_float(name, value, -math.inf)
    text = check.check_text(name, value)
    if "\0" in text or len(text.encode()) > 127:
        raise ValueError(f"{name} must be at most 127 bytes without NUL, not {text[:60]!r}")
    return text


def _adapter(index: int, item: object) -> tuple[str, float]:
    path, scale = item if isinstance(item, tuple) and len(item) == 2 else (item, 1.0)
    return check.check_path(f"lora[{index}]", path), check.check_float(
        f"lora[{index}] scale", scale, -math.inf
    )


_RULES: dict[str, Callable[[str, Any], object]] = {
    "max_tokens": _integer(0, hint="None means no limit"),
    "stop": _check_stop,
    "temperature": _real(0, hint="0 is greedy"),
    "deterministic": check.check_bool,
    "top_k": _integer(1, hint="None means all tokens"),
    "top_p": _real(0, 1, above=True, hint="1 is off"),
    "min_p": _real(0, 1, hint="0 is off"),
    "typical_p": _real(0, 1, above=True, hint="None is off"),
    "top_n_sigma": _real(0, above=True, hint="None is off"),
    "xtc": _instance(Xtc),
    "dry": _instance(Dry),
    "mirostat": _instance(Mirostat),
    "dynamic_temperature": _instance(DynamicTemperature),
    "repeat_penalty": _check_penalty,
    "logit_bias": _check_bias,
    "seed": _integer(0, MAX_SEED, hint="None draws one"),
    "sampler_order": _check_order,
    "logprobs": _integer(0, hint="None is off"),
    "logits_processor": check.check_callable,
    "ignore_eos": check.check_bool,
    "grammar": _instance(Grammar),
    "schema": lambda _, value: schema_of(value),
    "regex": check.check_text,
    "response_prefix": check.check_text,
    "trim_trailing_whitespace": check.check_bool,
    "reasoning_budget": _integer(0, hint="None means no limit"),
    "priority": _integer(-MAX_INT),
    "deadline": _real(0, MAX_SECONDS, above=True, hint="seconds from now; None means no limit"),
    "overflow": _check_overflow,
    "max_pending": _integer(1, hint="None never pauses"),
    "token_batching": _instance(TokenBatching),
    "special": check.check_bool,
}

_REQUIRED = frozenset(
    (
        "temperature",
        "deterministic",
        "top_p",
        "min_p",
        "ignore_eos",
        "trim_trailing_whitespace",
        "priority",
        "special",
    )
)
_TUPLES = ("xtc", "dry", "mirostat", "dynamic_temperature", "token_batching")
_PLAIN = tuple(
    name
    for name in GenerationOptions.__struct_fields__
    if name
    not in {
        *_TUPLES,
        *("stop", "top_k", "repeat_penalty", "overflow", "logit_bias", "sampler_order"),
        *("grammar", "schema", "regex"),
    }
)
_default = GenerationOptions()
