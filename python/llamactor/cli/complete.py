"""``llamactor complete``: continue a text."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from llamactor.cli.terminal import STDIN, loaded, read_all, say, statistics, write
from llamactor.loading import load_model

if TYPE_CHECKING:
    from llamactor.cli.arguments import CompleteArguments


async def complete(arguments: CompleteArguments) -> int:
    """Continue the prompt on stdout and return the exit status.

    Cancelling this cancels the prediction and closes the model.
    """
    prompt = await _prompt_of_stdin() if arguments.prompt is None else arguments.prompt
    async with await loaded(load_model(arguments.model, **arguments.loading)) as model:
        async with model.complete(prompt, **arguments.generation) as prediction:
            async for text in prediction:
                write(text)
            result = await prediction
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
