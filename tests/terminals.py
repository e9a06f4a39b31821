"""Commands in processes of their own, at a terminal and over pipes."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

from tests.conftest import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-W", "error", "-m", "llamactor"]

AT_THE_TERMINAL = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
"""Makes its stdin the terminal that its keys belong to, and becomes another program."""

PROMPT, ANSWERING = "\x1b[?2004h", "\x1b[?2004l"
"""What prompt_toolkit says to the terminal when it begins to read a line, and when it has one."""

ENTER, UP, TAB = "\r", "\x1b[A", "\t"
CONTROL_C, CONTROL_D = "\x03", "\x04"


class Terminal:
    """A process at a pseudo-terminal, and what it has shown."""

    def __init__(self, words: list[str], **more: str) -> None:
        self._screen, process_side = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **more}
        streams: Any = dict.fromkeys(("stdin", "stdout", "stderr"), process_side)
        command = [sys.executable, "-c", AT_THE_TERMINAL, *words]
        termios.tcsetwinsize(process_side, (24, 200))
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            command, env=environment, **streams
        )
        os.close(process_side)
        self._shown = ""
        self._deadline = time.monotonic() + PATIENCE

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def shows(self, pattern: str) -> re.Match[str]:
        """Wait until the terminal shows this; what comes next is looked for behind it."""
        while not (match := re.search(pattern, self._shown, re.DOTALL)):
            assert self._read(), f"it ended without {pattern!r}: {self._shown!r}"
        self._shown = self._shown[match.end() :]
        return match

    def asks(self) -> str:
        """Wait for the next prompt, and return what was shown before it."""
        return bare(self.shows(f"(.*?){re.escape(PROMPT)}")[1])

    def says(self, line: str) -> str:
        """Type a line at the prompt, and return what is shown until the next one."""
        self.type(line + ENTER)
        return self.asks().partition(f"> {line}\n")[2]

    def ends(self) -> int:
        """Wait for the end of the process and return its status."""
        while self._read():
            pass
        return self.process.wait(PATIENCE)

    def echoes(self) -> bool:
        """Whether the terminal shows by itself what is typed, as shells expect it to."""
        return bool(termios.tcgetattr(self._screen)[3] & termios.ECHO)

    def _read(self) -> bool:
        left = self._deadline - time.monotonic()
        ready, _, _ = select.select([self._screen], [], [], max(0, left))
        assert ready, f"nothing more came after {self._shown!r}"
        try:
            new = os.read(self._screen, 1 << 16)
        except OSError:  # what Linux says when nobody has the other side open
            new = b""
        self._shown += new.decode(errors="replace")
        return bool(new)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


def bare(shown: str) -> str:
    """What was shown, without what commands the terminal, lines as they are read."""
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", shown).replace("\b", "")
    lines = text.replace("\r\r\n", "\r\n").replace("\r\n", "\n").split("\n")
    return "\n".join(line.rpartition("\r")[2].rstrip() for line in lines)


def piped(
    command: list[str], text: str | bytes = "", **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command that reads `text` from a pipe."""
    done = subprocess.run(
        command,
        input=text.encode() if isinstance(text, str) else text,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        cwd=ROOT,
        env={**os.environ, **more},
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def outcome(done: subprocess.CompletedProcess[str]) -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr
