"""The history of a chat: a value, so that a turn that fails leaves nothing to be put back."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import msgspec

from llamactor.chat.messages import AssistantMessage, Message, SystemMessage, UserMessage

if TYPE_CHECKING:
    from llamactor.chat.shift import Window


class History(msgspec.Struct, frozen=True):
    """All messages of a chat, and what the context holds of them."""

    messages: tuple[Message, ...] = ()
    """Everything that was said."""
    window: Window | None = None
    """What stands for its first messages since they did not fit; None is everything."""

    @property
    def shown(self) -> tuple[Message, ...]:
        """The messages as the context has them: the window, and what was said since."""
        if self.window is None:
            return self.messages
        return self.window.messages + self.messages[self.window.covers :]

    @property
    def turns(self) -> list[int]:
        """Where its turns begin: the indices of the user's messages."""
        return [i for i, item in enumerate(self.messages) if isinstance(item, UserMessage)]

    def added(self, *messages: Message) -> History:
        """Return it with messages at its end."""
        return History(self.messages + messages, self.window)

    def without_tokens(self) -> History:
        """Return it for another model, whose vocabulary knows nothing of the tokens of this one."""
        window = self.window
        if window is not None:
            window = msgspec.structs.replace(window, messages=_untold(window.messages))
        return History(_untold(self.messages), window)

    def cut(self, length: int) -> History:
        """Return its first `length` messages; a window that knows of more is given up."""
        keeps = self.window is not None and self.window.covers <= length
        return History(self.messages[:length], self.window if keeps else None)

    def shifted(self, window: Window) -> History:
        """Return it with a window for all of it."""
        return History(self.messages, None if window.messages == self.messages else window)


def _untold(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages without the tokens that a model has written them with."""
    return tuple(
        msgspec.structs.replace(item, tokens=None, content_start=0)
        if isinstance(item, AssistantMessage)
        else item
        for item in messages
    )


def leading_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the system messages that come first."""
    return tuple(itertools.takewhile(lambda item: isinstance(item, SystemMessage), messages))
