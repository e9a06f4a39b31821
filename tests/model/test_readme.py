"""README.md: its examples run as they stand, and what it names exists."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import llamactor
from llamactor import options
from tests.documents import blocks, output_of_program

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
STATS = llamactor.PredictionStats.__struct_fields__


EXAMPLES = blocks(README, "python")


@cache
def output_of(number: int) -> str:
    """What example `number` prints."""
    return output_of_program(EXAMPLES[number - 1], ROOT)


def test_there_are_seven_examples() -> None:
    headings = re.findall(r"^### (\d)\. ", README, re.MULTILINE)
    assert headings == ["1", "2", "3", "4", "5", "6", "7"]
    assert len(EXAMPLES) == len(headings)


# --- the examples -------------------------------------------------------------------------------


@pytest.mark.model
def test_the_first_example_shows_progress_text_and_every_field_of_the_statistics() -> None:
    loading, text, statistics = re.split(
        r"^ready 100%\n|\n(?=prompt_tokens = )", output_of(1), flags=re.M
    )
    assert loading.startswith("resolving 0%\n")
    assert len(text) > 20
    shown = dict(line.split(" = ") for line in statistics.splitlines())
    assert tuple(shown) == STATS
    assert (shown["predicted_tokens"], shown["cached_tokens"]) == ("32", "0")
    assert float(shown["tokens_per_second"]) > 0


@pytest.mark.model
def test_in_the_second_example_every_first_piece_comes_before_any_last() -> None:
    *pieces, summary = output_of(2).splitlines()
    assert summary == "8 answers"
    streams = [line.split()[0] for line in pieces]
    firsts = [streams.index(number) for number in "01234567"]
    lasts = [len(streams) - streams[::-1].index(number) for number in "01234567"]
    assert max(firsts) < min(lasts)


@pytest.mark.model
def test_in_the_third_example_the_client_s_leaving_cancels_the_prediction() -> None:
    head, _, rest = output_of(3).replace("\r", "").partition("\n\n")
    assert head.startswith("HTTP/1.1 200 OK\nContent-Type: text/plain")
    text, ending = rest.rstrip("\n").rsplit("\n", 1)
    assert len(text.encode()) == 40
    assert re.fullmatch(r"cancelled after [1-9]\d* tokens", ending)


@pytest.mark.model
def test_the_fourth_example_keeps_what_was_written_before_the_timeout() -> None:
    ending = re.match(r"cancelled after (\d+) tokens:(.*)", output_of(4), re.DOTALL)
    assert ending
    assert int(ending[1]) > 0
    assert len(ending[2].strip()) > 0


@pytest.mark.model
def test_in_the_fifth_example_both_branches_reuse_the_prefix_and_share_its_cells() -> None:
    *lines, last = output_of(5).splitlines()
    reused = re.findall(r"^(\d+) of (\d+) tokens reused:", "\n".join(lines), re.MULTILINE)
    assert len(reused) == 2
    (cached, evaluated), other = reused
    assert other == (cached, evaluated)
    assert cached == evaluated
    cells, held = map(int, re.findall(r"\d+", last))
    assert held - cells == int(cached)


@pytest.mark.model
def test_the_sixth_example_obeys_its_options() -> None:
    answer = re.match(
        r"(.*) \((stop_string|max_tokens) ('.'|None), seed 7\)\n", output_of(6), re.DOTALL
    )
    assert answer
    assert (answer[2], answer[3]) in {("stop_string", "'.'"), ("max_tokens", "None")}
    assert " blue" not in answer[1]
    logprobs = output_of(6)[answer.end() :].splitlines()
    assert logprobs
    for line in logprobs:
        assert re.fullmatch(r"""['"].*['"] -?\d+\.\d\d \[.*, .*\]""", line)


@pytest.mark.model
def test_in_the_seventh_example_the_second_turn_knows_the_first() -> None:
    known = re.findall(r"^\((\d+) of (\d+) tokens were known\)$", output_of(7), re.MULTILINE)
    (first, asked), (reused, prompt) = (map(int, numbers) for numbers in known)
    assert first == 0
    assert asked < reused < prompt


# --- what it names ------------------------------------------------------------------------------


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^\.PHONY: ([\w-]+)", makefile, re.MULTILINE))


@pytest.mark.parametrize("text", [README, ARCHITECTURE], ids=["README", "ARCHITECTURE"])
def test_every_make_command_is_a_target(text: str) -> None:
    code = re.findall(r"`([^`\n]+)`", text) + blocks(text, "sh")
    named = {name for part in code for name in re.findall(r"^make ([\w-]+)", part, re.MULTILINE)}
    assert named
    assert named <= targets()


def test_the_table_of_options_names_every_option() -> None:
    table = README.split("\n## Options\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)(?:=[^`]*)?`", table))
    known = {
        *options.GenerationOptions.__struct_fields__,
        *options.ContextOptions.__struct_fields__,
        *options.LoadOptions.__struct_fields__,
    }
    assert known - named == set()


def test_the_tree_of_errors_is_that_of_the_code() -> None:
    (tree,) = (block for block in blocks(README, "text") if block.startswith("LlamactorError"))
    drawn = {}
    stack: list[str] = []
    for line in tree.splitlines():
        depth, name = (
            line.index("L") if line[0] == "L" else len(line) - len(line.lstrip("│├└─ ")),
            "",
        )
        found = re.match(r"(\w+)(?: \((\w+)\))?", line.lstrip("│├└─ "))
        assert found
        name = found[1]
        del stack[depth // 4 :]
        drawn[name] = {*stack[-1:], *([found[2]] if found[2] else [])}
        stack.append(name)
    exported = {
        name: getattr(llamactor, name) for name in llamactor.__all__ if name.endswith("Error")
    }
    assert drawn == {name: set(public_bases(error)) for name, error in exported.items()}


def public_bases(error: type) -> Iterator[str]:
    """What a user can name of what a class derives from: a private base stands for its own."""
    for base in error.__bases__:
        if base.__name__.startswith("_"):
            yield from public_bases(base)
        else:
            yield base.__name__


def test_the_versions_are_those_of_the_build() -> None:
    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup = (ROOT / ".ci" / "setup").read_text(encoding="utf-8")
    assert f"a Rust toolchain ≥ {cargo['package']['rust-version']}" in README
    assert f"Python {project['requires-python'].replace('>=', '≥ ')}" in README
    assert f"llamactor {project['version']} is built over" in README
    for crate in ("llama-cpp-2", "llama-cpp-sys-2"):
        assert f"{crate} {cargo['dependencies'][crate]['version'].lstrip('=')}" in README
    model = re.search(r'^readonly default_model="(.*)"$', setup, re.MULTILINE)
    assert model
    assert model[1] in README


# --- ARCHITECTURE -------------------------------------------------------------------------------


def test_architecture_names_only_files_that_exist() -> None:
    named = set(
        re.findall(r"`((?:rust|python|tests|benches|\.ci|\.cargo)/[\w./-]*)`", ARCHITECTURE)
    )
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_architecture_names_only_tests_that_exist() -> None:
    named = set(re.findall(r"`(?:\w+::)*((?:test_)?[a-z0-9]+(?:_[a-z0-9]+){3,})`", ARCHITECTURE))
    written = "\n".join(
        path.read_text(encoding="utf-8")
        for folder, kind in (("tests", "*.py"), ("rust", "*.rs"))
        for path in sorted((ROOT / folder).rglob(kind))
    )
    assert len(named) > 20
    assert {name for name in named if not re.search(rf"\b(?:def|fn) {name}\b", written)} == set()
