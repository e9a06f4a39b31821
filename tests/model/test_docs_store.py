"""docs/store.md: its programs run as they stand, and what it names exists."""

from __future__ import annotations

import builtins
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import llamactor
from llamactor import Presets
from llamactor.store.refs import kind_of
from tests.conftest import TINYCHAT
from tests.documents import anchors, blocks, linked_anchors, output_of_program
from tests.hub import Hub, running

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "store.md").read_text(encoding="utf-8")
REPO = "bartowski/SmolLM2-135M-Instruct-GGUF"
PROGRAMS = {
    section.partition("\n")[0]: program
    for section in re.split(r"^### ", GUIDE, flags=re.MULTILINE)[1:]
    for program in blocks(section, "python")
}


@pytest.fixture(scope="module", autouse=True)
def _hub() -> Iterator[None]:
    """The hub that the programs ask has a small model under the name of a larger one."""
    hub = Hub()
    hub.license = "apache-2.0"
    for quantization in ("Q4_K_M", "Q8_0"):
        name = f"SmolLM2-135M-Instruct-{quantization}.gguf"
        hub.add(REPO, name, TINYCHAT.read_bytes())
    with running(hub) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", address)
        patch.setenv("HF_HUB_OFFLINE", "0")
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, and a home of its own for the store and the presets."""
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("LLAMACTOR_MODELS_DIR", str(tmp_path / "models"))
    shutil.copy(TINYCHAT, tmp_path / "model.gguf")
    return tmp_path


def lines(title: str, folder: Path) -> list[str]:
    return output_of_program(PROGRAMS[title], folder).splitlines()


def test_loading_from_the_hub(folder: Path) -> None:
    *told, answer = lines("Loading from the hub", folder)
    assert {line.split()[0] for line in told} >= {"downloading", "ready"}
    assert told[-1] == "ready 100%"
    assert re.match("AI: .", answer)
    file = folder / "models" / REPO / "SmolLM2-135M-Instruct-Q4_K_M.gguf"
    assert file.read_bytes() == TINYCHAT.read_bytes()


def test_downloading_first(folder: Path) -> None:
    *told, record = lines("Downloading first", folder)
    assert told[-1] == "SmolLM2-135M-Instruct-Q8_0.gguf 100%"
    assert re.fullmatch(r"smol Q8_0 \S+ [\d,]+ bytes", record)


def test_a_file_of_your_own(folder: Path) -> None:
    assert lines("A file of your own", folder) == [str(folder / "model.gguf"), "1 use"]
    assert (folder / "model.gguf").exists()


def test_what_can_be_loaded(folder: Path) -> None:
    assert lines("What can be loaded", folder) == ["smollm2 llama Q4_1 8192", "True"]


def test_what_a_file_says(folder: Path) -> None:
    described, named, tensor = lines("What a file says", folder)
    assert described.endswith("Q8_0 chat, completion, tools")
    assert named.endswith("bytes")
    assert re.fullmatch(r"\S+ \(\d+, \d+\) q8_0", tensor)
    assert not (folder / "models").exists()


def test_whether_it_is_what_it_was(folder: Path) -> None:
    found, refused = lines("Whether it is what it was", folder)
    assert re.match(r"mine .*model\.gguf has SHA-256", found)
    assert refused.startswith("'mine' is in quarantine")


def test_options_that_stay_with_a_model(folder: Path) -> None:
    answer, noted = lines("Options that stay with a model", folder)
    assert re.match("AI: .", answer)
    assert noted == "small, for tests 1 8"


@pytest.mark.model
def test_options_under_a_name(folder: Path) -> None:
    *_, hint = lines("Options under a name", folder)
    assert "did you mean 'brief'?" in hint
    assert (folder / "config" / "llamactor" / "presets.toml").exists()


async def test_by_hand(tmp_path: Path) -> None:
    (text,) = blocks(GUIDE, "toml")
    path = tmp_path / "presets.toml"
    path.write_text(text)
    (creative,) = await Presets(path).list()
    assert creative.load == {"context_size": 4096}
    assert set(creative.generation) == {"temperature", "top_k", "repeat_penalty", "stop"}


# --- what it names ------------------------------------------------------------------------------


def test_there_is_a_test_for_every_program() -> None:
    names = {re.sub(r"\W+", "_", title).lower() for title in PROGRAMS}
    assert len(PROGRAMS) == len(blocks(GUIDE, "python"))
    assert {name for name in names if f"test_{name}" not in globals()} == set()


def test_the_contents_are_those_of_the_guide() -> None:
    assert linked_anchors(GUIDE) == anchors(GUIDE)


def test_everything_the_guide_names_exists() -> None:
    named = set(re.findall(r"llamactor\.([A-Z]\w*)", GUIDE)) | set(
        re.findall(r"^\| `(\w+Error)`", GUIDE, re.MULTILINE)
    )
    assert named - {*vars(llamactor), *vars(builtins)} == set()
    methods = set(re.findall(r"\bstore\.(\w+)\(", GUIDE))
    assert {name for name in methods if not hasattr(llamactor.ModelStore, name)} == set()


def test_the_references_are_of_the_kinds_that_the_guide_says() -> None:
    table = GUIDE.split("| reference | what it means |")[1].split("\n\n")[0]
    references = re.findall(r'`"([^"]+)"', table)
    kinds = [kind_of(reference) for reference in references]
    assert kinds == ["path", "name", "package", "name", "hub", "hub", "hub", "hub"]
