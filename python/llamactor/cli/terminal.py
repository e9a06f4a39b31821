"""What all commands share with the user: Ctrl-C, streams, progress, statistics."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import io
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import msgspec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import rich.progress

    from llamactor.loading import Loading
    from llamactor.model import Model
    from llamactor.prediction import PredictionResult

STDIN = 0
READ_SIZE = 1 << 16
MAX_LINE_BYTES = 16 << 20
"""The longest line of a pipe; no text may be longer."""

_PICTURES = str.maketrans(
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: "\u2421"}
    | dict.fromkeys(range(0x80, 0xA0), "\ufffd")
)


class Status(enum.IntEnum):
    """What the program's exit status says."""

    DONE = 0
    FAILED = 1
    """Stderr says why, in one line."""
    WRONG_ARGUMENTS = 2
    NOT_FOUND = 3
    """There is no such model or preset."""
    INTERRUPTED = 130
    """What shells report for a process that Ctrl-C has ended."""


class Interrupts:
    """What Ctrl-C does: the action that was set last, for as long as it is set.

    Entered, it takes SIGINT from the event loop, and SIGTERM and SIGHUP too. Those always do the
    first action, which should end the program; it then has time to give the terminal back.
    """

    def __init__(self, action: Callable[[], object]) -> None:
        """Do `action` while nothing else is set."""
        self._actions = [action]
        self.status = 128 + signal.SIGINT
        """The exit status of a process that was ended by the last signal, as shells report it."""

    @contextlib.contextmanager
    def calling(self, action: Callable[[], object]) -> Iterator[None]:
        """Do `action` instead, inside the block."""
        self._actions.append(action)
        try:
            yield
        finally:
            self._actions.remove(action)

    def fire(self) -> None:
        """Do what is to be done now."""
        self._actions[-1]()

    def _end(self, number: int) -> None:
        self.status = 128 + number
        self._actions[0]()

    def __enter__(self) -> Interrupts:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self.fire)
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._end, number)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)


Work: TypeAlias = Callable[[Interrupts], Coroutine[Any, Any, int]]
"""What a command does when its arguments are right; its value is the exit status."""


def write(text: str, *, faint: bool = False) -> None:
    """Write to stdout at once; a terminal gets no control characters but newline and tab.

    Args:
        text: What to write.
        faint: In a faint colour, if stdout is a terminal that has one.
    """
    if sys.stdout.isatty():
        text = visible(text)
        if faint and has_colours():
            text = f"\x1b[2m{text}\x1b[22m"
    sys.stdout.write(text)
    sys.stdout.flush()


def say(text: str) -> None:
    """Write to stderr at once."""
    sys.stderr.write(text)
    sys.stderr.flush()


def visible(text: str) -> str:
    """Return it with pictures for control characters, which might command a terminal."""
    return text.translate(_PICTURES)


def has_colours() -> bool:
    """Return whether a terminal shows colours, and the user wants them."""
    return "NO_COLOR" not in os.environ and os.environ.get("TERM", "dumb") != "dumb"


def complain(error: object) -> None:
    """Tell on stderr what went wrong, in one line without control characters."""
    text = explained(error) if isinstance(error, Exception) else str(error)
    say(f"llamactor: {visible(' '.join(text.split()))}\n")


def explained(error: Exception) -> str:
    """Return what went wrong, in words alone."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def replace_what_cannot_be_written() -> None:
    """Let no character fail that a stream's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def discard_output() -> None:
    """Keep the interpreter's own flush at exit from failing when the reader has gone away."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """A bar on stderr, where somebody looks on; gone when the work is done."""

    def __init__(self, bar: rich.progress.Progress | None, task: Any) -> None:
        """Move a bar; made by `progress`."""
        self._bar = bar
        self._task = task

    def at(self, done: float, *, total: float | None = None, what: str | None = None) -> None:
        """Show how far it is, of how much if that was not known, and what it does."""
        if self._bar is not None:
            text = None if what is None else visible(what)
            self._bar.update(self._task, completed=done, total=total, description=text)


@contextlib.contextmanager
def progress(what: str, *, total: float | None = 1.0, in_bytes: bool = False) -> Iterator[Progress]:
    """Show the progress of what is done in the block.

    Args:
        what: What it is.
        total: The end; None is not known yet.
        in_bytes: Whether `done` and `total` are bytes.
    """
    if not sys.stderr.isatty():
        yield Progress(None, None)
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(*_columns(in_bytes=in_bytes), console=console, transient=True) as bar:
        yield Progress(bar, bar.add_task(visible(what), total=total))


def _columns(*, in_bytes: bool) -> list[rich.progress.ProgressColumn]:
    from rich import progress as bars

    name = bars.TextColumn("{task.description}", markup=False)
    if in_bytes:
        speed = bars.TransferSpeedColumn()
        return [name, bars.BarColumn(), bars.DownloadColumn(), speed, bars.TimeRemainingColumn()]
    return [name, bars.BarColumn(), bars.TaskProgressColumn()]


async def loaded(loading: Loading[Model]) -> Model:
    """Return the model, with its progress on stderr if that is a terminal.

    Cancelling this cancels the load; nothing stays loaded.
    """
    with progress("loading") as bar:
        async for step in loading:
            bar.at(step.fraction, what=f"loading: {step.stage}")
    return await loading


async def read_some(descriptor: int) -> bytes:
    """Return what can be read of it now, waiting for something; nothing at its end.

    Cancelling this loses nothing.
    """
    # A file has no events to wait for and needs none.
    with contextlib.suppress(PermissionError):
        await anyio.wait_readable(descriptor)
    return os.read(descriptor, READ_SIZE)


async def read_all(descriptor: int) -> str:
    """Return the text of it, up to its end.

    Cancelling this loses what was read.

    Raises:
        ValueError: it is not UTF-8, or too long.
    """
    data = bytearray()
    while some := await read_some(descriptor):
        data += some
        _check_length(data, "stdin")
    return _decoded(bytes(data), "stdin")


async def read_lines(descriptor: int) -> AsyncIterator[str]:
    """Yield the lines of it as they come, without their ends.

    Cancelling this loses what was read of the next line.

    Raises:
        ValueError: a line is not UTF-8, or too long.
    """
    data, number = b"", 0
    while some := await read_some(descriptor):
        *lines, data = (data + some).split(b"\n")
        for line in lines:
            number += 1
            yield _decoded(line.removesuffix(b"\r"), f"line {number} of stdin")
        _check_length(data, f"line {number + 1} of stdin")
    if data:
        yield _decoded(data, f"line {number + 1} of stdin")


def _check_length(data: bytes | bytearray, name: str) -> None:
    if len(data) > MAX_LINE_BYTES:
        raise ValueError(f"{name} is too long: at most {MAX_LINE_BYTES} bytes are possible")


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from None


def statistics(result: PredictionResult) -> str:
    """Return what a prediction took, a line for each number."""
    values = {
        "stop_reason": result.stop_reason,
        "seed": result.seed,
        **msgspec.structs.asdict(result.stats),
    }
    return "".join(f"{name:>26}  {_shown(value)}\n" for name, value in values.items())


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)
