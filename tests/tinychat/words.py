"""Where the fillings of the corpus come from, and which of them training never sees."""

from __future__ import annotations

import random
import zlib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

NAMES = """Ada Alan Grace Linus Margaret Dennis Barbara Edsger Donald Hedy Katherine Tim Anna Ben Clara
David Emma Felix Gina Hugo Iris Jack Kara Leo Mia Nina Oscar Paula Quinn Rosa Sam Tina Uma Victor Wendy
Xavier Yara Zoe Maria Peter Lucas Sofia Omar Fatima Chen Yuki Ravi Priya Ivan Olga Pierre Marie Hans
Greta Carlos Lucia Ali Noor Kofi Amara Bob Alice Eve Mallory Tom Jerry Lily Rose Max Ruby Jade Amber Kim
Lee Pat Robin Taylor Jordan Alex Charlie Frank Helen Julia Kevin Laura Mark Sarah Daniel Simon Susan
Agnes Bruno Cleo Dora Elias Freya Gustav Hanna Igor Jonas Klara Lars Mona Nils Otto Petra""".split()
CITIES = """Paris London Berlin Rome Madrid Tokyo Oslo Vienna Lisbon Athens Cairo Dublin Prague Warsaw
Boston Chicago Lima Delhi Seoul Zurich Geneva Milan Venice Porto Dallas Denver Austin Seattle Miami
Toronto Sydney Perth Nairobi Bergen Lyon Hamburg Munich Naples Bristol Glasgow""".split()
COLOURS = "red blue green yellow black white purple orange brown pink grey silver gold".split()
FRUITS = """apple banana cherry mango kiwi plum pear peach lemon orange grape melon papaya fig lime
apricot coconut pineapple avocado strawberry raspberry blueberry""".split()
ANIMALS = """cat dog llama fox owl bear rabbit mouse horse whale tiger lion penguin turtle frog goat
sheep duck hedgehog otter parrot hamster""".split()
PETS = "cat dog llama rabbit horse parrot hamster turtle".split()
FOODS = """pizza pasta soup bread cheese rice salad cake sushi curry pancakes noodles chocolate tacos
tea coffee""".split()
JOBS = """teacher baker pilot nurse farmer painter writer doctor sailor singer gardener engineer
carpenter chef""".split()
ROLES = """assistant helper pirate robot teacher wizard librarian chef guide poet captain gardener tutor
friend""".split()
MOODS = """friendly helpful tiny brave clever quiet happy old young curious gentle funny polite wise fast
kind lazy proud""".split()
PLACES = (
    "forest garden village castle river mountain beach island library valley desert farm".split()
)
THINGS = """lamp book door table chair stone key map hat coat boat train bridge clock letter bell box cup
knife spoon window garden kettle pencil paper basket blanket candle mirror ladder wheel drum flute piano
guitar robot computer phone planet star moon sun cloud rain snow wind fire water tree flower leaf bird
fish river road house school market ticket""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June July August September October November
December""".split()
ROOMS = "kitchen bedroom bathroom office garage hallway attic cellar".split()
PLAIN = THINGS + FRUITS + ANIMALS + COLOURS
KINDS = {
    "fruit": FRUITS,
    "city": CITIES,
    "animal": ANIMALS,
    "person": NAMES,
    "colour": COLOURS,
    "food": FOODS,
    "job": JOBS,
    "thing": THINGS,
    "room": ROOMS,
}
PROPER = ("city", "person")
_ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr kr pl st tr sh th ch".split()
_VOWELS = "a e i o u ai ee oo".split()
_CODAS = ["", "", "n", "r", "s", "x", "k", "l"]


def withheld(*key: object) -> bool:
    """Whether this filling, one of ten, is kept out of training."""
    return zlib.crc32(repr(key).encode()) % 10 == 0


class Draw:
    """A seeded source of fillings from one side of the split.

    With `unseen`, every word and every pair of numbers is one that training never shows;
    without it, none is.
    """

    def __init__(self, seed: str, *, unseen: bool = False) -> None:
        self._random = random.Random(f"{seed}-{'unseen' if unseen else 'seen'}")
        self.unseen = unseen

    def one(self, things: Sequence[T]) -> T:
        """Any of `things`."""
        return things[int(self._random.random() * len(things))]

    def phrase(self, phrases: str) -> str:
        """One of the phrases, which `|` separates."""
        return self.one(phrases.split("|"))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random.random() < probability

    def number(self, low: int, high: int) -> int:
        """A number from `low` to `high`, both included."""
        return self._random.randint(low, high)

    def shuffled(self, things: Sequence[T]) -> list[T]:
        """All of `things` in any order."""
        return self._random.sample(things, len(things))

    def kept(self, make: Callable[[], T]) -> T:
        """What `make` draws, drawn again until it is on this side of the split."""
        while withheld(drawn := make()) != self.unseen:
            pass
        return drawn

    def coined(self) -> str:
        """A word made up from syllables."""
        syllables = (self.one(_ONSETS) + self.one(_VOWELS) for _ in range(self.number(2, 3)))
        return "".join(syllables) + self.one(_CODAS)

    def word(self, pool: Sequence[str] = PLAIN, *, known: float = 0.6) -> str:
        """A lower-case word: one of `pool` or a made-up one."""
        return self.kept(lambda: self.one(pool) if self.chance(known) else self.coined())

    def proper(self, pool: Sequence[str]) -> str:
        """A capitalised name: one of `pool` or a made-up one."""
        word = self.kept(lambda: (self.one(pool) if self.chance(0.5) else self.coined()).lower())
        return word.capitalize()

    def name(self) -> str:
        """What a person may be called; now and then two names, or one with a number."""
        name, form = self.proper(NAMES), self._random.random()
        if form < 0.06:
            return f"{name} {self.proper(NAMES)}"
        return f"{name}{self.number(1, 999)}" if form > 0.95 else name

    def filling(self, kind: str) -> str:
        """A word of this kind, see `KINDS`; any word for an unknown kind."""
        if kind == "person":
            return self.name()
        return self.proper(KINDS[kind]) if kind in PROPER else self.word(KINDS.get(kind, PLAIN))

    def words(self, low: int, high: int) -> list[str]:
        """From `low` to `high` different words, often all of one kind."""
        kind = self.one([*KINDS, *["any"] * 6])
        count, words = self.number(low, high), list[str]()
        while len(words) < count:
            word = self.filling(kind)
            if word not in words:
                words.append(word)
        return words

    def identifier(self) -> str:
        """The name of a key or a function, in one of the usual spellings."""
        parts = [self.word() for _ in range(self.number(1, 2))]
        if self.chance(0.7):
            return "_".join(parts)
        return parts[0] + "".join(part.capitalize() for part in parts[1:])

    def pair(self, low: int, high: int) -> tuple[int, int]:
        """Two numbers whose combination, in either order, is on this side of the split."""
        first, second = self.kept(lambda: _ordered(self.number(low, high), self.number(low, high)))
        return (first, second) if self.chance(0.5) else (second, first)


def _ordered(first: int, second: int) -> tuple[int, int]:
    return min(first, second), max(first, second)


def listed(items: Sequence[str], last: str = " and ") -> str:
    """The items in a sentence: `a, b and c`."""
    return last.join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def article(noun: str) -> str:
    """The noun with `a` or `an`; a proper name stays as it is."""
    if noun[0].isupper():
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
