"""What commands share on the command line: the model, its options and those of an answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast

from cyclopts import Group, Parameter

from llamactor.cli.completing import complete_preset, complete_reference, complete_stored
from llamactor.grammar import Grammar
from llamactor.options import (
    GenerationKeywords,
    LoadKeywords,
    generation_options,
    load_options,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cyclopts import Token

ANSWER = Group("The answer", sort_key=2)
LOADING = Group("The model", sort_key=3)
OUTPUT = Group("Output", sort_key=4)

REFERENCE = Parameter(
    help='Path of a .gguf, a name that "llamactor ls" shows, "hf:owner/repo:Q4_K_M" on the hub, or '
    '"pkg:name" for the one inside an installed Python package.',
    completer=complete_reference,
)
Reference: TypeAlias = Annotated[str, Parameter(name="REF"), REFERENCE]
"""The first word of a command that has to do with one model."""
StoredName: TypeAlias = Annotated[
    str, Parameter(name="NAME", completer=complete_stored, help='A name that "llamactor ls" shows.')
]
PresetName: TypeAlias = Annotated[
    str, Parameter(name="NAME", completer=complete_preset, help="What it is called.")
]
Preset: TypeAlias = Annotated[
    str | None,
    Parameter(
        metavar="NAME",
        group=LOADING,
        completer=complete_preset,
        help='Options that "llamactor presets" shows, for what is not given here.',
    ),
]


def number_or(word: str) -> Callable[[object, Sequence[Token]], int | str]:
    """Return what reads a whole number or `word`."""

    def read(_: object, tokens: Sequence[Token]) -> int | str:
        text = tokens[0].value
        try:
            return text if text == word else int(text)
        except ValueError:
            raise ValueError(f'{text!r} is neither a whole number nor "{word}"') from None

    return read


def variable(_: object, tokens: Sequence[Token]) -> list[tuple[str, object]]:
    """Read words ``NAME=VALUE``; a value that is no JSON is text."""
    return [_variable(token.value) for token in tokens]


def _variable(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


Auto: TypeAlias = Annotated[
    int | str | None, Parameter(converter=number_or("auto"), metavar="N|auto")
]
All: TypeAlias = Annotated[int | str | None, Parameter(converter=number_or("all"), metavar="N|all")]
Text: TypeAlias = Annotated[str | None, Parameter(allow_leading_hyphen=True, metavar="TEXT")]
KvType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]


# What was not given is None, False or (): that a saved chat or a preset may have set it stays so.


@Parameter(name="*", group=LOADING, negative=(), show_default=False)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadFlags:
    """How a model is loaded."""

    context_size: Auto = None
    """Tokens it has room for (as trained, at most 8192)."""
    threads: Annotated[int | None, Parameter(metavar="N")] = None
    """Compute threads (physical cores less one)."""
    gpu_layers: Auto = None
    """Layers on the GPU, if there is one (all)."""
    flash_attention: Literal["auto", "on", "off"] | None = None
    """Fused attention (auto)."""
    kv_type_k: KvType | None = None
    """Type of the cached keys (f16)."""
    kv_type_v: KvType | None = None
    """Type of the cached values (f16)."""

    def keywords(self, **more: object) -> LoadKeywords:
        """Return what was given, checked, with `more` for what was not.

        Raises:
            ValueError: an option is out of range.
        """
        options = more | _given(self)
        load_options(options)
        return cast("LoadKeywords", options)


@Parameter(name="*", group=ANSWER, negative=(), show_default=False)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """How an answer is generated."""

    max_tokens: Annotated[int | None, Parameter(metavar="N")] = None
    """Most tokens of an answer (no limit)."""
    temperature: Annotated[float | None, Parameter(metavar="X")] = None
    """0 takes the likeliest token (0)."""
    top_k: All = None
    """Draw from the N likeliest tokens (40)."""
    top_p: Annotated[float | None, Parameter(metavar="X")] = None
    """Draw from the likeliest that have this probability together (1)."""
    min_p: Annotated[float | None, Parameter(metavar="X")] = None
    """Draw from tokens this likely relative to the likeliest (0)."""
    typical_p: Annotated[float | None, Parameter(metavar="X")] = None
    """Locally typical sampling (off)."""
    top_n_sigma: Annotated[float | None, Parameter(metavar="X")] = None
    """Draw within X standard deviations of the best (off)."""
    repeat_penalty: Annotated[float | None, Parameter(metavar="X")] = None
    """Penalty on tokens seen lately; 1.1 is usual (off)."""
    seed: Annotated[int | None, Parameter(metavar="N")] = None
    """Seed of the draw (a new one each time)."""
    stop: Annotated[list[str] | None, Parameter(allow_leading_hyphen=True, metavar="TEXT")] = None
    """End where this text comes; may be given again."""
    reasoning_budget: Annotated[int | None, Parameter(metavar="N")] = None
    """Most tokens of a thought, where the model has such (no limit)."""
    response_prefix: Text = None
    """Begin the answer with this text."""
    deterministic: bool = False
    """Evaluate in fixed steps, so that it repeats bit for bit."""
    ignore_eos: bool = False
    """Go on past the end that the model sees."""

    def keywords(self, **more: object) -> GenerationKeywords:
        """Return what was given, checked, and `more`.

        Raises:
            ValueError: an option is out of range.
        """
        options = _given(self) | more
        generation_options(options)
        return cast("GenerationKeywords", options)


@Parameter(name="*", group=ANSWER, negative=(), show_default=False)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeFlags:
    """What an answer may be; one of them at most."""

    schema: Path | None = None
    """The answer is JSON that fits the JSON Schema in this file."""
    regex: Text = None
    """The answer matches this regular expression."""
    grammar: Annotated[str | None, Parameter(metavar="PATH|NAME")] = None
    """The answer fits the grammar in this file, .lark or GBNF, or one of those built in: json,
    json_array, list, arithmetic, chess, english, japanese."""

    def keywords(self) -> dict[str, Any]:
        """Return what was given, as options of a prediction.

        Raises:
            ValueError: a file is not what it should be.
            OSError: it cannot be read.
        """
        options: dict[str, Any] = {}
        if self.schema is not None:
            options["schema"] = _json_file(self.schema)
        if self.regex is not None:
            options["regex"] = self.regex
        if self.grammar is not None:
            options["grammar"] = _grammar(self.grammar)
        return options


def _json_file(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _grammar(place: str) -> Grammar:
    """Return the grammar of a file, or the one built in that has this name."""
    path = Path(place)
    if not path.suffix and not path.exists():
        return Grammar.builtin(place)
    text = path.read_text(encoding="utf-8")
    return Grammar.lark(text) if path.suffix == ".lark" else Grammar.gbnf(text)


@Parameter(name="*", group=ANSWER, negative=(), show_default=False)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFlags(AnswerFlags):
    """How the answers of a chat are generated."""

    overflow: (
        Literal["erase_oldest", "truncate_middle", "rolling_window", "stop_at_limit"] | None
    ) = None
    """What to do when the context is full (erase_oldest)."""


@Parameter(name="*", group=ANSWER, negative=(), show_default=False)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionFlags(AnswerFlags):
    """How a text is continued."""

    overflow: Literal["truncate_middle", "rolling_window", "stop_at_limit"] | None = None
    """What to do when the context is full (stop_at_limit)."""


def _given(flags: LoadFlags | AnswerFlags) -> dict[str, Any]:
    """Return the options that were given, by their names in Python."""
    values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(flags)}
    return {
        name: None if value == "all" else value
        for name, value in values.items()
        if value is not None and value is not False
    }


Stats: TypeAlias = Annotated[
    bool,
    Parameter(
        group=OUTPUT, negative=(), show_default=False, help="Say on stderr what an answer took."
    ),
]
Json: TypeAlias = Annotated[
    bool,
    Parameter(
        name="--json",
        group=OUTPUT,
        negative=(),
        show_default=False,
        help="One JSON document on stdout.",
    ),
]
