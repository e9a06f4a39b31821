"""docs/cli.md: the commands in it do what it shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llamactor.cli.program import COMMANDS
from tests.conftest import PATIENCE, TINYCHAT
from tests.documents import blocks
from tests.hub import Hub, running

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
QUICK = ["bench", "--rounds", "1", "--prompt-tokens", "16", "--tokens", "2"]
"""What is run in place of a bench of some minutes."""


def shown() -> list[tuple[str, str]]:
    """The commands of the guide in their order, each with what it is shown to write."""
    parts = [
        part.partition("\n")
        for block in blocks(GUIDE, "console")
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    ]
    return [(command, output) for command, _, output in parts]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home with what the guide takes for granted: a hub, a model file, a story."""
    for name in ("LLAMACTOR_MODELS_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    program = tmp_path / "bin" / "llamactor"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m llamactor "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "models").mkdir()
    shutil.copy(TINYCHAT, tmp_path / "models" / "mistral.gguf")
    (tmp_path / "story.txt").write_text("Once upon a time")
    (tmp_path / "person.json").write_text('{"type": "object", "required": ["name"]}')
    hub = Hub()
    hub.add("owner/Tiny-GGUF", "Tiny-Q8_0.gguf", TINYCHAT.read_bytes() + bytes(32))
    with running(hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield tmp_path


def written(command: str, folder: Path) -> str:
    """What a command writes there, on stdout and stderr."""
    if command.startswith("llamactor bench"):
        command = shlex.join(["llamactor", *QUICK])
    done = subprocess.run(
        ["sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        cwd=folder,
        text=True,
        timeout=PATIENCE * 2,
    )
    return done.stdout


def shape(text: str) -> list[list[str]]:
    """The words of each line, without folders, and with all numbers alike."""
    plain = re.sub(r"\d+(?:\.\d+)?", "N", re.sub(r"\S*/(?=\S)", "", text))
    return [line.split() for line in plain.splitlines()]


@pytest.mark.model
def test_the_commands_of_the_guide_do_what_it_shows(shell: Path) -> None:
    for command, output in shown():
        lines = written(command, shell)
        if command.startswith(("llamactor ps", "llamactor bench")):
            # Which processes there are, and how fast this machine is, the guide cannot know.
            heading = output.splitlines()[0].split()
            assert heading[0] in lines.split()
        elif output:
            assert shape(lines) == shape(output), command
        else:
            assert "llamactor: " not in lines, (command, lines)


def test_the_guide_names_every_command() -> None:
    for name in [*COMMANDS, "presets"]:
        assert f"`{name}" in GUIDE
        assert f"llamactor {name}" in GUIDE or name in {"prune"}


def test_the_guide_names_no_flag_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    from llamactor.cli import main

    known = {"--help", "--version", "--install-completion"}
    for words in [*([name] for name in COMMANDS), ["presets", "set"], ["presets"]]:
        assert main([*words, "--help"]) == 0
        known |= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", GUIDE)) <= known
