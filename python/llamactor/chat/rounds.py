"""The rounds of a turn: how often the model is asked, with which tools, and what was said so far.

A turn with tools that the program carries out by itself has rounds: the model answers, its calls
are carried out, and it is asked again with their results, until it makes no more calls. This is how
far that is; a value of its own, which knows neither predictions nor tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llamactor.chat.messages import AssistantMessage, Message, ToolMessage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from llamactor.chat.tools import ToolCalls, ToolUse
    from llamactor.prediction import PredictionResult, StopReason


class Rounds:
    """How far the rounds of one turn are."""

    __slots__ = ("_use", "calls", "ended", "left", "made", "open")

    def __init__(self, use: ToolUse, max_tokens: int | None) -> None:
        """Begin with the first round."""
        self._use = use
        self.ended = 0
        """Rounds that have ended."""
        self.calls = 0
        """Calls that were made in them."""
        self.left = max_tokens
        """Tokens that may still be generated; None is no limit."""
        self.made: tuple[Message, ...] = ()
        """What whole rounds have added: answers with calls, and results."""
        self.open: AssistantMessage | None = None
        """The answer of a round whose calls are being carried out."""

    @property
    def may_follow(self) -> bool:
        """Whether there are rounds at all: calls that the program carries out."""
        return self._use.tools.has_handlers and self._use.choice != "none"

    @property
    def definitions(self) -> tuple[Mapping[str, Any], ...]:
        """Tools that the model is shown in this round: the last one that it may have has none."""
        is_last = self._use.max_rounds == self.ended + 1 and self.may_follow
        return () if is_last else self._use.tools.definitions

    def choice(self, messages: Iterable[Message]) -> str | None:
        """Return what this round may or must call; None where nobody speaks of tools.

        When the model has called what it must, it is free.
        """
        if self.definitions:
            return self._use.choice if self.ended == 0 or self._use.choice == "none" else "auto"
        return "none" if any(map(_is_about_tools, messages)) else None

    def end(self, last: PredictionResult, answer: AssistantMessage) -> None:
        """End a round; its calls are being carried out."""
        self.ended += 1
        self.calls += len(answer.tool_calls)
        self.open = answer
        if self.left is not None:
            self.left = max(0, self.left - len(last.tokens))

    def settle(self, results: tuple[ToolMessage, ...]) -> tuple[Message, ...]:
        """Take the results of the round that has ended; return what it has added."""
        added: tuple[Message, ...] = () if self.open is None else (self.open, *results)
        self.made += added
        self.open = None
        return added

    def verdict(self, last: PredictionResult, calls: ToolCalls) -> tuple[bool, StopReason | None]:
        """Return whether another round follows, and if not, why it ends; None is as the round."""
        if not calls.calls or not calls.all_answered or last.stop_reason != "tool_calls":
            return False, None
        return (True, None) if self.left != 0 else (False, "max_tokens")

    def said(
        self, ending: AssistantMessage | None, stop_reason: StopReason | None
    ) -> list[Message]:
        """Return all messages, as far as they are whole, with the last answer.

        What was called and not answered, because it was cancelled meanwhile, was not called.
        """
        if self.open is not None and (self.open.content or self.open.reasoning):
            ending = AssistantMessage(self.open.content, self.open.reasoning)
        messages = [*self.made, *([] if ending is None else [ending])]
        if messages and isinstance(messages[-1], ToolMessage) and stop_reason != "tool_calls":
            # Many templates want an answer before the user speaks again.
            messages.append(AssistantMessage())
        return messages


def _is_about_tools(message: Message) -> bool:
    return isinstance(message, ToolMessage) or bool(getattr(message, "tool_calls", ()))
