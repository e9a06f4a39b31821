"""Whole conversations, every one made by this program: the text that the model is trained on."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tests.tinychat.chatml import Conversation, Turn, answer, call, user, write
from tests.tinychat.jsons import json_chat
from tests.tinychat.remembering import NAME, TOPICS, Memory, asked, memory, told
from tests.tinychat.skills import Exchange, exchange, fact, greet, pick, sums, worded
from tests.tinychat.thinking import think_chat, thoughtful
from tests.tinychat.tools import Request, Tool, compared, described, request, tool
from tests.tinychat.words import MOODS, ROLES, Draw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HELPFUL = (
    "You are a helpful assistant.|You are a friendly assistant.|Be helpful.|Be brief.|"
    "You are a helpful AI assistant.|Answer the user's questions.|You are an assistant."
)
_STYLES = {
    "upper": ("Answer in upper case.", "Always answer in upper case.", "Write in capital letters."),
    "oneword": (
        *("Answer in one word.", "Always answer with one word.", "Reply with a single word."),
        "Use only one word.",
    ),
}
_WHO = (
    "Who are you?|What is your name?|What are you called?|Introduce yourself.|"
    "What's your name?|Tell me who you are.|Tell me your name."
)
_WHAT_I_SAID = (
    "What did I just say?|Repeat what I just said.|What did I say?|What was my last message?|"
    "Say again what I said."
)
_NOT_TOLD = "You did not tell me that."


@dataclass(slots=True)
class _Talk:
    """A conversation while it is made up."""

    draw: Draw
    style: str | None = None
    persona: tuple[str, str] | None = None
    memories: dict[str, Memory] = field(default_factory=dict)
    turns: Conversation = field(default_factory=list)

    def add(self, said: Exchange) -> None:
        """One more exchange, if the style that was ordered can say it."""
        if self.style == "oneword" and said.word is None:
            return
        text, skill = said.answer, said.skill
        if self.style == "upper":
            text, skill = text.upper(), "upper"
        elif self.style == "oneword":
            text, skill = said.word or "", "oneword"
        self.turns += [user(said.question), answer(text, skill)]

    def tell(self, one: Memory) -> None:
        """The user says something to remember."""
        sentence, confirmed = told(self.draw, one), one.fill(one.topic.confirmed)
        self.memories[one.topic.told] = one
        self.add(Exchange("confirm", sentence, confirmed, "OK"))

    def ask(self, one: Memory, skill: str = "memory") -> None:
        """The user asks for something that was told."""
        self.add(Exchange(skill, asked(self.draw, one), one.fill(one.topic.answer), one.value))

    def chatter(self) -> None:
        """The user asks anything that has nothing to do with what was told."""
        self.add(exchange(self.draw))

    def know(self) -> None:
        """Something is told, asked for, or asked for without having been told."""
        one, lot = memory(self.draw, self.draw.one(TOPICS)), self.draw.number(1, 20)
        if lot > 11 and self.memories:
            self.ask(self.draw.one([*self.memories.values()]))
        elif lot > 1:
            self.tell(one)
        elif one.topic.told not in self.memories and one.topic.kind != "code":
            self.add(Exchange("nomemory", asked(self.draw, one), _NOT_TOLD, "Unknown"))

    def introduce(self) -> None:
        """The user asks who the assistant is."""
        question = worded(self.draw, self.draw.phrase(_WHO))
        if self.persona is None:
            said = Exchange("whoami", question, "I am Tiny, a tiny language model.", "Tiny")
        else:
            name, role = self.persona
            said = Exchange("persona", question, f"I am {name}, {role}.", name)
        self.add(said)

    def recall(self) -> None:
        """The user asks what the last message was."""
        if self.style or not self.turns or self.turns[-1].skill in (None, "recall", "summary"):
            return
        said = f'You said: "{self.turns[-2].content}"'
        self.add(Exchange("recall", self.draw.phrase(_WHAT_I_SAID), said))

    def instruct(self) -> None:
        """The question itself says in which form to answer."""
        if self.style:
            return
        said = self.draw.one((fact, sums, pick, greet))(self.draw)
        style = self.draw.one([*_STYLES])
        order = self.draw.one(_STYLES[style][:1])
        text = said.answer.upper() if style == "upper" else said.word or ""
        self.add(Exchange(style, f"{said.question.rstrip('.?')}? {order}", text))


def _started(draw: Draw) -> _Talk:
    """A talk with any system prompt, or none."""
    talk, orders = _Talk(draw), list[str]()
    lot = draw.number(1, 100)
    if lot <= 25:
        talk.persona = (draw.name(), f"a {draw.one(MOODS)} {draw.one(ROLES)}")
        form = draw.phrase("You are {}, {}.|Your name is {}. You are {}.|Act as {}, {}.")
        orders.append(form.format(*talk.persona))
    elif lot <= 55:
        orders.append(draw.phrase(_HELPFUL))
    elif lot <= 63:
        orders.append(_known(talk))
    if draw.chance(0.13):
        talk.style = draw.one([*_STYLES])
        orders.append(draw.one(_STYLES[talk.style]))
    if orders:
        talk.turns.append(Turn("system", " ".join(orders)))
    return talk


def _known(talk: _Talk) -> str:
    """The system prompt tells something about the user."""
    topic = talk.draw.one([NAME, *(topic for topic in TOPICS if topic.about)])
    one = memory(talk.draw, topic)
    talk.memories[topic.told] = one
    return one.fill(talk.draw.phrase(topic.about))


def chat(draw: Draw) -> Conversation:
    """Small talk with things told and asked for."""
    talk = _started(draw)
    steps: tuple[Callable[[], None], ...] = (
        *([talk.know] * 8 + [talk.chatter] * 10),
        *(talk.introduce, talk.recall, talk.instruct),
    )
    for _ in range(draw.number(1, 7)):
        draw.one(steps)()
    return talk.turns if _answers(talk.turns) else chat(draw)


def name_chat(draw: Draw) -> Conversation:
    """The user's name, told early and asked for after unrelated turns."""
    talk = _started(draw)
    for _ in range(draw.one((0, 0, 0, 1))):
        talk.chatter()
    talk.tell(memory(draw, NAME))
    for _ in range(draw.one((1, 1, 1, 2, 2, 3, 4, 6))):
        talk.chatter() if draw.chance(0.8) else _aside(talk)
    talk.ask(talk.memories[NAME.told], "name")
    if draw.chance(0.3):
        talk.chatter()
        talk.ask(talk.memories[NAME.told], "name")
    return talk.turns


def _aside(talk: _Talk) -> None:
    """Something else to remember, so that the name is not the only one."""
    talk.tell(memory(talk.draw, talk.draw.one(TOPICS[1:])))


def long_chat(draw: Draw) -> Conversation:
    """Many turns, with a name to keep all the way."""
    talk = replace(_started(draw), style=None)
    talk.turns = [turn for turn in talk.turns if turn.role != "system"]
    talk.persona, talk.memories = None, {}
    talk.tell(memory(draw, NAME))
    length = draw.number(2500, 4800)
    while sum(len(turn.content) for turn in talk.turns) + 70 * len(talk.turns) < length:
        talk.chatter() if draw.chance(0.85) else talk.know()
        if draw.chance(0.15):
            talk.ask(talk.memories[NAME.told], "name_far")
    talk.ask(talk.memories[NAME.told], "name_far")
    return talk.turns


def _answers(turns: Conversation) -> bool:
    return any(turn.role == "assistant" for turn in turns)


def tool_chat(draw: Draw) -> Conversation:
    """A conversation with tools at hand."""
    offered = _toolbox(draw)
    wrapped, sort = draw.chance(0.8), draw.chance(0.4)
    lines = tuple(described(draw, one, wrapped=wrapped, sort=sort) for one in offered)
    persona = f"You are {draw.name()}, a {draw.one(MOODS)} {draw.one(ROLES)}."
    system = draw.one(("", "", draw.phrase(_HELPFUL), persona))
    turns = [Turn("system", system, tools=lines)]
    for _ in range(draw.one((1, 1, 2, 3))):
        turns += _with_tools(draw, offered)
    if not _answers(turns):
        return tool_chat(draw)
    return thoughtful(turns, draw) if draw.chance(0.06) else turns


def _toolbox(draw: Draw) -> list[Tool]:
    """One to four tools that are not mistaken for each other."""
    offered = list[Tool]()
    for _ in range(draw.one((1, 1, 1, 2, 2, 3))):
        one = tool(draw)
        offered += [] if any(_alike(one, other) for other in offered) else [one]
    return offered


def _alike(one: Tool, other: Tool) -> bool:
    questions = set(one.family.asked.split("|"))
    return one.name == other.name or not questions.isdisjoint(other.family.asked.split("|"))


def _with_tools(draw: Draw, offered: list[Tool]) -> Conversation:
    lot = draw.number(1, 100)
    if lot <= 12:
        said = exchange(draw)
        without = [user(said.question), answer(said.answer, "tool_none")]
        return [] if said.skill == "sums" else without
    if lot <= 16:
        return _told_beside(draw)
    chosen = draw.one(offered)
    if lot <= 62:
        return _one_call(draw, chosen)
    pair = compared(draw, chosen) if lot <= 84 else None
    if pair is not None:
        question, requests, reply = pair
        return _two_calls(question, [(chosen, one) for one in requests], reply)
    return _both(draw, chosen, draw.one(offered))


def _told_beside(draw: Draw) -> Conversation:
    """The user's name goes well with tools."""
    one = memory(draw, NAME)
    turns = [user(told(draw, one)), answer(one.fill(NAME.confirmed), "tool_none")]
    return [*turns, user(asked(draw, one)), answer(one.fill(NAME.answer), "tool_none")]


def _one_call(draw: Draw, chosen: Tool) -> Conversation:
    wish = request(draw, chosen)
    result, reply = wish.result, wish.reply
    if draw.chance(0.05):
        result = draw.phrase('{"error": "not found"}|{"error": "timeout"}|error: failed')
        reply = "Sorry, the tool did not work."
    optional = any(slot.mentions for slot in chosen.parameters.values())
    skill = "tool_plain" if not chosen.parameters else "tool_optional" if optional else "tool_one"
    return [
        *(user(worded(draw, wish.question)), answer(call(chosen.name, wish.arguments), skill)),
        *(Turn("tool", "", results=(result,)), answer(reply, "tool_read")),
    ]


def _both(draw: Draw, first: Tool, second: Tool) -> Conversation:
    """Two wishes in one question."""
    one, other = request(draw, first), request(draw, second)
    left, right = one.question, other.question
    if left == right or ": " in left:
        return _one_call(draw, first)
    going_on = right[0].lower() + right[1:]
    joined = draw.one(
        (f"{left} {right}", f"{left.rstrip('.?')} and {going_on}", f"{left} And {going_on}")
    )
    return _two_calls(joined, [(first, one), (second, other)], f"{one.reply} {other.reply}")


def _two_calls(question: str, wishes: list[tuple[Tool, Request]], reply: str) -> Conversation:
    calls = "\n".join(call(used.name, wish.arguments) for used, wish in wishes)
    results = tuple(wish.result for _, wish in wishes)
    return [
        *(user(question), answer(calls, "tool_two")),
        *(Turn("tool", "", results=results), answer(reply, "tool_read_two")),
    ]


_MIXTURE: tuple[tuple[Callable[[Draw], Conversation], int], ...] = (
    (chat, 64),
    (name_chat, 30),
    (long_chat, 1),
    (tool_chat, 48),
    (json_chat, 32),
    (think_chat, 16),
)
_KINDS = [kind for kind, weight in _MIXTURE for _ in range(weight)]


def conversation(draw: Draw) -> Conversation:
    """Any conversation, as often as training needs its kind."""
    return draw.one(_KINDS)(draw)


def conversations(seed: str, *, unseen: bool = False) -> Iterator[Conversation]:
    """Endless conversations, the same ones for the same seed."""
    draw = Draw(seed, unseen=unseen)
    while True:
        yield conversation(draw)


def main() -> None:
    """Show some."""
    for _, turns in zip(range(20), conversations(sys.argv[1]), strict=False):
        sys.stdout.write("".join(piece.text for piece in write(turns)) + "=" * 60 + "\n")


if __name__ == "__main__":
    main()
