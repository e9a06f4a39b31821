"""Results on stdout: tables for people, JSON for programs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import msgspec

from llamactor.cli.terminal import visible, write

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.table import Table
    from rich.text import Text

# Rich is imported where it is used: `chat` and `complete` need none of it.

WIDE = 10_000
"""Columns of a pipe: nothing is folded for a program that reads it."""


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()
) -> None:
    """Write a table with a heading for each column.

    Args:
        columns: The headings.
        rows: A value for each column; None is shown as "-".
        right: Columns of numbers.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    numbers = set(right)
    for name in columns:
        justify: Any = "right" if name in numbers else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name in numbers)
    for row in rows:
        table.add_row(*map(_cell, row))
    _print(table)


def show_values(values: Mapping[str, object]) -> None:
    """Write names and their values, a line for each."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name, _cell(value))
    _print(table)


def show_title(text: str) -> None:
    """Write the heading of what follows."""
    from rich.text import Text

    _print(Text(f"\n{visible(text)}", style="bold"))


def show_json(value: object) -> None:
    """Write one JSON document."""
    write(msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode() + "\n")


def size(count: float | None) -> str | None:
    """Return bytes in the unit that fits, such as "98.1 MB"."""
    from rich.filesize import decimal

    return None if count is None else decimal(int(count))


def counted(number: int) -> str:
    """Return a count of weights in the unit that fits, such as "135M"."""
    for unit, length in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= length:
            return f"{number / length:.3g}{unit}"
    return str(number)


def _cell(value: object) -> Text:
    from rich.text import Text

    return Text("-" if value is None else visible(str(value)))


def _print(shown: Table | Text) -> None:
    from rich.console import Console

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else WIDE, highlight=False)
    with console.capture() as captured:
        console.print(shown)
    # Rich fills the last column with blanks.
    lines = (line.rstrip() for line in captured.get().splitlines())
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
