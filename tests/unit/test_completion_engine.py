"""Suggestions while the user types."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llamactor import ChatSession, ClosedError, Context, ContextOverflowError, Model
from llamactor.chat.completion import CompletionCache, Entry
from tests.contexts import soon, until, waiting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from tests.conftest import Gate

# --- the cache ------------------------------------------------------------------------------------

typed = st.text(alphabet="ab", max_size=4)
"""Few letters and short, so that texts often begin alike."""


def written(cache: CompletionCache, text: str, suggestion: str) -> Entry:
    entry = cache.open(text, 10)
    entry.suggestion = suggestion
    return entry


def rest(cache: CompletionCache, text: str) -> str | None:
    entry = cache.find(text)
    return None if entry is None else entry.rest(text)


class CacheBesideAList(RuleBasedStateMachine):
    """The cache does what a list of pairs does, the last one used at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = CompletionCache(3)
        self.pairs: list[tuple[str, str]] = []

    @rule(text=typed, suggestion=typed)
    def write(self, text: str, suggestion: str) -> None:
        written(self.cache, text, suggestion)
        others = [pair for pair in self.pairs if pair[0] != text]
        self.pairs = [*others[-2:], (text, suggestion)]

    @rule(text=typed)
    def find(self, text: str) -> None:
        found = [
            (t, s) for t, s in self.pairs if text[: len(t)] == t and (t + s)[: len(text)] == text
        ]
        saying = [(t, s) for t, s in found if t + s != text]
        best = (saying or found)[-1:]
        assert rest(self.cache, text) == ((best[0][0] + best[0][1])[len(text) :] if best else None)
        self.pairs = [pair for pair in self.pairs if pair not in best] + best

    @precondition(lambda self: self.pairs)
    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.pairs = []

    @invariant()
    def it_holds_as_many(self) -> None:
        assert len(self.cache) == len(self.pairs)
        assert all(text in self.cache for text, _ in self.pairs)


TestCacheBesideAList = CacheBesideAList.TestCase


@given(st.lists(st.tuples(typed, typed), max_size=12), typed)
def test_what_is_found_goes_on_with_the_text(pairs: list[tuple[str, str]], text: str) -> None:
    cache = CompletionCache(5)
    for known, suggestion in pairs:
        written(cache, known, suggestion)
    found = cache.find(text)
    if found is not None:
        assert found.text + found.suggestion == text + str(found.rest(text))


def test_typing_along_a_suggestion_finds_the_rest_of_it() -> None:
    cache = CompletionCache(5)
    written(cache, "Hi", " there, friend")
    for n in range(len("Hi there, friend")):
        text = "Hi there, friend"[: max(2, n)]
        assert rest(cache, text) == "Hi there, friend"[len(text) :]
    assert rest(cache, "Hi there, friends") is None
    assert rest(cache, "H") is None


def test_evicting_a_text_keeps_a_longer_one() -> None:
    cache = CompletionCache(2)
    written(cache, "Hi", "!")
    written(cache, "Hi the", "re")
    written(cache, "Bye", ".")
    assert "Hi" not in cache
    assert rest(cache, "Hi the") == "re"


def test_a_use_keeps_an_entry_from_being_evicted() -> None:
    cache = CompletionCache(2)
    written(cache, "one", "!")
    written(cache, "two", "!")
    cache.find("one")
    written(cache, "three", "!")
    assert "one" in cache
    assert "two" not in cache


def test_an_entry_that_says_nothing_more_gives_way_to_one_that_does() -> None:
    cache = CompletionCache(5)
    written(cache, "Hi", " there")
    written(cache, "Hi t", "")
    assert rest(cache, "Hi t") == "here"
    assert rest(cache, "Hi there") == ""


# --- the engine -----------------------------------------------------------------------------------

HELLO = "Hi, my name is Ada."


@pytest.fixture
async def context(tinychat: Model) -> AsyncIterator[Context]:
    async with tinychat.create_context(context_size=1024, sequences=2, threads=1) as context:
        yield context


@pytest.fixture
async def session(context: Context) -> AsyncIterator[ChatSession]:
    """A session that has heard a name."""
    async with ChatSession(context, system_prompt="You are a helpful assistant.") as session:
        await soon(session.prompt(HELLO, max_tokens=24))
        yield session


class Screen:
    """Shows what an engine suggests, and notes everything that it was shown."""

    def __init__(self, session: ChatSession, **options: Any) -> None:
        self.engine = session.completion_engine(on_generation=self.show, **options)
        self.session = session
        self.typed = ""
        self.suggestion = ""
        self.news: list[tuple[str, str]] = []
        self.stale: list[str] = []

    def show(self, text: str, suggestion: str) -> None:
        self.news.append((text, suggestion))
        self.suggestion = suggestion
        if text != self.typed or not suggestion:
            self.stale.append(text)

    def type(self, text: str) -> str:
        self.typed = text
        self.suggestion = self.engine.complete(text)
        return self.suggestion

    async def rest(self) -> None:
        """Wait until nothing is being written."""
        await until(lambda: not self.engine.running)

    @property
    def predictions(self) -> int:
        """How many the session has made."""
        return self.session.usage.predictions


@pytest.fixture
async def screen(session: ChatSession) -> AsyncIterator[Screen]:
    screen = Screen(session, max_tokens=8)
    yield screen
    await screen.engine.aclose()


def tasks() -> set[str]:
    names = {task.get_name() for task in asyncio.all_tasks()}
    return {name for name in names if name.startswith("llamactor")}


@pytest.mark.every_loop
async def test_what_is_cached_comes_at_once_and_the_rest_in_the_background(screen: Screen) -> None:
    assert screen.type("What is my") == ""
    await screen.rest()
    expected = (await soon(screen.session.complete("What is my", max_tokens=8))).content
    assert expected
    assert screen.suggestion == expected
    assert screen.type("What is my") == expected
    assert [text for text, _ in screen.news] == ["What is my"] * len(screen.news)
    lengths = [len(suggestion) for _, suggestion in screen.news]
    assert lengths == sorted(set(lengths))


async def test_typing_along_a_suggestion_starts_no_new_work(screen: Screen) -> None:
    screen.type("What is")
    await screen.rest()
    whole, before = "What is" + screen.suggestion, screen.predictions
    for n in range(len("What is"), len(whole) + 1):
        assert screen.type(whole[:n]) == whole[n:]
        if n < len(whole):
            assert not screen.engine.running
    await screen.rest()
    assert screen.predictions <= before + 1  # at its end the next suggestion may begin


async def test_typing_along_what_is_being_written_leaves_it_alone(
    screen: Screen, gate: Gate
) -> None:
    screen = Screen(screen.session, max_tokens=8, logits_processor=gate)
    screen.type("What is")
    gate.allow(2)
    await until(lambda: len(screen.news) > 0)
    whole = "What is" + screen.suggestion
    before = screen.predictions
    assert screen.type(whole[:-1]) == whole[-1:]
    gate.open()
    await screen.rest()
    assert screen.predictions == before + 1
    assert screen.news[-1][0] == whole[:-1]
    await screen.engine.aclose()


async def test_a_suggestion_of_an_endless_model_goes_on_where_it_was_used_up(
    tiny_model: Model,
) -> None:
    async with tiny_model.chat() as session, session.completion_engine(max_tokens=4) as engine:
        whole = "Hi"
        for n in range(1, 4):
            assert engine.complete(whole) == ""
            assert engine.running
            await until(lambda: not engine.running)
            assert session.usage.predictions == n
            whole += engine.complete(whole)
        assert not engine.running


async def test_what_was_superseded_is_never_delivered_and_ends(screen: Screen, gate: Gate) -> None:
    screen = Screen(screen.session, max_tokens=8, logits_processor=gate)
    screen.type("What")
    await gate.reached()
    assert screen.type("Please") == ""
    gate.open()
    await screen.rest()
    assert {text for text, _ in screen.news} == {"Please"}
    await screen.engine.aclose()


async def test_a_superseded_suggestion_is_kept_as_far_as_it_came_and_gone_on_with(
    screen: Screen, gate: Gate
) -> None:
    expected = (await soon(screen.session.complete("What is", max_tokens=8))).content
    screen = Screen(screen.session, max_tokens=8, logits_processor=gate)
    screen.type("What is")
    gate.allow(2)
    await until(lambda: len(screen.news) > 0)
    part = screen.suggestion
    assert screen.type("No") == ""
    gate.open()
    await screen.rest()
    known = screen.type("What is")
    assert known.startswith(part)
    assert len(known) < len(expected)
    await screen.rest()
    assert screen.suggestion == expected
    await screen.engine.aclose()


@pytest.mark.every_loop
async def test_keys_struck_in_one_turn_of_the_loop_are_one_prediction(screen: Screen) -> None:
    before = screen.predictions
    for n in range(1, len("What is my na")):
        screen.type("What is my na"[:n])
    await screen.rest()
    assert screen.predictions == before + 1


async def test_a_callback_may_ask_for_another_text(session: ChatSession) -> None:
    news: list[str] = []

    def show(text: str, suggestion: str) -> None:
        news.append(text)
        if text == "What":
            engine.complete("Please")

    async with session.completion_engine(max_tokens=8, on_generation=show) as engine:
        engine.complete("What")
        await until(lambda: not engine.running)
    assert news[:2] == ["What", "Please"]
    assert "What" not in news[1:]


async def by_a_prompt(session: ChatSession) -> None:
    await session.prompt("What is 2+3?", max_tokens=8)


async def by_set_history(session: ChatSession) -> None:
    await session.set_history([])


async def by_reset(session: ChatSession) -> None:
    await session.reset()


async def by_rewind(session: ChatSession) -> None:
    await session.rewind()


async def by_deleting(session: ChatSession) -> None:
    await session.delete_from(1)


CHANGES = [by_a_prompt, by_set_history, by_reset, by_rewind, by_deleting]


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_of_the_history_forgets_all_suggestions(
    screen: Screen, change: Callable[[ChatSession], Coroutine[Any, Any, None]]
) -> None:
    screen.type("What is my")
    await screen.rest()
    assert screen.type("What is my") != ""
    await soon(change(screen.session))
    assert not screen.engine.running
    assert screen.type("What is my") == ""
    await screen.rest()
    result = await soon(screen.session.complete("What is my", max_tokens=8))
    assert screen.suggestion == result.content


@pytest.mark.parametrize("change", CHANGES)
async def test_nothing_of_the_old_history_is_delivered_after_it_has_changed(
    screen: Screen, gate: Gate, change: Callable[[ChatSession], Coroutine[Any, Any, None]]
) -> None:
    session, delivered = screen.session, []
    engine = session.completion_engine(
        max_tokens=8,
        logits_processor=gate,
        on_generation=lambda text, suggestion: delivered.append(session.revision),
    )
    revision = session.revision
    engine.complete("What is my")
    gate.allow(2)
    await until(lambda: len(delivered) > 0)
    changing = await waiting(change(session))
    gate.open()
    await soon(changing)
    await until(lambda: not engine.running)
    assert set(delivered) == {revision}
    await soon(engine.aclose())


async def test_what_is_typed_while_an_answer_is_written_is_completed_after_it(
    screen: Screen, gate: Gate
) -> None:
    answer = screen.session.prompt("What is 2+3?", logits_processor=gate, max_tokens=8)
    await gate.reached()
    revisions: list[int] = []
    engine = screen.session.completion_engine(
        max_tokens=8, on_generation=lambda *_: revisions.append(screen.session.revision)
    )
    assert engine.complete("What is my") == ""
    await asyncio.sleep(0)
    gate.open()
    await soon(answer)
    await until(lambda: not engine.running)
    known = engine.complete("What is my")
    assert known == (await soon(screen.session.complete("What is my", max_tokens=8))).content
    assert set(revisions) == {screen.session.revision}
    await engine.aclose()


async def test_a_prompt_ends_what_is_being_written(screen: Screen, gate: Gate) -> None:
    screen = Screen(screen.session, max_tokens=8, logits_processor=gate)
    screen.type("What is my")
    await gate.reached()
    answer = screen.session.prompt("What is my name?", max_tokens=8)
    gate.open()
    assert "Ada" in (await soon(answer)).content
    await screen.rest()
    assert screen.session.history[-2].content == "What is my name?"
    await screen.engine.aclose()


# --- failures -------------------------------------------------------------------------------------


@pytest.fixture
async def reported() -> AsyncIterator[list[BaseException]]:
    """What the loop's exception handler hears of."""
    loop, errors = asyncio.get_running_loop(), list[BaseException]()
    loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
    yield errors
    loop.set_exception_handler(None)


@pytest.mark.every_loop
async def test_a_callback_that_raises_is_reported_and_ends_the_suggestion(
    session: ChatSession, reported: list[BaseException]
) -> None:
    def show(text: str, suggestion: str) -> None:
        raise ZeroDivisionError(suggestion)

    async with session.completion_engine(max_tokens=8, on_generation=show) as engine:
        engine.complete("What is my")
        await until(lambda: not engine.running)
        await until(lambda: len(reported) > 0)
        assert [type(error) for error in reported] == [ZeroDivisionError]
        assert engine.complete("What is my") == str(reported[0])


async def test_a_completion_that_fails_is_reported_and_the_next_one_works(
    session: ChatSession, reported: list[BaseException]
) -> None:
    async with session.completion_engine(overflow="stop_at_limit", max_tokens=8) as engine:
        assert engine.complete("too long " * 2000) == ""
        await until(lambda: len(reported) > 0)
        assert [type(error) for error in reported] == [ContextOverflowError]
        engine.complete("What is my")
        await until(lambda: not engine.running)
        assert engine.complete("What is my") != ""
    assert len(reported) == 1


async def test_wrong_options_are_an_error_when_the_engine_is_made(session: ChatSession) -> None:
    with pytest.raises(TypeError, match="max_token"):
        session.completion_engine(max_token=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="max_cached must be at least 1"):
        session.completion_engine(max_cached=0)
    with pytest.raises(TypeError, match="on_generation must be callable"):
        session.completion_engine(on_generation=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature"):
        session.completion_engine(temperature=-1)


async def test_text_that_is_none_is_an_error(screen: Screen) -> None:
    with pytest.raises(TypeError, match="text must be a str"):
        screen.engine.complete(b"What")  # type: ignore[arg-type]


async def test_in_another_loop_it_refuses(screen: Screen) -> None:
    async def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="event loop"):
            screen.engine.complete("What")

    await asyncio.to_thread(asyncio.run, elsewhere())


# --- the end --------------------------------------------------------------------------------------


@pytest.mark.every_loop
async def test_closing_cancels_and_waits_for_its_task(session: ChatSession, gate: Gate) -> None:
    engine = session.completion_engine(max_tokens=8, logits_processor=gate)
    engine.complete("What is my")
    await gate.reached()
    await soon(engine.aclose())
    assert not engine.running
    assert "llamactor-completion" not in tasks()
    with pytest.raises(ClosedError):
        engine.complete("What is my")
    gate.open()
    await soon(engine.aclose())  # twice is as good as once


async def test_closing_cancelled_has_closed_all_the_same(session: ChatSession, gate: Gate) -> None:
    engine = session.completion_engine(max_tokens=8, logits_processor=gate)
    engine.complete("What is my")
    await gate.reached()
    closing = asyncio.create_task(engine.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    gate.open()
    await until(lambda: "llamactor-completion" not in tasks())
    with pytest.raises(ClosedError):
        engine.complete("What")


async def test_the_end_of_the_session_is_the_end_of_its_engine(
    context: Context, gate: Gate, reported: list[BaseException]
) -> None:
    session = ChatSession(context)
    engine = session.completion_engine(max_tokens=8, logits_processor=gate)
    engine.complete("What is my")
    await gate.reached()
    closing = await waiting(session.aclose())
    gate.open()
    await soon(closing)
    await until(lambda: not engine.running)
    with pytest.raises(ClosedError):
        engine.complete("What")
    assert reported == []


async def test_a_forgotten_engine_goes_away(session: ChatSession) -> None:
    engine = session.completion_engine(max_tokens=8)
    engine.complete("What is my")
    gone = weakref.ref(engine)
    del engine
    await until(lambda: gc.collect() >= 0 and gone() is None)
    assert session.usage.predictions == 2  # what it had begun was written to its end


# --- a recorded typing session --------------------------------------------------------------------

RECORDING = Path(__file__).parent / "typing_session.json"
"""Keystrokes of somebody who writes prompts: what, where, and the seconds before the next one.

``["insert", 3, "x", 0.1]``, ``["delete", 3, 2, 0.1]`` (so many characters), ``["paste", ...]`` and
``["pause", ...]``.
"""

SEEDS = range(4)


@pytest.fixture
async def endless_context(tiny_model: Model) -> AsyncIterator[Context]:
    """A context of a model that never ends by itself."""
    async with tiny_model.create_context(context_size=1024, sequences=2, threads=1) as context:
        yield context


@pytest.fixture
async def endless(endless_context: Context) -> AsyncIterator[ChatSession]:
    async with ChatSession(endless_context) as session:
        yield session


def keystrokes() -> list[tuple[str, str]]:
    """What was done, and the text after it, for each keystroke."""
    strokes, text = [], ""
    for kind, place, what, _ in json.loads(RECORDING.read_text(encoding="utf-8")):
        tail = text[place + what :] if kind == "delete" else what + text[place:]
        text = text[:place] + tail
        strokes.append((kind, text))
    return strokes


async def some_time(screen: Screen, draw: random.Random, kind: str) -> None:
    """Let a random number of things happen before the next keystroke, and all in a pause."""
    match 4 if kind == "pause" and draw.random() < 0.7 else draw.randrange(4):
        case 0:
            pass  # faster than the loop turns
        case 1:
            for _ in range(draw.randrange(12)):
                await asyncio.sleep(0)
        case 2:
            await asyncio.to_thread(int)
        case 3:
            seen = len(screen.news) + draw.randrange(4)
            await until(lambda: len(screen.news) >= seen or not screen.engine.running)
        case 4:
            await screen.rest()


def test_the_recording_has_200_keystrokes_of_every_kind() -> None:
    kinds = [kind for kind, _ in keystrokes()]
    assert len(kinds) == 200
    assert set(kinds) == {"insert", "delete", "paste", "pause"}


@pytest.mark.every_loop
@pytest.mark.parametrize("seed", SEEDS)
async def test_a_typing_session_sees_nothing_stale_and_leaves_nothing_running(
    session: ChatSession, context: Context, seed: int
) -> None:
    draw = random.Random(seed)
    screen = Screen(session, max_tokens=12, max_cached=20)
    history = session.history
    for kind, text in keystrokes():
        screen.type(text)
        await some_time(screen, draw, kind)
    await screen.rest()
    assert screen.stale == []
    assert session.history == history
    await nothing_runs(context, steps=0)
    assert (await soon(session.complete(text, max_tokens=12))).content == screen.suggestion
    await soon(screen.engine.aclose())
    assert tasks() == set()


@pytest.mark.every_loop
@pytest.mark.parametrize("seed", SEEDS)
async def test_a_typing_session_cut_short_anywhere_leaves_nothing_running(
    endless: ChatSession, endless_context: Context, seed: int
) -> None:
    draw = random.Random(seed)
    screen = Screen(endless, max_tokens=100)
    for kind, text in keystrokes()[: draw.randrange(20, 60)]:
        screen.type(text)
        await some_time(screen, draw, kind)
    screen.type("The end")
    await some_time(screen, draw, "insert")
    seen = len(screen.news)
    await soon(screen.engine.aclose())
    await nothing_runs(endless_context, steps=1)
    assert len(screen.news) == seen
    assert screen.stale == []
    await until(lambda: tasks() == set())


async def nothing_runs(context: Context, steps: int) -> None:
    """Pass if the context goes on for so many decode calls at most; a round trip tells."""
    before = context.stats.batches
    async with context.sequence() as sequence:
        for _ in range(3):
            await soon(sequence.clear())
    assert context.stats.batches <= before + steps
    await until(lambda: context.stats.sequences_active == 0)


async def test_whatever_is_suggested_is_what_the_model_says(session: ChatSession) -> None:
    """Texts that come back, cut and gone on with, are as if they had been completed alone.

    Whole words: a suggestion that begins inside of one goes on from other tokens.
    """
    screen = Screen(session, max_tokens=6, max_cached=5)
    draw = random.Random(3)
    texts = ["What", "What is", "Please", "Please tell", "My name"]
    for _ in range(40):
        screen.type(draw.choice(texts))
        await some_time(screen, draw, "insert")
    await screen.rest()
    for text in texts:
        screen.type(text)
        await screen.rest()
        alone = (await soon(session.complete(text, max_tokens=40))).content
        assert alone.startswith(screen.suggestion)
    await screen.engine.aclose()
