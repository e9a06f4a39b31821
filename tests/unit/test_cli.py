"""The command line in processes of its own, at a terminal and over pipes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import re
import signal
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor.cli import main
from llamactor.cli.terminal import visible
from tests.conftest import PATIENCE, TINYCHAT
from tests.terminals import (
    ANSWERING,
    COMMAND,
    CONTROL_C,
    CONTROL_D,
    ENTER,
    PROMPT,
    ROOT,
    TAB,
    UP,
    Terminal,
    outcome,
    piped,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

CHAT = [*COMMAND, "chat", str(TINYCHAT), "--threads", "1"]
COMPLETE = [*COMMAND, "complete", "--model", str(TINYCHAT), "--threads", "1"]

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


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    """A chat with tinychat that has shown its first prompt."""
    opened = Terminal([*CHAT, *arguments])
    try:
        yield opened
    finally:
        opened.close()


def endless(command: list[str]) -> Any:
    """Start a command whose answers have no end, with pipes to it."""
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([*command, "--ignore-eos", "--overflow", "rolling_window"], **pipes)


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


def test_what_a_failure_says_cannot_command_the_terminal(tmp_path: Path) -> None:
    template = tmp_path / "evil.jinja"
    template.write_text(
        "{% for message in messages %}"
        "{% if 'name' in message.content %}{{ raise_exception('a\x1b[2Jb\nc') }}{% endif %}"
        "{{ message.content }}{% endfor %}"
    )
    with terminal("--chat-template", str(template)) as chat:
        chat.asks()
        chat.type(HELLO + ENTER)
        shown = chat.shows(f"llamactor: (.*?){re.escape(PROMPT)}")[1]
    assert "a␛[2Jb c" in shown
    assert "\x1b[2J" not in shown


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


@pytest.mark.parametrize("words", [["ps"], ["ps", "--json"], ["presets"]])
def test_nobody_has_to_read_what_there_is(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*COMMAND, *words], stdout=writer, stderr=subprocess.PIPE, check=False, timeout=PATIENCE
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


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


def test_an_answer_has_the_shape_that_was_asked_for(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [7]}, "minItems": 2, "maxItems": 2}')
    gbnf, lark = tmp_path / "yes.gbnf", tmp_path / "no.lark"
    gbnf.write_text('root ::= "yes"')
    lark.write_text('start: "no"')
    for shape, pattern in (
        (["--schema", str(schema)], r"\[\s*7\s*,\s*7\s*\]"),
        (["--regex", "[A-C]{3}"], "[A-C]{3}"),
        (["--grammar", str(gbnf)], "yes"),
        (["--grammar", str(lark)], "no"),
        (["--grammar", "arithmetic", "--max-tokens", "4"], "[^=]*=?.*"),
    ):
        done = piped([*COMPLETE, QUESTION, *shape])
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(pattern, done.stdout.strip()), done.stdout
    done = piped([*CHAT, "--regex", "maybe", "--reasoning-budget", "4"], HELLO)
    assert done.stdout == "maybe\n"


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
        (["sing"], 'Unknown command "sing". Available commands: '),
        (["chat", "--temperature", "-1"], "temperature must be at least 0"),
        (["chat", "--top-k", "few"], "for --top-k: 'few' is neither a whole number nor \"all\""),
        (["chat", "--context-size", "0"], "context_size must be "),
        (["chat", "--overflow", "explode"], 'Invalid value "explode" for --overflow. Choose from:'),
        (["chat", "--chat-template", "nowhere/none"], "nowhere/none: No such file or directory"),
        (["chat", "--template-kwarg", "mood"], "'mood' is not NAME=VALUE"),
        (["chat", "--load", "a", "--system", "b"], "--system, --system-file, or the saved session"),
        (["chat", "--temp", "1"], "Unknown option: --temp."),
        (["chat", "--thread", "1"], "Did you mean --threads?"),
        (["chat", "one", "two"], "nothing is to be done with 'two'"),
        (["complete", "--tempreature=1"], "unknown option: --tempreature=1"),
        (["complete", ""], "the prompt is empty"),
        (["complete", "--overflow", "erase_oldest", "a"], 'Invalid value "erase_oldest"'),
        (["complete", "a", "--grammar", "arithmtic"], "name must be one of 'json', "),
        (["complete", "a", "--grammar", "none.gbnf"], "none.gbnf: No such file or directory"),
        (["complete", "a", "--schema", str(TINYCHAT)], f"{TINYCHAT} is no JSON: "),
        (["chat", "--regex", "a", "--grammar", "json"], "of grammar, schema and regex one at most"),
        (["bench", "--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["bench", "--parallel", "2", "300"], "--parallel must be 1 to 256, not 300"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"llamactor: [^\n]*{re.escape(complaint)}[^\n]*\n", err), err


def test_what_cannot_be_loaded_ends_with_a_message(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF?")
    saved = tmp_path / "saved"
    saved.write_bytes(b"nothing of the kind")
    for words, status, complaint in (
        (["chat", "nowhere.gguf"], 3, "nowhere.gguf"),
        (["chat", str(broken)], 1, "broken.gguf"),
        (["complete", "--model", "pkg:nothing", "a"], 3, "'nothing' is not installed"),
        (["chat", str(TINYCHAT), "--load", str(saved)], 1, "saved"),
    ):
        done = piped([*COMMAND, *words])
        assert (done.returncode, done.stdout) == (status, "")
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
        ([], "Usage: llamactor COMMAND"),
        (["--help"], "Continue a text"),
        (["--help"], "Exit status: 0 done"),
        (["chat", "--help"], "Ctrl-C cancels an answer"),
        (["complete", "--help"], "from stdin"),
        (["bench", "--help"], "the bare llama.cpp loop"),
    ):
        assert main(words) == 0
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize("command", ["chat", "complete", "bench", "ps"])
def test_every_option_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A line of the help that names an option has a word about it, on it or beneath."""
    assert main([command, "--help"]) == 0
    rows = [line[2:-2] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    named = [row for row in rows if row.startswith("--")]
    assert named
    assert [row for row in named if not re.match(r"--\S+( \S+)?  +\S", row)] == []


def test_colours_are_for_terminals_and_can_be_turned_off() -> None:
    def shown(**more: str) -> str:
        screen = Terminal([*COMMAND, "--help"], **more)
        try:
            return screen.shows(".*Exit status.*?\n")[0]
        finally:
            screen.close()

    assert "\x1b[36m" in shown()
    assert "\x1b[36m" not in shown(NO_COLOR="1")
    assert "\x1b" not in piped([*COMMAND, "--help"]).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_be_taught_to_complete_its_words(shell: str, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "ZSH": "", "ZSH_CUSTOM": "", "XDG_DATA_HOME": ""}
    done = piped([*COMMAND, "--install-completion", "--shell", shell], **home)
    assert done.returncode == 0, done.stderr
    written = [path for path in tmp_path.rglob("*llamactor*") if path.is_file()]
    assert len(written) == 1
    script = written[0].read_text(encoding="utf-8")
    assert "complete" in script
    assert "max-tokens" in script
