"""Suggestions while the user types."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llamactor.chat.completion import CompletionCache, Entry

if TYPE_CHECKING:
    from collections.abc import Callable

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


TestCacheBesideAList: Callable[[], None] = CacheBesideAList.TestCase


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
