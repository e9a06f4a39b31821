"""docs/runtime.md: its programs run as they stand, and what it names exists."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path

import pytest

import llamactor
from tests.documents import anchors, blocks, linked_anchors, output_of_program

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "runtime.md").read_text(encoding="utf-8")
PROGRAMS = {
    section.partition("\n")[0]: program
    for section in re.split(r"^###? ", GUIDE, flags=re.MULTILINE)[1:]
    for program in blocks(section, "python")
}

pytestmark = pytest.mark.model


def output(title: str, folder: Path) -> str:
    """What the program under this heading prints."""
    return output_of_program(PROGRAMS[title], folder)


def lines(title: str, folder: Path) -> list[str]:
    return output(title, folder).splitlines()


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store and a home of its own for each program."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LLAMACTOR_MODELS_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))


def test_load_and_predict(tmp_path: Path) -> None:
    assert output("Load and predict", tmp_path).endswith("\n 24 tokens\n")


def test_a_name_of_your_own(tmp_path: Path) -> None:
    text = output("A name of your own", tmp_path)
    assert text.startswith("AI: ")
    assert text.endswith("['smollm2', 'smollm2:2']\n")


def test_a_configuration_of_your_own(tmp_path: Path) -> None:
    (line,) = lines("A configuration of your own", tmp_path)
    tokens, mebibytes = map(int, re.findall(r"\d+", line))
    assert tokens == 1024
    assert 120 < mebibytes < 160


def test_a_preset(tmp_path: Path) -> None:
    assert lines("A preset", tmp_path) == ["512 8", "4"]


def test_progress(tmp_path: Path) -> None:
    *told, name = lines("Progress", tmp_path)
    shares = [float(line.split()[1].rstrip("%")) for line in told]
    assert shares == sorted(shares)
    assert told[0].split() == ["resolving", "0.0%"]
    assert told[-1].split() == ["ready", "100.0%"]
    assert name


def test_what_can_be_loaded(tmp_path: Path) -> None:
    assert lines("What can be loaded", tmp_path) == ["['little']", "little"]


def test_cancelling_a_load(tmp_path: Path) -> None:
    error, waiter, loaded = lines("Cancelling a load", tmp_path)
    assert "cancelled" in error
    assert (waiter, loaded) == ("and so does whoever waits for it", "()")


def test_a_loaded_model(tmp_path: Path) -> None:
    assert lines("A loaded model", tmp_path) == 6 * ["my-model"]


def test_get_or_load(tmp_path: Path) -> None:
    *answers, count = lines("Get or load", tmp_path)
    assert [answer.split()[0] for answer in answers] == ["My", "The", "I"]
    assert count == "1 model"


def test_the_underlying_model_may_change(tmp_path: Path) -> None:
    before, error, *epochs, after = lines("The underlying model may change", tmp_path)
    assert before == after == "None"
    assert "no loaded model satisfies" in error
    assert epochs == ["llama 512 1", "llama 1024 2"]


def test_any_loaded_model(tmp_path: Path) -> None:
    assert output("Any loaded model", tmp_path).startswith("AI: ")


def test_all_loaded_models(tmp_path: Path) -> None:
    found = [line.split() for line in lines("All loaded models", tmp_path)]
    assert [name for name, _, _ in found] == ["smollm2", "second"]


def test_completing(tmp_path: Path) -> None:
    text = output("Completing", tmp_path)
    assert re.fullmatch(r"AI: .*\n(stop_string '[.\\n]+'|max_tokens None)\n", text, re.DOTALL)


def test_answering(tmp_path: Path) -> None:
    assert "Paris" in output("Answering", tmp_path)


def test_statistics(tmp_path: Path) -> None:
    counts, truth = lines("Statistics", tmp_path)
    prompt, predicted, total = map(int, counts.split())
    assert (predicted, total) == (16, prompt + 16)
    assert truth == "True True"


def test_structured_output(tmp_path: Path) -> None:
    text = output("Structured output", tmp_path)
    answer, keys, first = re.fullmatch(r"AI: (.*)\n(\[.*)\n(.)\n", text, re.DOTALL).groups()  # type: ignore[union-attr]
    assert set(json.loads(answer)) == {"punchline", "setup"}
    assert keys.startswith("['punchline', 'setup'] ")
    assert first in '{["-0123456789tfn'


def test_cancelling_a_prediction(tmp_path: Path) -> None:
    assert lines("Cancelling a prediction", tmp_path)[-1] == "cancelled"


def test_a_conversation(tmp_path: Path) -> None:
    text = output("A conversation", tmp_path)
    assert text.count("AI: ") == 2
    assert "Rex" in text
    assert text.endswith("4 messages\n")


def test_unloading(tmp_path: Path) -> None:
    refused, unloaded = lines("Unloading", tmp_path)
    assert "'smollm2' is at work" in refused
    assert unloaded == "True None"


def test_staying_and_going_by_itself(tmp_path: Path) -> None:
    assert lines("Staying, and going by itself", tmp_path)[-1] == "kept"


def test_swapping(tmp_path: Path) -> None:
    assert lines("Swapping", tmp_path) == ["True True 1024"]


def test_asking_before(tmp_path: Path) -> None:
    planned, room, names = lines("Asking before", tmp_path)
    assert planned == "True 92 45 16"
    assert room == "True 0"
    assert "CPU" in names


def test_one_budget_for_all(tmp_path: Path) -> None:
    assert lines("One budget for all", tmp_path) == ["['first']", "['second']", "True"]


def test_what_does_not_fit(tmp_path: Path) -> None:
    error, suggested, size = lines("What does not fit", tmp_path)
    assert "memory_limit leaves 200.0 MiB" in error
    assert suggested == "True"
    assert f"context_size={size} would fit" in error


def test_watching(tmp_path: Path) -> None:
    seen = lines("Watching", tmp_path)
    assert seen[0] == "loading smollm2"
    assert {"smollm2 busy", "smollm2 leaving"} <= set(seen)


# --- what it names ------------------------------------------------------------------------------


def test_there_is_a_test_for_every_program() -> None:
    names = {re.sub(r"\W+", "_", title).lower() for title in PROGRAMS}
    assert len(PROGRAMS) == len(blocks(GUIDE, "python"))
    assert {name for name in names if f"test_{name}" not in globals()} == set()


def test_the_contents_are_those_of_the_guide() -> None:
    assert linked_anchors(GUIDE) == anchors(GUIDE)


def test_everything_the_guide_names_exists() -> None:
    named = set(re.findall(r"llamactor\.([A-Za-z]\w*)", "\n".join(PROGRAMS.values())))
    named |= set(re.findall(r"`(\w+Error)`", GUIDE))
    assert named - {*vars(llamactor), *vars(builtins)} == set()
    methods = set(re.findall(r"\bruntime\.(\w+)", "\n".join(PROGRAMS.values())))
    assert {name for name in methods if not hasattr(llamactor.Runtime, name)} == set()
