"""The programs in the project's documents, and what they print."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.conftest import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a Markdown text in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def output_of_program(program: str, folder: Path) -> str:
    """What it prints, run in `folder` by an interpreter of its own, where a warning is an error."""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(
        command, capture_output=True, check=False, cwd=folder, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def programs_of(guide: str) -> dict[str, str]:
    """The programs by the headings they stand under; a second one there has a 2 behind it."""
    found: dict[str, str] = {}
    for section in re.split(r"^### ", guide, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        for number, program in enumerate(blocks(section, "python"), start=1):
            found[title if number == 1 else f"{title} {number}"] = program
    return found


def linked_anchors(guide: str) -> set[str]:
    """What its links into itself lead to."""
    return set(re.findall(r"\(#([\w-]+)\)", guide))


def anchors(guide: str) -> set[str]:
    """What its headings, but for the title, can be linked by."""
    headings = re.findall(r"^##+ (.*)$", guide, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).replace(" ", "-").lower() for title in headings}


class Runs:
    """Runs programs of a guide in one folder, each once."""

    def __init__(self, programs: Mapping[str, str], folder: Path) -> None:
        self.folder = folder
        self._programs = programs
        self._outputs: dict[str, str] = {}

    def output(self, title: str) -> str:
        """What the program under a heading prints."""
        if title not in self._outputs:
            self._outputs[title] = output_of_program(self._programs[title], self.folder)
        return self._outputs[title]

    def answers(self, title: str) -> list[str]:
        """What it prints behind "AI:"."""
        return re.findall(r"^AI: *(\S[^\n]*)", self.output(title), re.MULTILINE)

    def numbers(self, title: str) -> list[tuple[int, ...]]:
        """The numbers in each line of its output."""
        return [tuple(map(int, re.findall(r"\d+", line))) for line in self.lines(title)]

    def lines(self, title: str) -> list[str]:
        """The lines of its output."""
        return self.output(title).splitlines()
