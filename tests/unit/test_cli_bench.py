"""`llamactor bench` and `llamactor ps`, and the bare loop that predictions are compared with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import statistics
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor._bare import bare_loop
from tests.conftest import TINYCHAT
from tests.terminals import COMMAND, CONTROL_C, Terminal, bare, outcome, piped

if TYPE_CHECKING:
    from collections.abc import Iterator

BENCH = [*COMMAND, "bench", str(TINYCHAT), "--threads", "1"]
SMALL = ["--prompt-tokens", "40", "--tokens", "5", "--parallel", "2", "3", "--rounds", "3"]
ENDLESS = ["--rounds", "1000000"]


# --- the bare loop ------------------------------------------------------------------------------


async def test_the_bare_loop_does_the_work_of_a_prediction(tinychat: llamactor.Model) -> None:
    prompt = tinychat.tokenize("Once upon a time there was a keeper of a lighthouse who")
    async with bare_loop(tinychat, context_size=256, sequences=2, threads=1) as loop:
        replies = await loop.replies([prompt], 24)
    result = await tinychat.complete(prompt, max_tokens=24, ignore_eos=False, deterministic=True)
    assert replies.tokens[0][: len(result.tokens)] == list(result.tokens)
    assert len(replies.tokens[0]) == 24
    assert 0 < replies.first < replies.total


async def test_the_bare_loop_answers_several_prompts_in_one_batch(
    tinychat: llamactor.Model,
) -> None:
    prompts = [tinychat.tokenize(text) for text in ("One, two, three", "The sea", "My name is")]
    async with bare_loop(tinychat, context_size=256, sequences=3, threads=1) as loop:
        together = await loop.replies(prompts, 8)
        again = await loop.replies(prompts, 8)
        alone = [(await loop.replies([prompt], 8)).tokens[0] for prompt in prompts]
    assert together.tokens == again.tokens
    assert [len(reply) for reply in together.tokens] == [8, 8, 8]
    # How many are in a batch changes the last bits of a sum, and seldom what is likeliest.
    assert [reply[0] for reply in alone] == [reply[0] for reply in together.tokens]


async def test_a_prompt_longer_than_a_batch_is_read_in_parts(tinychat: llamactor.Model) -> None:
    prompt = tinychat.tokenize("Once upon a time there was a keeper of a lighthouse. " * 6)
    async with bare_loop(tinychat, context_size=256, sequences=1, threads=1) as loop:
        whole = await loop.replies([prompt], 4)
    options: Any = {"context_size": 256, "sequences": 1, "batch_size": 32, "threads": 1}
    async with bare_loop(tinychat, **options) as loop:
        assert (await loop.replies([prompt], 4)).tokens == whole.tokens


@pytest.mark.parametrize(
    ("prompts", "length", "error", "complaint"),
    [
        ([], 1, ValueError, "0 prompts with replies of 1 tokens"),
        ([[1], []], 1, ValueError, "at least one token each"),
        ([[1]], 0, ValueError, "replies of 0 tokens"),
        ([[1]] * 40, 1, ValueError, "1 to 2 prompts"),
        (
            [[1] * 250],
            7,
            llamactor.ContextOverflowError,
            "250 tokens and 7 more; the context holds 256",
        ),
        ([[1] * 200, [2] * 200], 5, llamactor.DecodeError, "no room"),
        ([[1_000_000]], 1, llamactor.DecodeError, "out of range"),
    ],
)
async def test_the_bare_loop_refuses_what_it_cannot_do_and_goes_on(
    tinychat: llamactor.Model,
    prompts: list[list[int]],
    length: int,
    error: type[Exception],
    complaint: str,
) -> None:
    async with bare_loop(tinychat, context_size=256, sequences=2, threads=1) as loop:
        with pytest.raises(error, match=complaint):
            await loop.replies(prompts, length)
        assert len((await loop.replies([[1, 2, 3]], 2)).tokens[0]) == 2


async def test_a_cancelled_run_ends_and_the_loop_goes_on(tinychat: llamactor.Model) -> None:
    async with bare_loop(tinychat, context_size=8192, sequences=1, threads=1) as loop:
        run = asyncio.create_task(loop.replies([[1]], 8000))
        await asyncio.sleep(0)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert len((await loop.replies([[1, 2, 3]], 2)).tokens[0]) == 2


async def test_a_closed_bare_loop_says_so(tinychat: llamactor.Model) -> None:
    loop = await bare_loop(tinychat, context_size=64, sequences=1)
    await loop.aclose()
    await loop.aclose()
    with pytest.raises(llamactor.ClosedError, match="bare loop"):
        await loop.replies([[1]], 1)


# --- bench --------------------------------------------------------------------------------------


def test_a_bench_shows_every_case_beside_the_bare_loop() -> None:
    code, out, err = outcome(piped([*BENCH, *SMALL]))
    assert (code, err) == (0, "")
    about, _, table = out.partition("WORK")
    assert dict(line.split(maxsplit=1) for line in about.splitlines())["model"] == "tinychat"
    rows = [line.split("  ") for line in table.splitlines()[1:]]
    assert [row[0] for row in rows] == ["pp40", "tg5", "tg5 x 2", "tg5 x 3"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:-1] if cell and "to" not in cell)


def test_a_bench_for_programs_has_every_round() -> None:
    code, out, err = outcome(piped([*BENCH, *SMALL, "--json"]))
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["options"] == "context_size=105 sequences=3 threads=1"
    for result, tokens in zip(said["results"], (40, 5, 10, 15), strict=True):
        case = result["case"]
        made = case["tokens"] if case["tokens"] > 1 else case["prompt_tokens"]
        assert case["streams"] * made == tokens
        for way in ("llamactor", "bare"):
            assert len(result[way]["rounds"]) == 3
            assert result[way]["median"] == statistics.median(result[way]["rounds"])
        assert result["ratio"] == statistics.median(result["ratios"])


def test_a_bench_whose_work_does_not_fit_into_the_context_fails_in_one_line() -> None:
    code, out, err = outcome(piped([*BENCH, *SMALL, "--context-size", "32"]))
    assert (code, out) == (1, "")
    assert err.startswith("llamactor: ")
    assert "32" in err
    assert err.count("\n") == 1


def test_control_c_ends_a_bench() -> None:
    screen = Terminal([*BENCH, *ENDLESS])
    try:
        screen.shows("pp512")
        screen.type(CONTROL_C)
        assert screen.ends() == 130
    finally:
        screen.close()


def test_a_bench_at_a_terminal_shows_how_far_it_is_and_then_only_the_results() -> None:
    screen = Terminal([*BENCH, *SMALL], NO_COLOR="1")
    try:
        screen.shows("tg5 x 3.*?%")
        shown = bare(screen.shows("RANGE.*0\\.\\d\\d to.*$")[0])
        assert screen.ends() == 0
    finally:
        screen.close()
    assert "%" not in shown


# --- ps -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def chat_with(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has a model loaded."""
    command = [*COMMAND, "chat", str(path), "--threads", "1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("Hello\n")
        process.stdin.flush()
        assert process.stdout.readline()
        yield process
        process.send_signal(signal.SIGTERM)


@pytest.fixture
def chatting() -> Iterator[subprocess.Popen[str]]:
    """A process that has tinychat loaded."""
    with chat_with(TINYCHAT) as process:
        yield process


def running() -> dict[int, Any]:
    """What is shown to programs, by the numbers of the processes."""
    return {each["pid"]: each for each in json.loads(piped([*COMMAND, "ps", "--json"]).stdout)}


def test_processes_that_have_models_loaded_are_shown(chatting: subprocess.Popen[str]) -> None:
    code, out, err = outcome(piped([*COMMAND, "ps"]))
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["PID"].split() == ["PID", "STARTED", "MEMORY", "MODELS", "COMMAND"]
    assert f" {TINYCHAT.name} " in lines[str(chatting.pid)]
    assert "MB" in lines[str(chatting.pid)]


def test_processes_are_shown_for_programs_until_they_end(chatting: subprocess.Popen[str]) -> None:
    process = running()[chatting.pid]
    assert len(process["models"]) == 1
    assert process["models"][0]["path"] == str(TINYCHAT)
    assert 0 < process["models"][0]["resident_bytes"] <= TINYCHAT.stat().st_size + 4096
    assert process["resident_bytes"] > 1_000_000
    assert process["command"].endswith(f"chat {TINYCHAT} --threads 1")
    chatting.terminate()
    chatting.wait()
    assert chatting.pid not in running()


def test_a_model_whose_file_is_not_called_gguf_is_shown(tmp_path: Path) -> None:
    blob = Path(shutil.copy(TINYCHAT, tmp_path / "0123abcd"))
    link = tmp_path / "linked.gguf"
    link.symlink_to(blob)
    with chat_with(link) as process:
        models = running()[process.pid]["models"]
        assert [model["path"] for model in models] == [str(blob)]
