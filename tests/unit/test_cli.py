"""The command line in processes of its own, at a terminal and over pipes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor.cli import main
from llamactor.cli.terminal import visible
from tests.conftest import PATIENCE, TINYCHAT

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-W", "error", "-m", "llamactor"]
CHAT = [*COMMAND, "chat", str(TINYCHAT), "--threads", "1"]
COMPLETE = [*COMMAND, "complete", "--model", str(TINYCHAT), "--threads", "1"]

AT_THE_TERMINAL = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
"""Makes its stdin the terminal that its keys belong to, and becomes another program."""

PROMPT, ANSWERING = "\x1b[?2004h", "\x1b[?2004l"
"""What prompt_toolkit says to the terminal when it begins to read a line, and when it has one."""

ENTER, UP, TAB = "\r", "\x1b[A", "\t"
CONTROL_C, CONTROL_D = "\x03", "\x04"


HELLO, WHO = "Hello, my name is Ada.", "What is my name?"


@cache
def answers() -> tuple[str, str]:
    """What tinychat says to `HELLO`, and then to `WHO`."""

    async def ask() -> tuple[str, str]:
        async with llamactor.load_model(TINYCHAT, sequences=1, threads=1) as model:
            chat = model.chat()
            return (await chat.prompt(HELLO)).content, (await chat.prompt(WHO)).content

    greeting, name = asyncio.run(ask())
    assert "Ada" in name
    return greeting, name


class Terminal:
    """A process at a pseudo-terminal, and what it has shown."""

    def __init__(self, *arguments: str) -> None:
        self._screen, process_side = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        streams: Any = dict.fromkeys(("stdin", "stdout", "stderr"), process_side)
        command = [sys.executable, "-c", AT_THE_TERMINAL, *CHAT, *arguments]
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


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    """A chat with tinychat that has shown its first prompt."""
    opened = Terminal(*arguments)
    try:
        yield opened
    finally:
        opened.close()


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


def endless(command: list[str]) -> Any:
    """Start a command whose answers have no end, with pipes to it."""
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([*command, "--ignore-eos", "--overflow", "rolling_window"], **pipes)


def outcome(done: subprocess.CompletedProcess[str]) -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr


# --- at a terminal ------------------------------------------------------------------------------


def test_a_chat_at_a_terminal_streams_answers_and_remembers() -> None:
    with terminal() as chat:
        assert "tinychat; /help shows the commands\n" in chat.asks()
        assert chat.says(HELLO) == f"{answers()[0]}\n"
        assert chat.says(WHO) == f"{answers()[1]}\n"
        assert chat.says("   ") == ""
        chat.type(CONTROL_D)
        assert chat.ends() == 0


def test_control_c_cancels_the_answer_and_not_the_program() -> None:
    with terminal("--ignore-eos") as chat:
        chat.asks()
        begin_an_endless_answer(chat)
        chat.type(CONTROL_C)
        assert "(cancelled; Ctrl-C again or Ctrl-D ends)" in chat.asks()
        assert "stop_reason  cancelled\n" in chat.says("/stats")
        said = chat.says("/history")
        assert said.startswith(f"user: {HELLO}\nassistant: {answers()[0]}")
        begin_an_endless_answer(chat)
        chat.type(CONTROL_C)
        chat.asks()
        chat.type("/quit" + ENTER)
        assert chat.ends() == 0


def begin_an_endless_answer(chat: Terminal) -> None:
    chat.type(HELLO + ENTER)
    chat.shows(f"{re.escape(ANSWERING)}.{{40}}")


def test_a_second_control_c_ends_at_the_empty_prompt() -> None:
    with terminal("--ignore-eos") as chat:
        chat.asks()
        begin_an_endless_answer(chat)
        chat.type(CONTROL_C)
        chat.asks()
        chat.type(CONTROL_C)
        assert chat.ends() == 0


def test_at_the_prompt_control_c_drops_the_line_then_warns_then_ends() -> None:
    with terminal() as chat:
        chat.asks()
        chat.type("Hello" + CONTROL_C)
        assert "ends" not in chat.asks()
        chat.type(CONTROL_C)
        assert "Ctrl-C again or Ctrl-D ends\n" in chat.asks()
        assert "user" not in chat.says("/history")
        chat.type(CONTROL_C)
        assert "Ctrl-C again or Ctrl-D ends\n" in chat.asks()
        chat.process.send_signal(signal.SIGINT)  # the same from outside
        assert chat.ends() == 0


def test_what_is_typed_during_an_answer_waits_for_the_next_prompt() -> None:
    with terminal("--ignore-eos") as chat:
        chat.asks()
        begin_an_endless_answer(chat)
        chat.type("/history" + ENTER + CONTROL_C)
        assert "/history" not in chat.asks()
        assert f"user: {HELLO}\n" in chat.asks()


def test_the_arrow_keys_find_earlier_prompts_and_tab_completes_commands() -> None:
    with terminal() as chat:
        chat.asks()
        chat.says(HELLO)
        chat.type(UP)
        chat.shows(HELLO[:-1])
        chat.type(ENTER)
        chat.asks()
        chat.type("/hi" + TAB)
        chat.shows("story")
        chat.type(ENTER)
        assert chat.asks().count(f"user: {HELLO}\n") == 2


def test_a_conversation_is_saved_and_goes_on_in_a_new_process(tmp_path: Path) -> None:
    path = tmp_path / "a chat.saved"
    with terminal() as chat:
        chat.asks()
        chat.says(HELLO)
        assert chat.says(f"/save {path}") == f"saved 2 messages to {path}\n"
    with terminal() as chat:
        chat.asks()
        assert chat.says(f"/load {path}") == f"loaded 2 messages from {path}\n"
        assert "Ada" in chat.says(WHO)
        chat.type(UP + UP)
        chat.shows(HELLO[:-1])  # what was asked there is in the history of the keys
    loaded = piped([*CHAT, "--load", str(path)], WHO)
    assert outcome(loaded) == (0, f"{answers()[1]}\n", "")


def test_a_failure_at_a_terminal_is_shown_and_the_chat_goes_on(tmp_path: Path) -> None:
    with terminal("--context-size", "64") as chat:
        chat.asks()
        assert chat.says("/nonsense").startswith("llamactor: there is no command /nonsense;")
        assert chat.says("/rewind").startswith("llamactor: n_turns ")
        assert chat.says("/rewind one").startswith("llamactor: /rewind takes a number")
        assert chat.says("/save").startswith("llamactor: /save PATH: the path is missing")
        assert chat.says("/reset all").startswith("llamactor: /reset takes no argument")
        assert chat.says(f"/load {tmp_path}/none").startswith("llamactor: cannot read the state ")
        assert chat.says(HELLO) == f"{answers()[0]}\n"
        assert chat.says("/rewind") == "took back 2 messages\n"
        assert chat.says("/reset") == "forgot everything but the system prompt\n"
        assert chat.says("/history") == ""
        for command in ("/save", "/load", "/rewind", "/stats", "/quit", "/help"):
            assert command in chat.says("/help")


def test_a_terminal_gets_its_settings_back_even_from_sigterm() -> None:
    with terminal("--ignore-eos") as chat:
        chat.asks()
        begin_an_endless_answer(chat)
        assert not chat.echoes()
        chat.process.terminate()
        assert chat.ends() == 128 + signal.SIGTERM
        assert chat.echoes()


def test_thoughts_are_shown_in_a_faint_colour_and_are_no_part_of_what_was_said() -> None:
    template = str(TINYCHAT.with_name("chat_template.jinja"))
    thinking = ("--chat-template", template, "--template-kwarg", "enable_thinking=true")
    with terminal(*thinking, "--reasoning-budget", "6") as chat:
        chat.asks()
        chat.type("What is 3 plus 4?" + ENTER)
        shown = chat.shows(f"{re.escape(ANSWERING)}\x1b\\[2m(.+?)\x1b\\[22m.*?{re.escape(PROMPT)}")
        assert shown[1].strip()
        assert "think>" not in chat.says("/history")


def test_text_cannot_command_the_terminal() -> None:
    written = visible("a\x1b[2Jb\x07\x9b\x7f\r\tc\n✓")
    assert written == "a␛[2Jb␇\ufffd␡␍\tc\n✓"


# --- over pipes ---------------------------------------------------------------------------------


def test_each_line_of_a_pipe_is_answered() -> None:
    done = piped(CHAT, f"{HELLO}\r\n\n   \n{WHO}")
    assert outcome(done) == (0, "{}\n{}\n".format(*answers()), "")


def test_an_answer_comes_before_the_next_line_is_written() -> None:
    with subprocess.Popen(
        CHAT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write(f"{HELLO}\n")
        assert chat.stdout.readline() == f"{answers()[0]}\n"
        chat.stdin.write(f"{WHO}\n")
        assert chat.stdout.readline() == f"{answers()[1]}\n"
    assert chat.returncode == 0


def test_commands_work_over_a_pipe_and_say_nothing_but_what_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    lines = f"""{HELLO}
/save {path}
/rewind
/history
/load {path}
/history
/quit
{WHO}
"""
    greeting = answers()[0]
    said = f"user: {HELLO}\nassistant: {greeting}\n"
    assert outcome(piped(CHAT, lines)) == (0, f"{greeting}\n{said}", "")


def test_lines_are_echoed_and_statistics_written_if_asked_for() -> None:
    code, out, err = outcome(piped([*CHAT, "--echo", "--stats"], f"{HELLO}\n/stats\n"))
    assert code == 0
    answer, _, table = out.partition("> /stats\n")
    assert answer == f"> {HELLO}\n{answers()[0]}\n"
    assert table.startswith(err)
    shown = dict(line.split() for line in err.splitlines())
    assert set(llamactor.PredictionStats.__struct_fields__) <= set(shown)
    assert "all predictions  1\n" in table


def test_two_slashes_are_one_at_the_front_of_a_prompt() -> None:
    done = piped([*CHAT, "--max-tokens", "1"], "//help\n/history\n")
    assert "user: /help\n" in done.stdout


def test_stdin_may_be_a_file_or_nothing(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text(HELLO)
    for path, answer in ((lines, f"{answers()[0]}\n".encode()), (Path(os.devnull), b"")):
        with path.open() as stdin:
            done = subprocess.run(
                CHAT, stdin=stdin, capture_output=True, timeout=PATIENCE, check=False
            )
        assert (done.returncode, done.stdout, done.stderr) == (0, answer, b"")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"/nonsense", "there is no command /nonsense; /help shows those there are"),
        (b"/load nowhere/none", "cannot read the state nowhere/none: No such file"),
        (b"\xff", "line 2 of stdin is not UTF-8: "),
        (b"word " * 200, "the prompt has "),
    ],
)
def test_the_first_failure_over_a_pipe_ends_it(line: bytes, complaint: str) -> None:
    command = [*CHAT, "--context-size", "64", "--overflow", "stop_at_limit"]
    done = piped(command, f"{HELLO}\n".encode() + line + b"\nAnd now?\n")
    assert (done.returncode, done.stdout) == (1, f"{answers()[0]}\n")
    assert done.stderr.startswith(f"llamactor: {complaint}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("command", [CHAT, COMPLETE], ids=["chat", "complete"])
def test_a_signal_ends_what_reads_a_pipe(
    command: list[str], number: signal.Signals, status: int
) -> None:
    with endless(command) as process:
        process.stdin.write(f"{HELLO}\n".encode())
        process.stdin.flush()
        if command is COMPLETE:
            process.stdin.close()
        assert process.stdout.read(10)
        process.send_signal(number)
        process.stdout.read()
        assert process.stderr.read() == b""
    assert process.returncode == status


def test_a_reader_that_goes_away_is_no_failure() -> None:
    with endless(CHAT) as process:
        process.stdin.write(f"{HELLO}\n".encode())
        process.stdin.flush()
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


# --- options ------------------------------------------------------------------------------------


QUESTION = f"<|im_start|>user\n{HELLO}<|im_end|>\n<|im_start|>assistant\n"


def test_options_reach_the_answers(capsys: pytest.CaptureFixture[str]) -> None:
    def completed(*options: str) -> str:
        words = ["complete", QUESTION, "--model", str(TINYCHAT), "--threads", "1", *options]
        assert main(words) == 0
        return capsys.readouterr().out

    greeting = answers()[0]
    assert completed() == f"{greeting}\n"
    first = completed("--max-tokens", "1").rstrip("\n")
    assert greeting.startswith(first)
    assert 0 < len(first) < len(greeting)
    last, second = greeting.split()[-1], greeting.split()[1]
    stopped = completed("--stop", last, "--stop", second)
    assert stopped == greeting.partition(second)[0] + "\n"
    assert completed("--response-prefix", "Welcome").startswith("Welcome")
    drawn = ("--temperature", "2", "--top-k", "all", "--max-tokens", "20")
    texts = (completed(*drawn, "--seed", seed) for seed in ("1", "1", "2"))
    one, again, other = texts
    assert one == again != other


def test_the_system_prompt_comes_from_a_word_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "system"
    path.write_text("Be brief.\n")
    for option, value in (("--system", "Be brief."), ("--system-file", str(path))):
        assert piped([*CHAT, option, value], "/history").stdout == "system: Be brief.\n"


def test_a_template_comes_from_a_file_with_its_variables(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ raise_exception('mood is ' ~ mood ~ ', not ' ~ (not loud)) if mood else '' }}"
    )
    variables = ["--template-kwarg", "mood=calm", "--template-kwarg", "loud=false"]
    done = piped([*CHAT, "--chat-template", str(template), *variables], "Hello")
    assert done.returncode == 1
    assert "mood is calm, not " in done.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["chat", "--temperature", "-1"], "temperature must be at least 0"),
        (["chat", "--top-k", "few"], "argument --top-k: invalid number or \"all\" value: 'few'"),
        (["chat", "--context-size", "0"], "context_size must be "),
        (["chat", "--overflow", "explode"], "argument --overflow: invalid choice: 'explode'"),
        (["chat", "--chat-template", "nowhere/none"], "nowhere/none: No such file or directory"),
        (["chat", "--template-kwarg", "mood"], "'mood' is not NAME=VALUE"),
        (["chat", "--load", "a", "--system", "b"], "--load or --system, not both"),
        (["chat", "--temp", "1"], "unrecognized arguments: --temp"),
        (["complete", ""], "the prompt is empty"),
        (["complete", "--overflow", "erase_oldest", "a"], "invalid choice: 'erase_oldest'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    usage, _, message = err.rpartition("error: ")
    assert usage.startswith("usage: llamactor")
    assert complaint in message


def test_what_cannot_be_loaded_ends_with_a_message(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF?")
    saved = tmp_path / "saved"
    saved.write_bytes(b"nothing of the kind")
    for words, complaint in (
        (["chat", "nowhere.gguf"], "nowhere.gguf"),
        (["chat", str(broken)], "broken.gguf"),
        (["complete", "--model", "pkg:nothing", "a"], "'nothing' is not installed"),
        (["chat", str(TINYCHAT), "--load", str(saved)], "saved"),
    ):
        done = piped([*COMMAND, *words])
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(rf"llamactor: .*{re.escape(complaint)}.*\n", done.stderr), done.stderr


# --- completion ---------------------------------------------------------------------------------


def test_a_text_is_completed_from_an_argument_or_from_stdin() -> None:
    expected = (0, f"{answers()[0]}\n", "")
    assert outcome(piped([*COMPLETE, QUESTION])) == expected
    assert outcome(piped(COMPLETE, QUESTION + "\n")) == expected
    assert outcome(piped([*COMPLETE, "-"], QUESTION + "\n")) == expected


def test_special_tokens_may_be_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for more in ([], ["--no-special"]):
        words = ["complete", "<|im_end|>", "--model", str(TINYCHAT), "--max-tokens", "1"]
        assert main([*words, "--stats", *more]) == 0
        found = re.search(r"prompt_tokens +(\d+)", capsys.readouterr().err)
        assert found
        counts.append(int(found[1]))
    assert counts[0] == 1 < counts[1]


def test_there_must_be_something_to_complete() -> None:
    complaint = "llamactor: stdin is empty: there is nothing to continue\n"
    assert outcome(piped(COMPLETE)) == (1, "", complaint)
    assert piped(COMPLETE, b"\xff").stderr.startswith("llamactor: stdin is not UTF-8: ")


def test_text_that_the_output_cannot_say_is_replaced() -> None:
    done = piped([*CHAT, "--max-tokens", "1", "--echo"], "Grüße", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.startswith("> Gr??e\n")


# --- the program --------------------------------------------------------------------------------


def test_the_installed_command_is_this_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"llamactor": f"{main.__module__.rpartition('.')[0]}:main"}


def test_it_says_its_version_and_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (["--version"], importlib.metadata.version("llamactor")),
        (["--help"], "continue a text"),
        (["chat", "--help"], "Ctrl-C cancels an answer"),
        (["complete", "--help"], "from stdin"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out
