"""docs/structure.md: its programs run as they stand, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import llamactor
from tests.documents import Runs, anchors, blocks, linked_anchors, programs_of

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "structure.md").read_text(encoding="utf-8")
PROGRAMS = programs_of(GUIDE)


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(PROGRAMS, tmp_path_factory.mktemp("structure"))


@pytest.mark.model
def test_any_json(guide: Runs) -> None:
    first, second = guide.answers("Any JSON")
    assert "hi there" in first
    assert second.startswith("{")


@pytest.mark.model
def test_a_json_schema(guide: Runs) -> None:
    name, words, score = guide.lines("A JSON Schema")
    assert "John" in name
    assert re.fullmatch(r"Positive words: \[.*\]", words)
    assert re.fullmatch(r"Positivity: ([1-9]|10)", score)


@pytest.mark.model
def test_a_type(guide: Runs) -> None:
    output = guide.output("A type")
    assert output.startswith("The setup is ")
    assert "\nThe punchline is " in output
    assert output.endswith("\nJoke\n")


@pytest.mark.model
def test_what_an_answer_cannot_be(guide: Runs) -> None:
    good, wrong, broken, keyword, limit = guide.lines("What an answer cannot be")
    assert good == "Order(item='tea', amount=2)"
    assert wrong == "$.amount: Expected `int`, got `str` ('amount',) two"
    assert broken.startswith("this is no JSON: ")
    assert "contains" in keyword
    assert limit == "GrammarError"


@pytest.mark.model
def test_values_that_grow(guide: Runs) -> None:
    *growing, same = guide.lines("Values that grow")
    names, lengths = zip(*(line.split() for line in growing), strict=True)
    assert set(names) == {"PartialStory", "Story"}
    assert names[-1] == "Story"
    assert list(map(int, lengths)) == sorted(map(int, lengths))
    assert same == "True"


@pytest.mark.model
def test_when_the_room_ends(guide: Runs) -> None:
    lines = guide.lines("When the room ends")
    assert lines[0] == "False max_tokens True"
    assert lines[2].endswith(" True")
    assert lines[1].startswith("list ")
    assert lines[3].startswith("list ")


@pytest.mark.model
def test_grammars(guide: Runs) -> None:
    day, move, call, items, accepted = guide.lines("Grammars")
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", day)
    assert re.fullmatch(r"[a-h][1-8]-[a-h][1-8]", move)
    assert re.match(r"[a-z]{2,8}\(", call)
    assert re.match(r"(True|False) - .", items)
    assert accepted == "True False True"


def test_describing_and_repairing(guide: Runs) -> None:
    *description, first, second, nothing = guide.lines("Describing and repairing")
    assert '  "name": string,' in description
    assert first == second == "City(name='Turku', country='Finland')"
    assert nothing.startswith("this is no JSON: ")


def test_there_is_a_test_for_every_program() -> None:
    words = {re.sub(r"\W+", "_", title).lower() for title in PROGRAMS}
    assert len(PROGRAMS) == len(blocks(GUIDE, "python"))
    assert {name for name in words if f"test_{name}" not in globals()} == set()


def test_the_contents_are_those_of_the_guide() -> None:
    assert linked_anchors(GUIDE) == anchors(GUIDE)


def test_everything_the_guide_names_exists() -> None:
    named = set(re.findall(r"llamactor\.([A-Za-z]\w*)", GUIDE))
    assert {name for name in named if not hasattr(llamactor, name)} == set()
    keywords = {*llamactor.GenerationOptions.__struct_fields__}
    assert set(re.findall(r"`(\w+)=[^`]*`", GUIDE)) - keywords == set()
