"""What the command line says, checked before anything is loaded."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Mapping  # noqa: TC003 -- msgspec reads it
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import msgspec

from llamactor.cli.terminal import explained
from llamactor.options import (
    FLASH_ATTENTION,
    KV_TYPES,
    GenerationKeywords,
    GenerationOptions,
    LoadKeywords,
    generation_options,
    load_options,
)
from llamactor.store.refs import DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

REFERENCE = 'path of a .gguf, "smollm2", or "pkg:name" (%(default)s)'
CHAT_OVERFLOWS = ("erase_oldest", "truncate_middle", "rolling_window", "stop_at_limit")
RAW_OVERFLOWS = CHAT_OVERFLOWS[1:]

Flag: TypeAlias = "tuple[str, dict[str, Any]]"
"""The name of an option of Python, and what argparse needs to know of it."""


class ChatArguments(msgspec.Struct, frozen=True, kw_only=True):
    """What ``llamactor chat`` was told."""

    model: str
    """Reference of the model."""
    loading: LoadKeywords
    """Options of the load that were given."""
    generation: GenerationKeywords
    """Options of the answers that were given."""
    system_prompt: str | None = None
    """What the model is told first."""
    saved: Path | None = None
    """A saved session to go on with."""
    template_kwargs: Mapping[str, object] = {}
    """Variables for the chat template."""
    stats: bool = False
    """Whether each answer is followed by what it took, on stderr."""
    echo: bool = False
    """Whether lines that come from a pipe are printed before their answers."""


class CompleteArguments(msgspec.Struct, frozen=True, kw_only=True):
    """What ``llamactor complete`` was told."""

    model: str
    """Reference of the model."""
    loading: LoadKeywords
    """Options of the load that were given."""
    generation: GenerationKeywords
    """Options of the completion that were given."""
    prompt: str | None = None
    """Text to continue; None is what stdin says."""
    stats: bool = False
    """Whether what it took follows, on stderr."""


def parse(words: Sequence[str] | None) -> ChatArguments | CompleteArguments:
    """Return the checked arguments; what is wrong with them ends the program with status 2.

    Args:
        words: Those after the program's name; None takes the process's own.
    """
    parser = _parser()
    given = vars(parser.parse_args(words))
    command: argparse.ArgumentParser = given.pop("command")
    make: Callable[[dict[str, Any]], ChatArguments | CompleteArguments] = given.pop("make")
    try:
        return make(given)
    except (OSError, TypeError, ValueError) as error:
        command.error(explained(error))


# --- values -------------------------------------------------------------------------------------


def _number_or(word: str, meaning: object) -> Callable[[str], object]:
    """Return what reads a whole number or `word`, which means `meaning`."""

    def number(text: str) -> object:
        return meaning if text == word else int(text)

    number.__name__ = f'number or "{word}"'  # argparse says it in its message
    return number


def _variable(text: str) -> tuple[str, object]:
    """Read ``NAME=VALUE``; a value that is no JSON is text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _flag(name: str, kind: Callable[[str], object], text: str, **more: Any) -> Flag:
    letter = {int: "N", float: "X"}.get(kind, "TEXT") if isinstance(kind, type) else "N"
    if "choices" in more:
        return name, {"type": kind, "help": text, **more}
    return name, {"type": kind, "help": text, "metavar": letter, **more}


def _switch(name: str, text: str) -> Flag:
    return name, {"action": "store_true", "help": text}


LOADING: tuple[Flag, ...] = (
    _flag(
        "context_size", _number_or("auto", "auto"), "tokens it has room for (as trained, ≤ 8192)"
    ),
    _flag("threads", int, "compute threads (physical cores less one)"),
    _flag("gpu_layers", _number_or("auto", "auto"), "layers on the GPU, if there is one (all)"),
    _flag("flash_attention", str, "fused attention (auto)", choices=FLASH_ATTENTION),
    _flag("kv_type_k", str, "type of the cached keys (f16)", choices=KV_TYPES),
    _flag("kv_type_v", str, "type of the cached values (f16)", choices=KV_TYPES),
)

GENERATION: tuple[Flag, ...] = (
    _flag("max_tokens", int, "most tokens of an answer (no limit)"),
    _flag("temperature", float, "0 takes the likeliest token (0)"),
    _flag("top_k", _number_or("all", None), 'draw from the N likeliest tokens, or "all" (40)'),
    _flag("top_p", float, "draw from the likeliest that have this probability together (1)"),
    _flag("min_p", float, "draw from tokens this likely relative to the likeliest (0)"),
    _flag("typical_p", float, "locally typical sampling (off)"),
    _flag("top_n_sigma", float, "draw within X standard deviations of the best (off)"),
    _flag("repeat_penalty", float, "penalty on tokens seen lately; 1.1 is usual (off)"),
    _flag("seed", int, "seed of the draw (a new one each time)"),
    _flag("stop", str, "end where this text comes; may be given again", action="append"),
    _flag("reasoning_budget", int, "most tokens of a thought, where the model has such (no limit)"),
    _flag("response_prefix", str, "begin the answer with this text"),
    _switch("deterministic", "evaluate in fixed steps, so that it repeats bit for bit"),
    _switch("ignore_eos", "go on past the end that the model sees"),
)


def _overflow(choices: Sequence[str], default: str) -> Flag:
    text = f"what to do when the context is full ({default})"
    return _flag("overflow", str, text, choices=choices)


# --- commands -----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llamactor", description="Local language models.")
    version = importlib.metadata.version("llamactor")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_chat(commands)
    _add_complete(commands)
    return parser


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = _add_command(
        commands,
        "chat",
        "talk with a model",
        "Talk with a model. In a terminal: Ctrl-C cancels an answer, Ctrl-D ends, /help lists what "
        "else there is. Lines from a pipe are answered one after the other.",
        _chat,
    )
    chat.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="REF", help=REFERENCE)
    session = chat.add_argument_group("the conversation")
    system = session.add_mutually_exclusive_group()
    system.add_argument("--system", metavar="TEXT", help="what the model is told first")
    system.add_argument("--system-file", type=Path, metavar="PATH", help="the same, from a file")
    session.add_argument("--load", type=Path, metavar="PATH", help="go on with what /save saved")
    session.add_argument(
        "--chat-template", type=Path, metavar="PATH", help="Jinja file in place of the model's own"
    )
    session.add_argument(
        "--template-kwarg",
        type=_variable,
        action="append",
        metavar="NAME=VALUE",
        help="variable for the template, as enable_thinking=false; may be given again",
    )
    session.add_argument(
        "--echo", action="store_true", help="print lines of a pipe before their answers"
    )
    _add_shared(chat, _overflow(CHAT_OVERFLOWS, "erase_oldest"))


def _add_complete(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    complete = _add_command(
        commands,
        "complete",
        "continue a text",
        "Continue a text; special tokens in it count.",
        _complete,
    )
    complete.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help='the text; without it or with "-", from stdin'
    )
    complete.add_argument("--model", default=DEFAULT_MODEL, metavar="REF", help=REFERENCE)
    complete.add_argument(
        "--no-special", dest="special", action="store_false", help="special tokens are plain text"
    )
    _add_shared(complete, _overflow(RAW_OVERFLOWS, "stop"))


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    make: Callable[[dict[str, Any]], object],
) -> argparse.ArgumentParser:
    # Only what was given is passed on, so that a saved session keeps its own options else.
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.set_defaults(command=parser, make=make)
    return parser


def _add_shared(parser: argparse.ArgumentParser, overflow: Flag) -> None:
    _add_flags(parser.add_argument_group("the answer"), (*GENERATION, overflow))
    _add_flags(parser.add_argument_group("the model"), LOADING)
    parser.add_argument("--stats", action="store_true", help="say on stderr what an answer took")


def _add_flags(group: argparse._ArgumentGroup, flags: Iterable[Flag]) -> None:
    for name, settings in flags:
        group.add_argument(f"--{name.replace('_', '-')}", **settings)


def _chat(given: dict[str, Any]) -> ChatArguments:
    system = given.pop("system", None)
    system_file: Path | None = given.pop("system_file", None)
    if system_file is not None:
        system = system_file.read_text(encoding="utf-8").rstrip("\n")
    saved: Path | None = given.pop("load", None)
    if saved is not None and system is not None:
        raise ValueError("a saved session has its system prompt: --load or --system, not both")
    return ChatArguments(
        model=given.pop("model"),
        saved=saved,
        system_prompt=system,
        template_kwargs=dict(given.pop("template_kwarg", ())),
        echo=given.pop("echo", False),
        stats=given.pop("stats", False),
        loading=_loading(given),
        generation=_generation(given),
    )


def _complete(given: dict[str, Any]) -> CompleteArguments:
    prompt = given.pop("prompt", "-")
    if prompt == "":
        raise ValueError("the prompt is empty: there is nothing to continue")
    return CompleteArguments(
        model=given.pop("model"),
        prompt=None if prompt == "-" else prompt,
        stats=given.pop("stats", False),
        loading=_loading(given),
        generation=_generation(given),
    )


def _loading(given: dict[str, Any]) -> LoadKeywords:
    """Take the options of the load out of `given`, checked."""
    # One conversation at a time is one sequence.
    options: dict[str, Any] = {"sequences": 1}
    options |= {name: given.pop(name) for name, _ in LOADING if name in given}
    template: Path | None = given.pop("chat_template", None)
    if template is not None:
        options["chat_template"] = template.read_text(encoding="utf-8")
    load_options(options)
    return cast("LoadKeywords", options)


def _generation(given: dict[str, Any]) -> GenerationKeywords:
    """Take the options of the answer out of `given`, checked."""
    names = GenerationOptions.__struct_fields__
    options = {name: given.pop(name) for name in names if name in given}
    generation_options(options)
    return cast("GenerationKeywords", options)
