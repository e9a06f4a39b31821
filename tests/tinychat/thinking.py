"""Questions that are thought about before they are answered."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tests.tinychat.chatml import Conversation, Turn, user
from tests.tinychat.remembering import TOPICS, asked, memory, told
from tests.tinychat.skills import Exchange, exchange, worded

if TYPE_CHECKING:
    from tests.tinychat.words import Draw


def think_chat(draw: Draw) -> Conversation:
    """A conversation whose last answer is thought about.

    In half of them nothing in the text asks for a thought: the prompt itself opens it.
    """
    opened = draw.chance(0.5)
    earlier, last = _talk(draw)
    orders = "/think|You are a helpful assistant. /think|Think step by step. /think"
    by_system = draw.chance(0.5)
    question = last.question if opened or by_system else f"{last.question} /think"
    system = draw.phrase(orders) if by_system and not opened else _usual(draw)
    skill = "think_opened" if opened else "think"
    reply = Turn("assistant", last.answer, skill, thought=last.thought, opened=opened)
    return [*([Turn("system", system)] if system else []), *earlier, user(question), reply]


def _usual(draw: Draw) -> str:
    return draw.one(("", "", "You are a helpful assistant."))


def _talk(draw: Draw) -> tuple[Conversation, Exchange]:
    """What came before, as history, and the exchange to think about."""
    if draw.chance(0.25):
        return _remembered(draw)
    earlier = Conversation()
    if draw.chance(0.3):
        before = exchange(draw)
        earlier = [user(before.question), Turn("assistant", before.answer)]
    makers = (_long_sum, _long_sum, _letters, _backwards, exchange, exchange)
    return earlier, draw.one(makers)(draw)


def _remembered(draw: Draw) -> tuple[Conversation, Exchange]:
    one = memory(draw, draw.one(TOPICS))
    answer = one.fill(one.topic.answer)
    sentence = told(draw, one)
    earlier = [user(sentence), Turn("assistant", one.fill(one.topic.confirmed))]
    return earlier, Exchange("", asked(draw, one), answer, thought=f"The user said: {sentence}")


def _long_sum(draw: Draw) -> Exchange:
    left, right = draw.pair(10, 99)
    tens, ones = left // 10 * 10 + right // 10 * 10, left % 10 + right % 10
    form = draw.phrase("What is {} + {}?|{} + {}|Add {} and {}.|What is {} plus {}?|{} plus {}?")
    thought = (
        f"{left // 10 * 10} + {right // 10 * 10} = {tens}. {left % 10} + {right % 10} = {ones}. "
        f"{tens} + {ones} = {left + right}."
    )
    said = f"{left} + {right} = {left + right}"
    return Exchange("", form.format(left, right), said, thought=thought)


def _letters(draw: Draw) -> Exchange:
    word = draw.word()
    forms = "How many letters are in the word {}?|How many letters has {}?|Count the letters of {}."
    steps = " ".join(f"{place}:{letter}" for place, letter in enumerate(word, 1))
    said = f"The word {word} has {len(word)} letters."
    question = worded(draw, draw.phrase(forms).format(word))
    return Exchange("", question, said, thought=f"{steps}. That is {len(word)}.")


def _backwards(draw: Draw) -> Exchange:
    word = draw.word()
    form = draw.phrase("Spell the word {} backwards.|Reverse the word {}.|Write {} backwards.")
    thought = f"The letters are {'-'.join(word)}. Backwards {'-'.join(word[::-1])}."
    return Exchange("", form.format(word), word[::-1], thought=thought)


def thoughtful(conversation: Conversation, draw: Draw) -> Conversation:
    """The last question of a conversation with tools, each step to its answer thought about."""
    turns = [*conversation]
    last = max(place for place, turn in enumerate(turns) if turn.role == "user")
    opened = draw.chance(0.5)
    if not opened:
        turns[last] = replace(turns[last], content=f"{turns[last].content} /think")
    for place in range(last + 1, len(turns)):
        if turns[place].role == "assistant":
            thought = _step(turns[place], after=turns[place - 1])
            turns[place] = replace(
                turns[place], thought=thought, opened=opened, skill="think_tools"
            )
    return turns


def _step(turn: Turn, *, after: Turn) -> str:
    if turn.content.startswith("<tool_call>"):
        return "I need a tool for this."
    return "The tool has answered." if after.results else "I need no tool for this."
