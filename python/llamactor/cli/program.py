"""From the words of the command line to an exit status."""

from __future__ import annotations

import asyncio
import importlib.metadata
import sys
from typing import TYPE_CHECKING, Any

from cyclopts import App, CycloptsError, UnusedCliTokensError

from llamactor.cli.bench import bench
from llamactor.cli.chat import chat
from llamactor.cli.complete import complete
from llamactor.cli.info import info
from llamactor.cli.models import import_, ls, prune, pull, rm, verify
from llamactor.cli.presets import presets
from llamactor.cli.ps import ps
from llamactor.cli.terminal import (
    Interrupts,
    Status,
    complain,
    discard_output,
    explained,
    replace_what_cannot_be_written,
)
from llamactor.errors import LlamactorError, ModelNotFoundError, PresetNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llamactor.cli.terminal import Work

COMMANDS: dict[str, Callable[..., Work]] = {
    "chat": chat,
    "complete": complete,
    "ls": ls,
    "info": info,
    "pull": pull,
    "import": import_,
    "rm": rm,
    "prune": prune,
    "verify": verify,
    "ps": ps,
    "bench": bench,
}
STATUSES = """\
Exit status: 0 done, 1 failed (stderr says why, in one line), 2 wrong arguments, \
3 no such model or preset, 130 Ctrl-C, 143 SIGTERM. NO_COLOR turns colours off.\
"""
NOT_FOUND = (ModelNotFoundError, PresetNotFoundError)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; see `Status`.

    Args:
        words: Those after the program's name; None takes the process's own.
    """
    words = sys.argv[1:] if words is None else words
    replace_what_cannot_be_written()
    try:
        work = _parsed(words)
        status = Status.DONE if work is None else asyncio.run(_run(work))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        discard_output()
        return Status.DONE
    except KeyboardInterrupt:
        return Status.INTERRUPTED
    except WrongArgumentsError as error:
        complain(error)
        return Status.WRONG_ARGUMENTS
    except (LlamactorError, OSError, TypeError, ValueError) as error:
        complain(error)
        return Status.NOT_FOUND if isinstance(error, NOT_FOUND) else Status.FAILED


class WrongArgumentsError(Exception):
    """What the words say is no command, or one that cannot be."""


def _parsed(words: Sequence[str]) -> Work | None:
    """Return what the words say is to be done; None if that was help, and is done."""
    app = _app()
    try:
        command, bound, _ = app.parse_args(words, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        raise WrongArgumentsError(_one_line(error)) from None
    try:
        work: Any = command(*bound.args, **bound.kwargs)
    except (OSError, TypeError, ValueError) as error:
        raise WrongArgumentsError(explained(error)) from error
    return work if callable(work) else None


def _one_line(error: CycloptsError) -> str:
    chain = " ".join(["llamactor", *(error.command_chain or ())])
    if isinstance(error, UnusedCliTokensError):
        text = f"nothing is to be done with {' '.join(error.unused_tokens or ())!r}"
    else:
        text = str(error).rstrip().removesuffix(".")
    return f"{text}; see {chain} --help"


def _app() -> App:
    app = App(
        name="llamactor",
        help="Local language models: fetch them, look at them, talk with them, measure them.",
        help_format="markdown",
        help_epilogue=STATUSES,
        version=importlib.metadata.version("llamactor"),
    )
    for name, command in COMMANDS.items():
        app.command(command, name=name, help_epilogue="")
    app.command(presets)
    app.register_install_completion_command(help_epilogue="")
    return app


async def _run(work: Work) -> int:
    task = asyncio.current_task()
    assert task is not None
    interrupts = Interrupts(task.cancel)
    try:
        with interrupts:
            return await work(interrupts)
    except asyncio.CancelledError:
        return interrupts.status
