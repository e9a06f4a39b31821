"""The programs in the project's documents, and what they print."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.conftest import PATIENCE

if TYPE_CHECKING:
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
