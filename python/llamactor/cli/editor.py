"""The prompt of a terminal chat: lines with editing keys, history and completion."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.shortcuts import CompleteStyle

from llamactor.cli.terminal import write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Mapping

    from prompt_toolkit.key_binding.key_processor import KeyPress

    from llamactor.cli.terminal import Interrupts

PROMPT = "> "


class InterruptedPromptError(Exception):
    """Ctrl-C at the prompt."""


class Editor:
    """Reads what the user types, until Ctrl-D or a second Ctrl-C.

    While it is entered, the terminal hands over every key as it is typed, Ctrl-C too: what is typed
    during an answer neither shows up in it nor gets lost.
    """

    def __init__(self, interrupts: Interrupts, commands: Mapping[str, bool]) -> None:
        """Make one.

        Args:
            interrupts: What else would get Ctrl-C.
            commands: Names to complete with Tab, and whether a path follows.
        """
        self._interrupts = interrupts
        self._may_leave = False
        self._held = contextlib.ExitStack()
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            completer=CommandCompleter(commands),
            complete_style=CompleteStyle.READLINE_LIKE,
            complete_while_typing=False,
            enable_suspend=True,
            interrupt_exception=InterruptedPromptError,
            key_bindings=_keys(),
            prompt_continuation="  ",
        )

    def __enter__(self) -> Editor:
        self._held.enter_context(self._session.input.raw_mode())
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Let Ctrl-C interrupt what is done in the block; other keys wait for the next prompt."""
        source = self._session.input
        kept: list[KeyPress] = []

        def take(keys: list[KeyPress]) -> None:
            for key in keys:
                if key.key == Keys.ControlC:
                    self._interrupts.fire()
                else:
                    kept.append(key)
            if source.closed:
                self._interrupts.fire()

        try:
            with source.attach(lambda: take(source.read_keys())):
                take(get_typeahead(source))
                yield
        finally:
            store_typeahead(source, kept)

    def remember(self, texts: Iterable[str]) -> None:
        """Let the arrow keys find `texts`, the last one first."""
        for text in texts:
            self._session.history.append_string(text)

    def interrupted(self) -> None:
        """Note that Ctrl-C was pressed elsewhere: at an empty prompt, the next one ends."""
        self._may_leave = True

    async def lines(self) -> AsyncIterator[str]:
        """Yield what is typed, until the end. Cancelling this gives the terminal back."""
        while True:
            try:
                line = await self._read()
            except EOFError:
                return
            except InterruptedPromptError:
                if not self._goes_on():
                    return
            else:
                self._may_leave = False
                yield line

    async def _read(self) -> str:
        application = self._session.app

        def interrupt() -> None:
            if application.is_running and not application.is_done:
                application.exit(exception=InterruptedPromptError())

        with self._interrupts.calling(interrupt):
            return await self._session.prompt_async(
                set_exception_handler=False, handle_sigint=False
            )

    def _goes_on(self) -> bool:
        """Whether Ctrl-C did anything but end: it drops what was typed, or warns."""
        typed = self._session.default_buffer.text
        if typed:
            self._may_leave = False
            return True
        if self._may_leave:
            return False
        self._may_leave = True
        write("Ctrl-C again or Ctrl-D ends\n", faint=True)
        return True


class CommandCompleter(Completer):
    """Completes the names of commands, and paths after those that take one."""

    def __init__(self, commands: Mapping[str, bool]) -> None:
        """Know commands, and whether a path follows."""
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        """Yield what the text before the cursor may become."""
        name, space, path = document.text_before_cursor.partition(" ")
        if space and self._commands.get(name):
            yield from self._paths.get_completions(Document(path), event)
        elif name.startswith("/") and not space:
            found = (command for command in self._commands if command.startswith(name))
            yield from (Completion(command, start_position=-len(name)) for command in found)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
