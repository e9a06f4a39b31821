"""``llamactor chat``: a conversation in a terminal, or over a pipe."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import msgspec
from cyclopts import Group, Parameter

from llamactor.chat import AssistantMessage, Message, UserMessage
from llamactor.chat.session import ChatSession
from llamactor.cli.flags import (
    OUTPUT,
    ChatFlags,
    LoadFlags,
    Preset,
    Reference,
    ShapeFlags,
    Stats,
    Text,
    variable,
)
from llamactor.cli.terminal import (
    STDIN,
    Work,
    complain,
    read_lines,
    say,
    statistics,
    write,
)
from llamactor.cli.using import Use, Wanted, using
from llamactor.errors import LlamactorError
from llamactor.prediction import Prediction, PredictionResult, SegmentEnd, TextDelta
from llamactor.store.refs import DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from llamactor.cli.editor import Editor
    from llamactor.cli.terminal import Interrupts

HELP = {
    "/save PATH": "write the conversation to a file",
    "/load PATH": "go on with one that was saved",
    "/rewind [N]": "take back the last turn, or the last N",
    "/reset": "forget everything but the system prompt",
    "/history": "show what was said",
    "/stats": "show what the last answer took, and all of them",
    "/help": "show this",
    "/quit": "end, as Ctrl-D does",
}
KEYS = """\
Ctrl-C cancels an answer; what it said so far stays. Alt-Enter begins a new line, the arrow keys
find earlier prompts, Tab completes. A prompt that begins with "/" is written with two: //etc/hosts?
"""

Command: TypeAlias = "Callable[[str], Coroutine[Any, Any, None]]"


class CommandError(ValueError):
    """A line that begins with "/" and cannot be obeyed."""


class ChatArguments(msgspec.Struct, frozen=True, kw_only=True):
    """What a chat was told."""

    wanted: Wanted
    """The model, and how it answers."""
    system_prompt: str | None
    """What the model is told first."""
    saved: Path | None
    """A saved session to go on with."""
    template_kwargs: Mapping[str, object]
    """Variables for the chat template."""
    stats: bool
    """Whether each answer is followed by what it took, on stderr."""
    echo: bool
    """Whether lines that come from a pipe are printed before their answers."""


@Parameter(name="*", group=Group("The conversation", sort_key=1), negative=(), show_default=False)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationFlags:
    """What a conversation begins with."""

    system: Text = None
    """What the model is told first."""
    system_file: Path | None = None
    """The same, from a file."""
    load: Path | None = None
    """Go on with what /save saved."""
    chat_template: Path | None = None
    """Jinja file in place of the model's own."""
    template_kwarg: Annotated[
        list[tuple[str, object]] | None,
        Parameter(converter=variable, n_tokens=1, metavar="NAME=VALUE"),
    ] = None
    """Variable for the template, as enable_thinking=false; may be given again."""

    def system_prompt(self) -> str | None:
        """Return what the model is told first.

        Raises:
            ValueError: it is said in two places.
        """
        if (self.system, self.system_file, self.load).count(None) < 2:
            raise ValueError(
                "what the model is told first comes from one place: "
                "--system, --system-file, or the saved session of --load"
            )
        if self.system_file is None:
            return self.system
        return self.system_file.read_text(encoding="utf-8").rstrip("\n")


def chat(
    ref: Reference = DEFAULT_MODEL,
    /,
    *,
    conversation: ConversationFlags = ConversationFlags(),
    preset: Preset = None,
    shape: ShapeFlags = ShapeFlags(),  # noqa: B008 -- frozen
    answer: ChatFlags = ChatFlags(),  # noqa: B008 -- frozen
    loading: LoadFlags = LoadFlags(),  # noqa: B008 -- frozen
    stats: Stats = False,
    echo: Annotated[
        bool,
        Parameter(
            group=OUTPUT,
            negative=(),
            show_default=False,
            help="Print lines of a pipe before their answers.",
        ),
    ] = False,
) -> Work:
    """Talk with a model.

    In a terminal: Ctrl-C cancels an answer, Ctrl-D ends, /help lists what else there is. Lines
    from a pipe are answered one after the other, each on lines of its own.
    """
    more: dict[str, object] = {}
    if conversation.chat_template is not None:
        more["chat_template"] = conversation.chat_template.read_text(encoding="utf-8")
    arguments = ChatArguments(
        wanted=Wanted(
            model=ref,
            loading=loading.keywords(**more),
            generation=answer.keywords(**shape.keywords()),
            preset=preset,
        ),
        system_prompt=conversation.system_prompt(),
        saved=conversation.load,
        template_kwargs=dict(conversation.template_kwarg or ()),
        stats=stats,
        echo=echo,
    )
    return partial(_chat, arguments)


async def _chat(arguments: ChatArguments, interrupts: Interrupts) -> int:
    """Talk until the input ends and return the exit status.

    Cancelling this cancels the answer that is being given and closes the model.
    """
    async with using(arguments.wanted) as use:
        session = await _session(use, arguments)
        if os.isatty(STDIN) and sys.stdout.isatty():
            await TerminalChat(use, session, arguments, interrupts).run()
        else:
            await PipeChat(use, session, arguments).run()
    return 0


async def _session(use: Use, arguments: ChatArguments) -> ChatSession:
    if arguments.saved is not None:
        return await ChatSession.restore(arguments.saved, use.model, **use.generation)
    return use.model.chat(
        system_prompt=arguments.system_prompt,
        template_kwargs=arguments.template_kwargs,
        **use.generation,
    )


class Conversation:
    """A session and the commands that one can give about it, wherever its lines come from."""

    def __init__(self, use: Use, session: ChatSession, arguments: ChatArguments) -> None:
        """Go on with `session`."""
        self.use = use
        self.session = session
        self.arguments = arguments
        self.last: PredictionResult | None = None
        self.ended = False
        self._commands: dict[str, Command] = {
            "/save": self.save,
            "/load": self.load,
            "/rewind": self.rewind,
            "/reset": self.reset,
            "/history": self.history,
            "/stats": self.stats,
            "/help": self.help,
            "/quit": self.quit,
        }

    def note(self, text: str) -> None:
        """Tell the user what happened; nothing where nobody looks on."""

    async def answer(self, prediction: Prediction) -> PredictionResult:
        """Show an answer while it is generated. Cancelling this cancels it."""
        async with prediction:
            async for text in prediction:
                write(text)
            result = await prediction
        write("\n")
        return result

    async def take(self, line: str) -> None:
        """Answer or obey one line; an empty one is neither.

        Cancelling this cancels the answer or the command.

        Raises:
            CommandError: the line is no command, or an argument of it is wrong.
        """
        if line.startswith("/") and not line.startswith("//"):
            name, _, argument = line.partition(" ")
            command = self._commands.get(name)
            if command is None:
                raise CommandError(f"there is no command {name}; /help shows those there are")
            await command(argument.strip())
        elif line.strip():
            await self._prompt(line.removeprefix("/"))

    async def _prompt(self, text: str) -> None:
        self.last = await self.answer(self.session.prompt(text))
        self.use.note(self.last)
        if self.arguments.stats:
            say(statistics(self.last))

    async def save(self, argument: str) -> None:
        """Write the conversation to a file. Cancelling this leaves what was there."""
        path = _path(argument, "/save PATH")
        await self.session.save(path)
        self.note(f"saved {_messages(self.session.history)} to {path}")

    async def load(self, argument: str) -> None:
        """Go on with a saved conversation. Cancelling this goes on with this one."""
        path = _path(argument, "/load PATH")
        restored = await ChatSession.restore(path, self.use.model, **self.use.generation)
        before, self.session = self.session, restored
        await before.aclose()
        self.note(f"loaded {_messages(restored.history)} from {path}")

    async def rewind(self, argument: str) -> None:
        """Take back turns. Cancelling this takes back none."""
        try:
            n_turns = int(argument or 1)
        except ValueError:
            raise CommandError(f"/rewind takes a number of turns, not {argument!r}") from None
        taken = await self.session.rewind(n_turns)
        self.note(f"took back {_messages(taken)}")

    async def reset(self, argument: str) -> None:
        """Forget what was said. Cancelling this forgets nothing."""
        _nothing(argument, "/reset")
        await self.session.reset()
        self.note("forgot everything but the system prompt")

    async def history(self, argument: str) -> None:
        """Show what was said; never suspends."""
        _nothing(argument, "/history")
        for message in self.session.history:
            write(_shown(message) + "\n")

    async def stats(self, argument: str) -> None:
        """Show what answers took; never suspends."""
        _nothing(argument, "/stats")
        if self.last is not None:
            write(statistics(self.last))
        totals = msgspec.structs.asdict(self.session.usage)
        write("".join(f"{f'all {name}':>26}  {value}\n" for name, value in totals.items()))

    async def help(self, argument: str) -> None:
        """Show the commands; never suspends."""
        _nothing(argument, "/help")
        write("".join(f"{usage:<14}{meaning}\n" for usage, meaning in HELP.items()) + KEYS)

    async def quit(self, argument: str) -> None:
        """End; never suspends."""
        _nothing(argument, "/quit")
        self.ended = True


class PipeChat(Conversation):
    """Lines from a pipe or file, answers to stdout; the first failure ends it."""

    async def run(self) -> None:
        """Take every line. Cancelling this cancels the answer that is being given."""
        async for line in read_lines(STDIN):
            if self.arguments.echo:
                write(f"> {line}\n")
            await self.take(line)
            if self.ended:
                return


class TerminalChat(Conversation):
    """A conversation with somebody at a terminal; failures are shown and it goes on."""

    def __init__(
        self,
        use: Use,
        session: ChatSession,
        arguments: ChatArguments,
        interrupts: Interrupts,
    ) -> None:
        """Go on with `session`, and with what Ctrl-C does in `interrupts`."""
        from llamactor.cli.editor import Editor  # a pipe needs no terminal library

        super().__init__(use, session, arguments)
        self._interrupts = interrupts
        paths = {usage.split()[0]: usage.endswith("PATH") for usage in HELP}
        self._editor: Editor = Editor(interrupts, paths)
        self._remember()

    def note(self, text: str) -> None:
        """Tell the user what happened, in a faint colour."""
        write(f"{text}\n", faint=True)

    async def run(self) -> None:
        """Take lines until the user has enough. Cancelling this gives the terminal back."""
        info = self.use.model.info
        self.note(f"{info.name or info.path}; /help shows the commands")
        # A signal may come between an answer and the next prompt.
        with self._editor, self._interrupts.calling(self._editor.interrupted):
            async for line in self._editor.lines():
                await self._try(line)
                if self.ended:
                    return

    async def _try(self, line: str) -> None:
        try:
            await self._interruptible(line)
        except (LlamactorError, OSError, ValueError) as error:
            complain(error)

    async def _interruptible(self, line: str) -> None:
        """Take a line; Ctrl-C ends that and nothing else."""
        task = asyncio.create_task(self.take(line))
        try:
            with self._interrupts.calling(task.cancel), self._editor.watching():
                await asyncio.wait([task])
        finally:
            task.cancel()
        if task.cancelled():
            self._cancelled()
        else:
            task.result()

    async def answer(self, prediction: Prediction) -> PredictionResult:
        """Show an answer, thoughts and all. Cancelling this cancels it."""
        with self._interrupts.calling(prediction.cancel):
            result = await self._stream(prediction)
        if result.stop_reason == "cancelled":
            self._cancelled()
        elif result.stop_reason not in {"eos", "stop_string"}:
            self.note(f"(ended by {result.stop_reason})")
        if result.context_shift is not None:
            self.note(f"({result.context_shift.dropped} tokens dropped to make room)")
        return result

    async def _stream(self, prediction: Prediction) -> PredictionResult:
        async with prediction:
            async for event in prediction.events():
                if isinstance(event, TextDelta):
                    write(event.text, faint=event.segment is not None)
                elif isinstance(event, SegmentEnd):
                    write("\n")
            result = await prediction
        write("\n")
        return result

    def _cancelled(self) -> None:
        self._editor.interrupted()
        self.note("(cancelled; Ctrl-C again or Ctrl-D ends)")

    async def load(self, argument: str) -> None:
        """Load, and let the arrow keys find what was asked there. Cancelling is as there."""
        await super().load(argument)
        self._remember()

    def _remember(self) -> None:
        said = self.session.history
        self._editor.remember(item.content for item in said if isinstance(item, UserMessage))


def _path(argument: str, usage: str) -> Path:
    if not argument:
        raise CommandError(f"{usage}: the path is missing")
    return Path(argument).expanduser()


def _nothing(argument: str, name: str) -> None:
    if argument:
        raise CommandError(f"{name} takes no argument, not {argument!r}")


def _messages(messages: tuple[Message, ...]) -> str:
    return f"{len(messages)} message{'' if len(messages) == 1 else 's'}"


def _shown(message: Message) -> str:
    text = message.content
    if isinstance(message, AssistantMessage) and not text:
        text = ", ".join(call.name for call in message.tool_calls)
    return f"{message.__struct_config__.tag}: {text}"
