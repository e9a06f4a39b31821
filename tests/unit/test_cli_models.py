"""The commands about models and presets, each in a store and a configuration of its own."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor import ModelStore
from llamactor.cli import main
from llamactor.store import files
from tests.conftest import PATIENCE, TINYCHAT, meanwhile
from tests.hub import Hub, running
from tests.models import tiny_llama
from tests.terminals import COMMAND, CONTROL_C, Terminal, outcome, piped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Run = Callable[..., tuple[int, str, str]]

SAID = ("Hello, my name is Ada.", "--threads", "1", "--max-tokens", "4", "--ignore-eos")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without models or presets."""
    for name in ("LLAMACTOR_MODELS_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line there, and returns its status, stdout and stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def done(run: Run, *words: str | Path) -> str:
    """What a command that succeeds writes."""
    status, out, err = run(*words)
    assert (status, err) == (0, "")
    return out


def said(run: Run, *words: str | Path) -> Any:
    """What a command writes for programs."""
    return json.loads(done(run, *words, "--json"))


def rows(table: str) -> list[list[str]]:
    """The cells of a table, without its headings."""
    return [line.split() for line in table.splitlines()[1:]]


# --- models -------------------------------------------------------------------------------------


def test_an_imported_model_is_listed_and_used_by_its_name(run: Run) -> None:
    assert done(run, "import", TINYCHAT, "--name", "tiny") == "tiny\n"
    table = done(run, "ls")
    assert table.split()[:7] == ["NAME", "SIZE", "WEIGHTS", "QUANT", "CONTEXT", "CAN", "USED"]
    expected = "tiny 3.1 MB 2.9M Q8_0 2048 chat, completion, tools -"
    assert rows(table) == [expected.split()]
    done(run, "complete", *SAID, "--model", "tiny")
    assert rows(done(run, "ls"))[0][-1] == "now"
    (record,) = said(run, "ls")
    assert (record["usage_count"], record["tokens_generated"]) == (1, 4)


def test_models_are_found_by_what_they_are_and_can(run: Run) -> None:
    done(run, "import", TINYCHAT, "--name", "tiny")
    for words, count in (
        (("ls", "TIN"), 1),
        (("ls", "q8_0"), 1),
        (("ls", "mistral"), 0),
        (("ls", "--capability", "tools"), 1),
        (("ls", "--capability", "embedding"), 0),
    ):
        assert len(rows(done(run, *words))) == len(said(run, *words)) == count


def test_models_of_other_programs_are_discovered_where_they_lie(run: Run, home: Path) -> None:
    place = home / ".lmstudio" / "models" / "owner" / "repo"
    place.mkdir(parents=True)
    shutil.copy(TINYCHAT, place / "found-Q8_0.gguf")
    assert said(run, "ls") == []
    found = {each["name"]: each for each in said(run, "ls", "--discover")}
    assert found["found-Q8_0"]["path"] == str(place / "found-Q8_0.gguf")
    assert rows(done(run, "ls", "found"))[0][0] == "found-Q8_0"


def test_where_no_model_is_it_is_said_how_to_get_one(run: Run) -> None:
    status, out, err = run("ls")
    assert (status, rows(out)) == (0, [])
    assert "llamactor ls --discover" in err
    assert "llamactor pull" in err
    assert said(run, "ls") == []
    done(run, "import", TINYCHAT, "--name", "tiny")
    assert rows(done(run, "ls", "nothing-like-it")) == []


def test_removing_a_model_deletes_only_files_of_the_store(run: Run, home: Path) -> None:
    mine = Path(shutil.copy(TINYCHAT, home / "mine.gguf"))
    done(run, "import", mine)
    copied = said(run, "import", TINYCHAT, "--copy", "--name", "copied")
    assert Path(copied["path"]).is_file()
    assert done(run, "rm", "mine", "copied") == ""
    assert said(run, "ls") == []
    assert mine.is_file()
    assert not Path(copied["path"]).exists()


def test_what_differs_from_its_record_is_quarantined(run: Run) -> None:
    copied = Path(said(run, "import", TINYCHAT, "--copy", "--name", "bad")["path"])
    assert rows(done(run, "verify")) == [["bad", "ok"]]
    content = bytearray(copied.read_bytes())
    content[-1] ^= 1
    copied.write_bytes(content)
    status, out, err = run("verify", "bad")
    assert status == 1
    assert "ok" not in rows(out)[0]
    assert err == "llamactor: 1 of 1 models are not as recorded\n"
    assert rows(done(run, "ls"))[0][-1] == "quarantined"
    assert run("complete", *SAID, "--model", "bad")[0] == 1
    content[-1] ^= 1
    copied.write_bytes(content)
    assert said(run, "verify") == [{"name": "bad", "problem": None}]
    assert "quarantined" not in done(run, "ls")


def test_what_is_removed_meanwhile_is_not_verified(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second", "third"):
        done(run, "import", shutil.copy(TINYCHAT, home / f"{name}.gguf"))

    def remove() -> None:
        asyncio.run(ModelStore().remove("second"))

    meanwhile(monkeypatch, files, "examine", remove)
    assert rows(done(run, "verify")) == [["first", "ok"], ["third", "ok"]]
    assert rows(done(run, "verify", "third", "first")) == [["third", "ok"], ["first", "ok"]]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("rm", "tiney"), "did you mean 'tiny'?"),
        (("verify", "tiney"), "did you mean 'tiny'?"),
        (("info", "tiney"), "did you mean 'tiny'?"),
        (("chat", "tiney"), "did you mean 'tiny'?"),
        (("bench", "tiney"), "did you mean 'tiny'?"),
        (("import", "nowhere.gguf"), "nowhere.gguf"),
        (("info", "nowhere.gguf"), "nowhere.gguf"),
        (("presets", "show", "warn"), "did you mean 'warm'?"),
        (("presets", "rm", "warn"), "did you mean 'warm'?"),
        (("complete", "a", "--model", "tiny", "--preset", "warn"), "did you mean 'warm'?"),
    ],
)
def test_what_is_not_there_has_a_status_of_its_own(
    run: Run, words: tuple[str, ...], complaint: str
) -> None:
    done(run, "import", TINYCHAT, "--name", "tiny")
    done(run, "presets", "set", "warm", "--temperature", "1")
    status, out, err = run(*words)
    assert (status, out) == (3, "")
    assert err.startswith("llamactor: ")
    assert err.count("\n") == 1
    assert complaint in err


def test_what_cannot_be_imported_fails_in_one_line(run: Run, home: Path) -> None:
    broken = home / "broken.gguf"
    broken.write_bytes(b"GGUF?")
    done(run, "import", TINYCHAT, "--name", "tiny")
    other = Path(shutil.copy(TINYCHAT, home / "other.gguf"))
    for words, complaint in (
        (("import", broken), "broken.gguf"),
        (("info", broken), "broken.gguf"),
        (("import", other, "--name", "Tiny"), "belongs to another model"),
        (("pull", "hf:nothing"), "hf:nothing"),
    ):
        status, out, err = run(*words)
        assert status in {1, 3}
        assert out == ""
        assert err.startswith("llamactor: ")
        assert complaint in err
        assert err.count("\n") == 1
    assert [each["name"] for each in said(run, "ls")] == ["tiny"]


@pytest.mark.parametrize("command", ["rm", "presets rm"])
def test_removing_nothing_is_a_mistake(run: Run, command: str) -> None:
    status, _, err = run(*command.split())
    assert (status, err) == (2, "llamactor: no name was given: there is nothing to remove\n")


def test_a_name_cannot_command_the_terminal(home: Path) -> None:
    evil = home / "evil\x1b[2J.gguf"
    shutil.copy(TINYCHAT, evil)
    for words in (["info", str(evil)], ["import", str(evil), "--copy"], ["ls"]):
        screen = Terminal([*COMMAND, *words])
        try:
            shown = screen.shows("2J.*\n|NAME.*\n.*\n")[0]
            assert screen.ends() == 0
        finally:
            screen.close()
        assert "\x1b[2J" not in shown


def test_a_name_that_is_not_there_cannot_command_the_terminal(run: Run) -> None:
    status, out, err = run("info", "evil\x1b[2J\x9b.gguf")
    assert (status, out) == (3, "")
    assert "evil␛[2J\ufffd.gguf" in err
    assert "\x1b" not in err


def test_a_copy_at_a_terminal_shows_how_far_it_is(home: Path) -> None:
    screen = Terminal([*COMMAND, "import", str(TINYCHAT), "--copy"])
    try:
        screen.shows("importing|tinychat-3m")
        screen.shows("\r\n.*tinychat-3m-Q8_0\r\n")
        assert screen.ends() == 0
    finally:
        screen.close()


# --- pull ---------------------------------------------------------------------------------------


REPO = "owner/Tiny-GGUF"
PULL = [*COMMAND, "pull", f"hf:{REPO}"]


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that commands take for the real one, with one model."""
    hub = Hub()
    hub.add(REPO, "Tiny-Q8_0.gguf", TINYCHAT.read_bytes())
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with running(hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield hub


def test_a_pulled_model_has_a_name(hub: Hub) -> None:
    assert outcome(piped(PULL)) == (0, "Tiny-Q8_0\n", "")
    _, out, _ = outcome(piped([*COMMAND, "ls"]))
    assert rows(out)[0][0] == "Tiny-Q8_0"
    pulled = json.loads(piped([*PULL, "--json"]).stdout)
    assert pulled["source"] == f"hf:{REPO}/Tiny-Q8_0.gguf"
    answer = piped([*COMMAND, "complete", *SAID, "--model", f"hf:{REPO}:Q8_0"])
    assert (answer.returncode, answer.stderr) == (0, "")


def test_what_is_on_the_hub_is_described_before_it_is_pulled(hub: Hub, home: Path) -> None:
    code, out, err = outcome(piped([*COMMAND, "info", f"hf:{REPO}"]))
    assert (code, err) == (0, "")
    assert f"hf:{REPO}/Tiny-Q8_0.gguf\n" in out
    assert "2.9M (Q8_0)\n" in out
    assert rows(piped([*COMMAND, "ls"]).stdout) == []


def test_control_c_ends_a_pull_at_a_terminal_and_the_next_one_goes_on(hub: Hub) -> None:
    file = hub.repositories[REPO]["Tiny-Q8_0.gguf"]
    file.stalls = [len(file.content) // 2]
    screen = Terminal(PULL, COLUMNS="120")
    try:
        screen.shows("Tiny-Q8_0.gguf .*1\\.6/3\\.1 MB")
        screen.type(CONTROL_C)
        assert screen.ends() == 130
    finally:
        screen.close()
    hub.release.set()
    assert outcome(piped(PULL)) == (0, "Tiny-Q8_0\n", "")
    assert file.requests[-1] == f"bytes={len(file.content) // 2}-"


def test_what_an_interrupted_pull_has_left_is_pruned(hub: Hub) -> None:
    file = hub.repositories[REPO]["Tiny-Q8_0.gguf"]
    file.stalls = [len(file.content) // 2]
    with subprocess.Popen(PULL, stderr=subprocess.PIPE) as pull:
        assert hub.stalled.wait(PATIENCE)
        pull.send_signal(signal.SIGINT)
        assert pull.wait(PATIENCE) == 130
    code, out, err = outcome(piped([*COMMAND, "prune"]))
    assert (code, err) == (0, "")
    assert out.endswith(" are free now\n")
    assert outcome(piped([*COMMAND, "prune"]))[1] == "0 bytes are free now\n"


def test_what_the_hub_has_not_and_what_it_sends_wrong_is_told_in_one_line(hub: Hub) -> None:
    file = hub.repositories[REPO]["Tiny-Q8_0.gguf"]
    file.content = file.content[:-1] + bytes([file.content[-1] ^ 1])
    for ref, status, complaint in (
        ("hf:owner/nothing", 3, "no such repository"),
        (f"hf:{REPO}:Q2_K", 3, "no Q2_K; there are Q8_0"),
        (f"hf:{REPO}", 1, file.sha256),
    ):
        code, out, err = outcome(piped([*COMMAND, "pull", ref]))
        assert (code, out) == (status, "")
        assert complaint in err
        assert err.startswith("llamactor: ")
        assert err.count("\n") == 1


# --- info ---------------------------------------------------------------------------------------


def test_a_model_is_described_without_loading_it(run: Run) -> None:
    done(run, "import", TINYCHAT, "--name", "tiny")
    shown = done(run, "info", "tiny")
    described = dict(line.split(maxsplit=1) for line in shown.splitlines() if line)
    assert described["name"] == "tinychat"
    assert described["architecture"] == "qwen3"
    assert described["weights"] == "2.9M (Q8_0)"
    assert described["can"] == "chat, completion, tools"
    assert described["file"] == str(TINYCHAT)
    assert described["layers"] == "6"
    assert said(run, "info", TINYCHAT)["parameters"] == 2903232


def test_what_a_model_would_take_is_planned_with_the_options_of_its_load(run: Run) -> None:
    def planned(*flags: str) -> Any:
        return said(run, "info", TINYCHAT, *flags)["memory"]

    small, large = planned("--context-size", "512"), planned("--context-size", "1024")
    assert (small["context_size"], large["context_size"]) == (512, 1024)
    caches = [plan["per_device"]["CPU"]["cache"] for plan in (small, large)]
    assert caches[1] == 2 * caches[0] > 0
    done(run, "presets", "set", "half", "--context-size", "512")
    assert planned("--preset", "half")["per_device"] == small["per_device"]
    shown = done(run, "info", TINYCHAT, "--context-size", "512")
    assert "With a context of 512 tokens it takes " in shown
    assert shown.endswith(": it fits.\n")


def test_what_does_not_fit_is_said_with_what_would(run: Run) -> None:
    shown = done(run, "info", TINYCHAT, "--context-size", "100000000")
    assert "it does not fit.\nIt would fit with --context-size " in shown


def test_a_model_that_cannot_be_loaded_is_still_described(run: Run, home: Path) -> None:
    alien = tiny_llama(home / "alien.gguf", layers=1)
    content = alien.read_bytes()
    alien.write_bytes(content.replace(b"llama", b"alien"))
    status, out, err = run("info", alien)
    assert status == 0
    assert "architecture     alien\n" in out
    assert err.startswith("llamactor: ")
    assert err.count("\n") == 1


def test_parts_of_a_header_are_shown_whole(run: Run) -> None:
    async def described() -> llamactor.ModelInfo:
        async with llamactor.load_model(TINYCHAT, vocab_only=True) as model:
            return model.info

    expected = asyncio.run(described())
    assert done(run, "info", TINYCHAT, "--only", "template") == f"{expected.chat_template}\n"
    assert said(run, "info", TINYCHAT, "--only", "template") == expected.chat_template
    metadata = said(run, "info", TINYCHAT, "--only", "metadata")
    assert metadata["general.name"] == "tinychat"
    assert len(done(run, "info", TINYCHAT, "--only", "metadata").splitlines()) >= len(metadata)
    tensors = said(run, "info", TINYCHAT, "--only", "tensors")
    assert sum(each["size_bytes"] for each in tensors) < TINYCHAT.stat().st_size
    table = rows(done(run, "info", TINYCHAT, "--only", "tensors"))
    assert [row[0] for row in table] == [each["name"] for each in tensors]


def test_a_model_without_a_template_says_so(run: Run, home: Path) -> None:
    mute = tiny_llama(home / "mute.gguf", layers=1, extra={"tokenizer.chat_template": ""})
    assert "chat template    none\n" in done(run, "info", mute)
    assert done(run, "info", mute, "--only", "template") == ""
    assert said(run, "info", mute, "--only", "template") is None


# --- presets ------------------------------------------------------------------------------------


def test_presets_are_made_changed_shown_and_removed(run: Run) -> None:
    assert said(run, "presets") == []
    done(run, "presets", "set", "warm", "--temperature", "0.8", "--top-k", "all", "--threads", "1")
    done(run, "presets", "set", "warm", "--min-p", "0.1", "--notes", "for stories")
    assert said(run, "presets", "show", "warm") == {
        "name": "warm",
        "load": {"threads": 1},
        "generation": {"temperature": 0.8, "top_k": None, "min_p": 0.1},
        "notes": "for stories",
    }
    assert rows(done(run, "presets")) == [
        ["warm", "threads=1", "temperature=0.8", "top_k=none", "min_p=0.1"]
    ]
    shown = dict(
        line.split(maxsplit=1) for line in done(run, "presets", "show", "warm").splitlines()
    )
    assert shown["top_k"] == "none"
    assert shown["notes"] == "for stories"
    done(run, "presets", "set", "warm", "--anew", "--seed", "1")
    assert said(run, "presets", "show", "warm") == {
        "name": "warm",
        "load": {},
        "generation": {"seed": 1},
        "notes": "for stories",
    }
    done(run, "presets", "rm", "warm")
    assert said(run, "presets") == []


@pytest.fixture
def preset_file(home: Path) -> Path:
    """Where presets are, in a folder that is there."""
    folder = home / "xdg_config_home" / "llamactor"
    folder.mkdir(parents=True)
    return folder / "presets.toml"


def test_options_that_a_preset_has_are_read_while_no_other_process_can_change_them(
    run: Run, preset_file: Path
) -> None:
    os.mkfifo(preset_file)
    had = "[joint.generation]\nmin_p = 0.5\n"
    locked: list[bool] = []

    def be_read() -> None:
        lock = preset_file.with_name(".presets.toml.lock")
        with preset_file.open("w") as pipe, lock.open("ab") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked.append(False)
            except BlockingIOError:
                locked.append(True)
            preset_file.unlink()
            preset_file.write_text(had)
            pipe.write(had)

    reading = threading.Thread(target=be_read, daemon=True)
    reading.start()
    done(run, "presets", "set", "joint", "--seed", "1")
    reading.join(PATIENCE)
    assert locked == [True]
    assert said(run, "presets", "show", "joint")["generation"] == {"min_p": 0.5, "seed": 1}


def test_a_mistake_in_a_preset_blocks_no_other_and_is_mended_by_commands(
    run: Run, preset_file: Path
) -> None:
    mistake = "[bad.generation]\ntemprature = 1\n"
    preset_file.write_text(mistake)
    done(run, "presets", "set", "good", "--seed", "1")
    done(run, "presets", "show", "good")
    status, _, err = run("presets", "set", "bad", "--seed", "1")
    assert status == 1
    assert "did you mean 'temperature'" in err
    done(run, "presets", "set", "bad", "--anew", "--seed", "2")
    assert said(run, "presets", "show", "bad")["generation"] == {"seed": 2}
    preset_file.write_text(mistake)
    done(run, "presets", "rm", "bad")
    assert said(run, "presets") == []


def test_options_come_from_the_call_then_the_preset_then_the_model(run: Run) -> None:
    done(run, "import", TINYCHAT, "--name", "tiny")
    done(run, "presets", "set", "short", "--max-tokens", "2", "--threads", "1")
    defaults = {"generation": {"max_tokens": 3, "ignore_eos": True}, "load": {"context_size": 96}}
    asyncio.run(ModelStore().update("tiny", default_options=defaults))

    def tokens(*more: str) -> int:
        words = ("complete", "Hello", "--model", "tiny", "--stats", *more)
        status, _, err = run(*words)
        assert status == 0
        return int(dict(line.split() for line in err.splitlines())["predicted_tokens"])

    assert tokens("--threads", "1") == 3
    assert tokens("--preset", "short") == 2
    assert tokens("--preset", "short", "--max-tokens", "1") == 1


def test_a_wrong_option_of_a_preset_is_refused(run: Run) -> None:
    status, _, err = run("presets", "set", "warm", "--temperature", "-1")
    assert (status, err) == (
        2,
        "llamactor: temperature must be at least 0, not -1.0; 0 is greedy\n",
    )
    assert said(run, "presets") == []


# --- completion ---------------------------------------------------------------------------------


def test_the_shell_is_offered_models_presets_and_files(run: Run, home: Path) -> None:
    done(run, "import", TINYCHAT, "--name", "tiny")
    done(run, "presets", "set", "warm", "--seed", "1")
    (home / "a.gguf").touch()
    (home / "a folder").mkdir()
    (home / "a.txt").touch()

    def offered(*words: str) -> list[str]:
        lines = run("__complete", *words)[1].partition("\x1fbegin\n")[2].splitlines()
        return [line.partition("\t")[0] for line in lines]

    assert set(offered("chat", "")) >= {"smollm2", "tiny"}
    assert offered("rm", "t") == ["tiny"]
    assert "tiny" in offered("complete", "--model", "ti")
    assert offered("chat", "--preset", "") == ["warm"]
    assert offered("presets", "show", "") == ["warm"]
    assert offered("info", f"{home}/a")[-2:] == [f"{home}/a folder/", f"{home}/a.gguf"]


# --- over pipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [["ls"], ["info", str(TINYCHAT)], ["presets"], ["verify"], ["ps"], ["import", str(TINYCHAT)]],
    ids=lambda words: words[0],
)
def test_what_is_for_programs_is_one_document_without_colours(home: Path, words: list[str]) -> None:
    code, out, err = outcome(piped([*COMMAND, *words, "--json"], FORCE_COLOR="1"))
    assert (code, err) == (0, "")
    assert out.endswith("\n")
    assert "\x1b" not in out
    json.loads(out)


def test_lines_of_a_pipe_are_not_folded(home: Path) -> None:
    long = home / f"{'long-' * 40}name.gguf"
    shutil.copy(TINYCHAT, long)
    assert outcome(piped([*COMMAND, "import", str(long)]))[0] == 0
    _, out, _ = outcome(piped([*COMMAND, "ls"], COLUMNS="40"))
    assert len(out.splitlines()) == 2
