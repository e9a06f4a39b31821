"""docs/: the programs in the guides run as they stand, and what the guides name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import llamactor
from llamactor import context_shift
from llamactor.cli.chat import HELP
from llamactor.options import load_options
from tests.documents import Runs, anchors, blocks, linked_anchors, programs_of

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")


PROGRAMS = programs_of(GUIDE)


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(PROGRAMS, tmp_path_factory.mktemp("guide"))


# --- the first conversation ---------------------------------------------------------------------


@pytest.mark.model
def test_two_turns(guide: Runs) -> None:
    asked = re.findall(r"^User: (.*)$", guide.output("Two turns"), re.MULTILINE)
    assert asked == ["Hi there, how are you?", "Summarize what you said."]
    assert len(guide.answers("Two turns")) == 2


@pytest.mark.model
def test_streaming(guide: Runs) -> None:
    assert guide.answers("Streaming") == guide.answers("Two turns")[:1]


@pytest.mark.model
def test_in_batches(guide: Runs) -> None:
    lines = guide.lines("In batches")
    pieces = [ast.literal_eval(line.removeprefix("piece: ")) for line in lines if line[:1] == "p"]
    asked, answered = (line.split(" ", 2)[1:] for line in lines if line[:1] == "m")
    assert asked == ["UserMessage", repr("Hi there, how are you?")]
    assert answered == ["AssistantMessage", repr("".join(pieces))]
    assert 2 <= len(pieces) <= 5


@pytest.mark.model
def test_cancelling(guide: Runs) -> None:
    piece, history = re.fullmatch(
        r"AI: (.*?)\n(\[.*\])\n", guide.output("Cancelling"), re.S
    ).groups()  # type: ignore[union-attr]
    assert history.startswith("['Tell me a very long story.', ")
    assert f"{piece}"[:10].strip() in history
    assert history.count("Why did you stop?") == 1


@pytest.mark.model
def test_step_by_step(guide: Runs) -> None:
    *_, counted, color = guide.lines("Step by step")
    assert re.fullmatch(r"([1-9]|[1-4]\d|50) tokens", counted)
    assert color


# --- how it answers -----------------------------------------------------------------------------


@pytest.mark.model
def test_the_system_prompt(guide: Runs) -> None:
    (answer,) = guide.answers("The system prompt")
    assert "tree" in answer


@pytest.mark.model
def test_temperature_and_seed(guide: Runs) -> None:
    parts = re.split(r"^(\d+): ", guide.output("Temperature and seed"), flags=re.MULTILINE)[1:]
    seeds, answers = parts[::2], parts[1::2]
    assert seeds[:2] == ["2462", "2462"] != seeds[1:]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.model
def test_repetition(guide: Runs) -> None:
    (first,) = guide.answers("Repetition")
    assert "llama" in first.lower()


@pytest.mark.model
def test_the_beginning_of_an_answer(guide: Runs) -> None:
    (answer,) = guide.answers("The beginning of an answer")
    assert re.match(r"The weather today is\b.", answer)


@pytest.mark.model
def test_thoughts(guide: Runs) -> None:
    parts = r"\[(.*)\]\n(.*)\nthought: (.*)\nsaid: (.*)\n"
    found = re.fullmatch(parts, guide.output("Thoughts"), re.DOTALL)
    assert found
    streamed, answered, thought, said = found.groups()
    assert streamed.strip() == thought
    assert answered == said != ""
    assert "think>" not in guide.output("Thoughts")


# --- what it remembers --------------------------------------------------------------------------


@pytest.mark.model
def test_changing_the_history(guide: Runs) -> None:
    counts, after_reset, after_setting = guide.lines("Changing the history")
    assert counts == "7 2 2"
    assert after_reset == "(SystemMessage(content='You are a patient teacher.'),)"
    assert after_setting == "['SystemMessage', 'UserMessage', 'AssistantMessage']"


@pytest.mark.model
def test_a_prompt_that_leaves_no_trace(guide: Runs) -> None:
    title = "A prompt that leaves no trace"
    assert "()" in guide.lines(title)
    assert len(guide.answers(title)) == 2


@pytest.mark.model
def test_a_history_as_json(guide: Runs) -> None:
    assert len(guide.answers("A history as JSON")) == 2
    saved = llamactor.load_history((guide.folder / "history.json").read_bytes())
    assert [type(message).__name__ for message in saved] == ["UserMessage", "AssistantMessage"]


@pytest.mark.model
def test_saving_and_restoring(guide: Runs) -> None:
    assert len(guide.answers("Saving and restoring")) == 1
    assert len(guide.answers("Saving and restoring 2")) == 1
    reused, prompt = guide.numbers("Saving and restoring 2")[-1]
    assert prompt > reused > 40  # all but the new turn


# --- while the user types -----------------------------------------------------------------------


@pytest.mark.model
def test_preloading(guide: Runs) -> None:
    assert guide.answers("Preloading")
    ((left,),) = guide.numbers("Preloading")[-1:]
    assert left < 10  # the end of the turn and the header of the answer


@pytest.mark.model
def test_completing_a_prompt(guide: Runs) -> None:
    *completed, count = guide.lines("Completing a prompt")
    typed = "Can I replace the cream cheese with"
    assert completed[0].startswith(typed)
    assert len("\n".join(completed)) > len(typed)
    assert count == "2 messages"


@pytest.mark.model
def test_suggestions_with_every_keystroke(guide: Runs) -> None:
    *told, last = guide.lines("Suggestions with every keystroke")
    typed = re.findall(r"^'(.*?)' may go on with ['\"].", "\n".join(told), re.MULTILINE)
    assert len(typed) == len(told)
    assert typed == sorted(typed, key=["Hi the", "Hi there", "Hi there! How"].index)
    assert last.startswith("known at once: ")


# --- below the conversation ---------------------------------------------------------------------


@pytest.mark.model
def test_templates(guide: Runs) -> None:
    messages = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there!"
    assert guide.output("Templates").startswith(messages)


@pytest.mark.model
def test_a_template_of_your_own(guide: Runs) -> None:
    assert guide.output("A template of your own").count("AI:") == 2


@pytest.mark.model
def test_without_a_session(guide: Runs) -> None:
    (first, asked), (known, prompt) = guide.numbers("Without a session")
    assert first == 0
    assert known > asked
    assert prompt > known


@pytest.mark.model
def test_when_the_context_is_full(guide: Runs) -> None:
    *turns, (said, in_view) = guide.numbers("When the context is full")
    assert turns[0][1] == 0
    assert any(dropped for _, dropped in turns)
    assert all(prompt < 256 for prompt, _ in turns)
    assert said == 1 + 2 * len(turns) > in_view


@pytest.mark.model
def test_a_strategy_of_your_own(guide: Runs) -> None:
    *shifts, last = guide.lines("A strategy of your own")
    assert shifts
    for line in shifts:
        assert re.fullmatch(r"a shift to at most 2\d\d tokens", line)
    assert re.fullmatch(r"\d messages came before\.", last)


@pytest.mark.model
def test_more_sessions_than_sequences(guide: Runs) -> None:
    lines = [line.split() for line in guide.lines("More sessions than sequences")]
    assert len(lines) == 12
    for known, _, prompt, _, source in lines:
        assert 0 <= int(known) < int(prompt)
        assert source in {"cells", "host", "disk", "None"}
    for known, _, prompt, _, source in lines[6:]:
        assert source != "None"
        assert int(known) > int(prompt) // 2


# --- what it names ------------------------------------------------------------------------------


def test_there_is_a_test_for_every_program() -> None:
    words = {re.sub(r"\W+", "_", title).lower().removesuffix("_2") for title in PROGRAMS}
    assert len(PROGRAMS) == len(blocks(GUIDE, "python"))
    assert {name for name in words if f"test_{name}" not in globals()} == set()


def test_the_contents_are_those_of_the_guide() -> None:
    assert linked_anchors(GUIDE) == anchors(GUIDE)


def test_the_table_of_commands_is_that_of_the_program() -> None:
    commands = GUIDE.split("| command | |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(/[^`]*)`", commands)) == set(HELP)


def test_the_table_of_strategies_names_them_all() -> None:
    table = GUIDE.split("| `overflow` | |")[1].split("\n\n")[0]
    named = re.findall(r'^\| `"?(?:llamactor\.context_shift\.)?(\w+)', table, re.MULTILINE)
    assert set(named) == {name for name in context_shift.__all__ if name.islower()}


def test_everything_the_guide_names_exists() -> None:
    named = set(re.findall(r"llamactor\.([A-Za-z]\w*)", "\n".join(PROGRAMS.values())))
    assert {name for name in named if not hasattr(llamactor, name)} == set()
    keywords = {name for value in load_options({}) for name in value.__struct_fields__}
    keywords |= {*llamactor.GenerationOptions.__struct_fields__, "template_kwargs", "on_message"}
    keywords |= {*llamactor.PredictionResult.__struct_fields__, "include_state"}
    assert set(re.findall(r"`(\w+)=[^`]*`", GUIDE)) - keywords == set()
