"""From the words of the command line to an exit status."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from llamactor.cli.arguments import ChatArguments, parse
from llamactor.cli.chat import chat
from llamactor.cli.complete import complete
from llamactor.cli.terminal import (
    Interrupts,
    discard_output,
    explained,
    replace_what_cannot_be_written,
    say,
)
from llamactor.errors import LlamactorError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamactor.cli.arguments import CompleteArguments

FAILED = 1
INTERRUPTED = 130
"""What shells report for a process that Ctrl-C has ended."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    It is 0, or 1 after a failure, which stderr tells, or 130 after Ctrl-C (143 after SIGTERM).
    Wrong arguments end the program with 2.

    Args:
        words: Those after the program's name; None takes the process's own.
    """
    arguments = parse(words)
    replace_what_cannot_be_written()
    try:
        return asyncio.run(_run(arguments))
    except BrokenPipeError:
        discard_output()
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except (LlamactorError, OSError, ValueError) as error:
        say(f"llamactor: {explained(error)}\n")
        return FAILED


async def _run(arguments: ChatArguments | CompleteArguments) -> int:
    task = asyncio.current_task()
    assert task is not None
    interrupts = Interrupts(task.cancel)
    try:
        with interrupts:
            if isinstance(arguments, ChatArguments):
                return await chat(arguments, interrupts)
            return await complete(arguments)
    except asyncio.CancelledError:
        return interrupts.status
