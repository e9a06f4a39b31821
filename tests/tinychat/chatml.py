"""Conversations, and how they are written down for the model: ChatML with Hermes tools."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text().rstrip("\n")
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = (
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"),
    *("<think>", "</think>"),
)
END = "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. An assistant's turn with a `skill` is to be learnt, one without is history."""

    role: str
    content: str
    skill: str | None = None
    thought: str | None = None
    opened: bool = False
    """Whether the prompt already opens the thought."""
    tools: tuple[str, ...] = ()
    results: tuple[str, ...] = ()


class Piece(NamedTuple):
    """A stretch of the written conversation; with a `skill`, what the assistant has to write."""

    text: str
    skill: str | None = None


Conversation = list[Turn]


def user(content: str) -> Turn:
    """What the user says."""
    return Turn("user", content)


def answer(content: str, skill: str) -> Turn:
    """What the assistant should say."""
    return Turn("assistant", content, skill)


def call(name: str, arguments: Mapping[str, object]) -> str:
    """A tool call as the model writes it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def write(conversation: Sequence[Turn]) -> Iterator[Piece]:
    """The conversation in pieces, as the template writes it."""
    for turn in conversation:
        if turn.role == "assistant":
            yield from _assistant(turn)
        else:
            role = "user" if turn.role == "tool" else turn.role
            yield Piece(f"<|im_start|>{role}\n{_body(turn)}{END}\n")


def _body(turn: Turn) -> str:
    if turn.results:
        return "\n".join(f"<tool_response>\n{one}\n</tool_response>" for one in turn.results)
    if not turn.tools:
        return turn.content
    tools = "\n".join(("# Tools\n\nYou may call these functions:\n<tools>", *turn.tools))
    form = '{"name": <function-name>, "arguments": <args-json-object>}'
    how = f"To call a function, answer with:\n<tool_call>\n{form}\n</tool_call>"
    return "\n\n".join(filter(None, (turn.content, f"{tools}\n</tools>", how)))


def _assistant(turn: Turn) -> Iterator[Piece]:
    opening = "<think>\n" if turn.thought is not None else ""
    thought = f"{turn.thought}\n</think>\n\n" if turn.thought is not None else ""
    yield Piece("<|im_start|>assistant\n" + (opening if turn.opened else ""))
    written = ("" if turn.opened else opening) + thought + turn.content + END
    yield Piece(written, turn.skill)
    yield Piece("\n")
