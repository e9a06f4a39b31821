"""docs/tools.md: its programs run as they stand, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import llamactor
from tests.documents import anchors, blocks, linked_anchors, output_of_program

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
PROGRAMS = {
    section.partition("\n")[0]: program
    for section in re.split(r"^### ", GUIDE, flags=re.MULTILINE)[1:]
    for program in blocks(section, "python")
}
ANSWER = (
    "The price of apple is $6. The price of banana is $4. Yes, apple is more expensive than banana."
)


def lines(title: str) -> list[str]:
    return output_of_program(PROGRAMS[title], ROOT).splitlines()


# --- the first tool -------------------------------------------------------------------------------


def test_a_function() -> None:
    assert lines("A function") == [
        "User: Is an apple more expensive than a banana?",
        f"AI: {ANSWER}",
        "UserMessage Is an apple more expensive than a banana?",
        "AssistantMessage ",
        'ToolMessage {"name": "apple", "price": "$6"}',
        'ToolMessage {"name": "banana", "price": "$4"}',
        f"AssistantMessage {ANSWER}",
    ]


def test_step_by_step() -> None:
    told = lines("Step by step")
    assert told[0] == "round 0"
    assert {"result of apple $6", "result of banana $4"} <= set(told)
    order = ["call 0 get_fruit_price", "arguments {'name': 'apple'}"]
    order += ["call 1 get_fruit_price", "arguments {'name': 'banana'}", "round 1"]
    assert [line for line in told if line in order] == order
    assert (
        "".join(line.removeprefix("text ") for line in told if line.startswith("text ")) == ANSWER
    )


def test_without_a_session() -> None:
    asked, result, said, answer, cost = lines("Without a session")
    assert "name='multiply', arguments={'a': 12, 'b': 34}" in asked
    assert result.startswith("ToolMessage(content='408")
    assert said.startswith("AssistantMessage(content='12 * 34 is 408.'")
    assert answer == "AI: 12 * 34 is 408."
    assert re.fullmatch(r"2 rounds, [3-8]\d tokens", cost)


# --- what runs ------------------------------------------------------------------------------------


def test_at_the_same_time() -> None:
    told = lines("At the same time")
    assert told[:2] == ["asking for apple", "asking for banana"]
    assert told[4:] == ["asking for apple", "known: apple", "asking for banana", "known: banana"]


def test_when_a_tool_fails() -> None:
    told, answer, raised = lines("When a tool fails")
    reason = "the tool 'get_fruit_price' failed: LookupError: no mango today"
    assert told == f'told: {{"error": "{reason}"}}'
    assert re.match("AI: .", answer)
    assert raised == f"raised: {reason} | {{'name': 'mango'}} | LookupError('no mango today')"


def test_a_guard() -> None:
    assert lines("A guard") == [
        "$6",
        '(called with {"name": "apple"} instead) $6',
        '{"error": "the call was denied: not this one"}',
    ]


def test_limits() -> None:
    assert lines("Limits") == [
        "1 -> 1 rounds, 0 calls",
        "2 -> 2 rounds, 1 calls",
        "None -> 2 rounds, 1 calls",
    ]


# --- calls ----------------------------------------------------------------------------------------


def test_calls_that_are_returned() -> None:
    assert lines("Calls that are returned") == ["tool_calls", f"AI: {ANSWER}"]


@pytest.mark.model
def test_a_call_that_must_come() -> None:
    switched, call = lines("A call that must come")
    assert re.fullmatch(r"the light in the (kitchen|bedroom) is (on|off)", switched)
    assert re.fullmatch(r"set_light \{('room': '(kitchen|bedroom)'|, |'on': (True|False))+\}", call)


# --- what it names --------------------------------------------------------------------------------


def test_there_is_a_test_for_every_program() -> None:
    words = {re.sub(r"\W+", "_", title).lower() for title in PROGRAMS}
    assert len(PROGRAMS) == len(blocks(GUIDE, "python"))
    assert {name for name in words if f"test_{name}" not in globals()} == set()


def test_the_contents_are_those_of_the_guide() -> None:
    assert linked_anchors(GUIDE) == anchors(GUIDE)


def test_everything_it_names_exists() -> None:
    named = set(re.findall(r"llamactor\.([A-Za-z]\w*)", GUIDE))
    assert {name for name in named if not hasattr(llamactor, name)} == set()
    fields = set(re.findall(r"`result\.(\w+)`", GUIDE))
    assert fields <= set(llamactor.PredictionResult.__struct_fields__)
