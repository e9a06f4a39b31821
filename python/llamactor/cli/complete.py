"""``llamactor complete``: continue a text."""

from __future__ import annotations

import os
import re
from functools import partial
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter

from llamactor.cli.flags import (
    ANSWER,
    REFERENCE,
    CompletionFlags,
    LoadFlags,
    Preset,
    ShapeFlags,
    Stats,
)
from llamactor.cli.terminal import STDIN, Work, read_all, say, statistics, write
from llamactor.cli.using import Wanted, using
from llamactor.store.refs import DEFAULT_MODEL

if TYPE_CHECKING:
    from llamactor.cli.terminal import Interrupts

OPTION = re.compile(r"--?[a-z][a-z-]*(=.*)?")
"""What is no text but an option that was misspelt."""


class CompleteArguments(msgspec.Struct, frozen=True, kw_only=True):
    """What a completion was told."""

    wanted: Wanted
    """The model, and how it completes."""
    prompt: str | None
    """Text to continue; None is what stdin says."""
    stats: bool
    """Whether what it took follows, on stderr."""


def complete(
    prompt: Annotated[
        str,
        Parameter(allow_leading_hyphen=True, help='The text; without it or with "-", from stdin.'),
    ] = "-",
    /,
    *,
    model: Annotated[str, Parameter(metavar="REF"), REFERENCE] = DEFAULT_MODEL,
    no_special: Annotated[
        bool,
        Parameter(
            group=ANSWER, negative=(), show_default=False, help="Special tokens are plain text."
        ),
    ] = False,
    preset: Preset = None,
    shape: ShapeFlags = ShapeFlags(),  # noqa: B008 -- frozen
    answer: CompletionFlags = CompletionFlags(),  # noqa: B008 -- frozen
    loading: LoadFlags = LoadFlags(),  # noqa: B008 -- frozen
    stats: Stats = False,
) -> Work:
    """Continue a text; special tokens in it count.

    The text goes to stdout as it is generated, without what was given.
    """
    if not prompt:
        raise ValueError("the prompt is empty: there is nothing to continue")
    if OPTION.fullmatch(prompt):
        raise ValueError(f"unknown option: {prompt}; a text that is spelt like one goes to stdin")
    arguments = CompleteArguments(
        wanted=Wanted(
            model=model,
            loading=loading.keywords(),
            generation=answer.keywords(
                **shape.keywords(), **({"special": False} if no_special else {})
            ),
            preset=preset,
        ),
        prompt=None if prompt == "-" else prompt,
        stats=stats,
    )
    return partial(_complete, arguments)


async def _complete(arguments: CompleteArguments, _: Interrupts) -> int:
    """Continue the prompt on stdout and return the exit status.

    Cancelling this cancels the prediction and closes the model.
    """
    prompt = await _prompt_of_stdin() if arguments.prompt is None else arguments.prompt
    async with using(arguments.wanted) as use:
        async with use.model.complete(prompt, **use.generation) as prediction:
            async for text in prediction:
                write(text)
            result = await prediction
        use.note(result)
        write("\n")
        if arguments.stats:
            say(statistics(result))
    return 0


async def _prompt_of_stdin() -> str:
    if os.isatty(STDIN):
        say("the text to continue, then Ctrl-D:\n")
    # The last line's end is the file's, not the text's.
    text = (await read_all(STDIN)).removesuffix("\n")
    if not text:
        raise ValueError("stdin is empty: there is nothing to continue")
    return text
