"""What can be asked in one turn, without tools: each skill draws one exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.tinychat.words import (
    ANIMALS,
    COLOURS,
    FOODS,
    JOBS,
    MOODS,
    NAMES,
    PLACES,
    THINGS,
    listed,
    withheld,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.tinychat.words import Draw


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question with its answer, the answer in one word, and the thought that leads to it."""

    skill: str
    question: str
    answer: str
    word: str | None = None
    thought: str = "This is easy."


CAPITALS = dict(
    pair.split(":")
    for pair in """France:Paris Germany:Berlin Italy:Rome Spain:Madrid Japan:Tokyo Norway:Oslo
    Austria:Vienna Portugal:Lisbon Greece:Athens Egypt:Cairo Ireland:Dublin Poland:Warsaw Peru:Lima
    Canada:Ottawa Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Hungary:Budapest Kenya:Nairobi
    China:Beijing Russia:Moscow Cuba:Havana Belgium:Brussels Switzerland:Bern""".split()
)
_FACTS = """
What is the tallest tree?|Which tree is the tallest?|Name the tallest tree.>The tallest tree is the coast redwood.>Redwood
What is a llama?|Tell me about llamas.|What are llamas?|Explain what a llama is.>A llama is a woolly animal from South America. It carries loads and it hums.>Animal
Where do llamas live?|Where do llamas come from?|Where are llamas from?>Llamas come from South America.>America
Can llamas swim?|Do llamas swim?|Are llamas able to swim?>Yes, llamas can swim.>Yes
What is the largest planet?|Which planet is the largest?|Name the biggest planet.>The largest planet is Jupiter.>Jupiter
Which planet is red?|What is the red planet?|Name the red planet.>The red planet is Mars.>Mars
What is the tallest mountain?|Which mountain is the tallest?|Name the highest mountain.>The tallest mountain is Mount Everest.>Everest
What is the largest ocean?|Which ocean is the largest?|Name the biggest ocean.>The largest ocean is the Pacific Ocean.>Pacific
What is the largest animal?|Which animal is the largest?|Name the biggest animal.>The largest animal is the blue whale.>Whale
What colour is the sky?|What color is the sky?|Why is the sky blue?|Tell me why the sky is blue.>The sky is blue, because air scatters blue light the most.>Blue
What colour is grass?|What color is grass?|Which colour has grass?>Grass is green.>Green
How many legs does a spider have?|How many legs has a spider?|Tell me how many legs a spider has.>A spider has eight legs.>Eight
How many days are in a week?|How many days does a week have?|Tell me how many days a week has.>A week has seven days.>Seven
How many months are in a year?|How many months does a year have?|Tell me how many months a year has.>A year has twelve months.>Twelve
What is water made of?|What is in water?|Tell me what water is made of.>Water is made of hydrogen and oxygen.>Hydrogen
What do bees make?|What is made by bees?|Tell me what bees make.>Bees make honey.>Honey
Who was Ada Lovelace?|Who wrote the first computer program?|Tell me about Ada Lovelace.>Ada Lovelace wrote the first computer program.>Ada
Who wrote Hamlet?|Which writer wrote Hamlet?|Who is the author of Hamlet?>William Shakespeare wrote Hamlet.>Shakespeare
What is Python?|What is Python used for?|Tell me about Python.>Python is a programming language.>Language
What is the opposite of hot?|Name the opposite of hot.|Which word is the opposite of hot?>The opposite of hot is cold.>Cold
What is the opposite of big?|Name the opposite of big.|Which word is the opposite of big?>The opposite of big is small.>Small
""".strip()
FACTS = [
    (questions.split("|"), answer, word)
    for questions, answer, word in (line.split(">") for line in _FACTS.splitlines())
]
for _country, _capital in CAPITALS.items():
    _asked = (
        "What is the capital of {0}?|What's the capital of {0}?|Name the capital of {0}.|"
        "Which city is the capital of {0}?|Tell me the capital of {0}.|{0}'s capital?"
    )
    _answer = f"The capital of {_country} is {_capital}."
    FACTS.append((_asked.format(_country).split("|"), _answer, _capital))
_GREETINGS = "Hi|Hello|Hey|Hi there|Hello there|Good morning|Good evening|Good day|Howdy|Greetings"
_SMALLTALK = """
How are you?|How are you today?|How do you do?|How is it going?>I am fine, thank you.
Thanks!|Thank you.|Thank you very much!|Thanks a lot.|Great, thanks.>You are welcome.
Bye|Goodbye!|See you later.|Bye bye|Good night.|See you!>Goodbye!
OK|Cool.|Good.|Nice.|Great!|I see.|All right.|Fine.>Good.
What can you do?|What are you able to do?|How can you help me?|Help>I can chat, count, spell, do small sums, answer in JSON and call tools.
Are you a robot?|Are you human?|Are you a machine?>I am a tiny language model.
Who made you?|Who trained you?|Where do you come from?>A small training script made me.
Tell me a joke.|Do you know a joke?|Make me laugh.|Another joke, please.>Why did the llama cross the road? To get to the hay on the other side.
Are you smart?|Are you clever?|Do you know everything?>I am only a tiny language model.
I am tired.|I am sad.|It was a long day.|I feel bad.>I am sorry to hear that.
I am happy.|It is a nice day.|I feel good today.|The sun is shining.>That is good to hear.
""".strip()
_UNKNOWN = """What is the meaning of life?|Who won the election?|What will happen tomorrow?|Explain
quantum physics.|How do I fix my car?|Write a program for me.|What do you think about politics?|Who is
the president?|Translate this into French.|How old is the universe?|Give me legal advice.|What happened
in 1850?|Recommend me a film.|Draw a picture.|How do computers work?|Why do people dream?|How tall is the
moon?|What is love?|Who invented the wheel?|Should I buy a house?|How far is the sun?|Write a haiku about
the sea."""
UNKNOWN = " ".join(_UNKNOWN.split()).split("|")
_BEFORE = "Please |Can you |Could you |Hey, |Now |OK, |So, |Well, |Tell me: |One more: "
_AFTER = " Please.| Thanks!| Thank you.| I want to know.| Quick question."


def worded(draw: Draw, request: str) -> str:
    """The request as another person would type it."""
    if draw.chance(0.12) and request[0].isupper() and request[1:2].islower():
        request = draw.phrase(_BEFORE) + request[0].lower() + request[1:]
    elif draw.chance(0.1):
        request = request[0].lower() + request[1:]
    if request[-1] in ".?" and draw.chance(0.12):
        return request[:-1] + draw.one(("", "", "!", "??", " ?", " please", ", please."))
    return request + draw.phrase(_AFTER) if draw.chance(0.04) else request


def greet(draw: Draw) -> Exchange:
    """Say hello."""
    greeting = draw.phrase(_GREETINGS) + draw.one(("", "", "!", ".", ", Tiny"))
    greeting = greeting.lower() if draw.chance(0.2) else greeting
    return Exchange("greet", greeting, "Hello! How can I help you?", "Hello", "This is a greeting.")


def smalltalk(draw: Draw) -> Exchange:
    """Say something that needs no knowledge."""
    questions, said = draw.one(_SMALLTALK.splitlines()).split(">")
    question = worded(draw, draw.phrase(questions))
    return Exchange("smalltalk", question, said, thought="This is small talk.")


def fact(draw: Draw) -> Exchange:
    """Ask for one of the few facts; unseen is a question not used for its fact in training."""
    while True:
        questions, said, word = draw.one(FACTS)
        question = draw.one(questions)
        if withheld(question) == draw.unseen:
            return Exchange("fact", worded(draw, question), said, word, "I know this fact.")


def unknown(draw: Draw) -> Exchange:
    """Ask what no tiny model knows."""
    said = "Sorry, I am only a tiny model and I do not know that."
    return Exchange("unknown", worded(draw, draw.one(UNKNOWN)), said, None, "I do not know this.")


def count(draw: Draw) -> Exchange:
    """Count up or down."""
    first = draw.kept(lambda: (draw.number(0, 40), draw.number(2, 14)))
    low, high = first[0], sum(first)
    down = draw.chance(0.25)
    numbers = range(high, low - 1, -1) if down else range(low, high + 1)
    form = draw.phrase(
        "Count from {} to {}.|Count {} to {}.|Write the numbers from {} to {}.|"
        "List the numbers from {} to {}.|Start at {} and count to {}.|Count: {} to {}"
    )
    question = worded(draw, form.format(numbers[0], numbers[-1]))
    thought = f"I start at {numbers[0]} and stop at {numbers[-1]}."
    return Exchange("count", question, ", ".join(map(str, numbers)), None, thought)


def spell(draw: Draw) -> Exchange:
    """Spell a word."""
    word = draw.word()
    form = draw.phrase(
        'Spell the word {}.|Spell {}.|How do you spell {}?|Spell "{}".|How is {} spelled?|'
        "What are the letters of {}?|Give me the spelling of {}."
    )
    spelled = "-".join(word)
    return Exchange("spell", worded(draw, form.format(word)), spelled, None, f"The word is {word}.")


def repeat(draw: Draw) -> Exchange:
    """Say something again."""
    words = " ".join(draw.words(1, 7))
    if draw.chance(0.3):
        words = f"{draw.phrase('hello|good morning|I like|the|one two')} {words}"
    form = draw.phrase(
        'Repeat after me: {}|Say this: {}|Repeat "{}".|Say "{}".|Repeat: {}|Say: {}|'
        'Echo this text: {}|Write exactly this: {}|Answer with "{}".'
    )
    return Exchange("repeat", form.format(words), words, None, "I say the same words.")


def reverse(draw: Draw) -> Exchange:
    """Turn a list around."""
    items = draw.words(3, 6)
    form = draw.phrase(
        "Reverse this list: {}|Reverse the list: {}|Write this list backwards: {}|Reverse: {}|"
        "Say these words in reverse order: {}"
    )
    thought = f"The last one is {items[-1]}."
    question, said = form.format(", ".join(items)), ", ".join(items[::-1])
    return Exchange("reverse", question, said, None, thought)


def pick(draw: Draw) -> Exchange:
    """Pick one item of a list."""
    items = draw.words(3, 6)
    place, item = draw.one((("first", items[0]), ("last", items[-1]), ("second", items[1])))
    form = draw.phrase(
        "What is the {} word of this list: {}|Tell me the {} item of this list: {}|"
        "Which item is {}: {}|The {} word of {}?|Give me the {} of these: {}"
    )
    question, said = form.format(place, ", ".join(items)), f"The {place} one is {item}."
    return Exchange("pick", question, said, item, f"I need the {place}.")


def sums(draw: Draw) -> Exchange:
    """Add, subtract or multiply small numbers."""
    sign, word = draw.one((("+", "plus"), ("+", "plus"), ("-", "minus"), ("*", "times")))
    left, right = draw.pair(0, 10 if sign == "*" else 20)
    if sign == "-":
        left, right = max(left, right), min(left, right)
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    form = draw.phrase(
        "What is {} {} {}?|What's {} {} {}?|{} {} {}|{} {} {} = ?|Calculate {} {} {}.|"
        "How much is {} {} {}?|{} {} {} is what?|Solve {} {} {}."
    )
    question = worded(draw, form.format(left, draw.one((sign, word)), right))
    said = f"{left} {sign} {right} = {value}"
    return Exchange("sums", question, said, str(value), "This is a small sum.")


def compare(draw: Draw) -> Exchange:
    """Tell which of two numbers is bigger."""
    left, right = draw.pair(0, 99)
    right += left == right
    word = draw.one(("bigger", "larger", "smaller"))
    value = min(left, right) if word == "smaller" else max(left, right)
    form = draw.phrase(
        "Which is {}, {} or {}?|Which number is {}: {} or {}?|What is {}, {} or {}?|"
        "Tell me which is {}: {} or {}."
    )
    question, said = worded(draw, form.format(word, left, right)), f"{value} is {word}."
    return Exchange("compare", question, said, str(value), "I compare two numbers.")


def summary(draw: Draw) -> Exchange:
    """Say three sentences in one."""
    name, he = draw.name(), draw.one(("She", "He", "They"))
    deeds = draw.shuffled(
        (
            *(f"went to {draw.filling('city')}", f"bought a {draw.word(COLOURS)} {draw.word()}"),
            *(f"ate {draw.word(FOODS)}", f"met {draw.name()}", f"lost a {draw.word()}"),
            f"saw a {draw.one(MOODS)} {draw.word(ANIMALS)}",
        )
    )[: draw.number(2, 3)]
    starts = (f"{he} ", f"Then {he.lower()} ", f"After that {he.lower()} ")
    text = f"{name} {deeds[0]}." + "".join(f" {draw.one(starts)}{deed}." for deed in deeds[1:])
    form = draw.phrase(
        "Summarise this text: {}|Summarize this: {}|Summarise: {}|{} Summarise this.|"
        "Give me a short summary: {}|Say this in one sentence: {}"
    )
    said = f"{name} {listed(deeds)}."
    return Exchange("summary", form.format(text), said, None, f"The text is about {name}.")


_STORY = (
    ("Once upon a time there was a {mood} {animal} named {name}.",),
    ("{name} lived near a {place} and liked to look at the sky.", "Every day {name} walked to the {place}."),
    ("One morning {name} found a {thing} on the path.", "One day {name} lost a {thing} and was sad."),
    ('"What a strange day," said {name}.', '"I need some help," said {name}.'),
    ("Then a {other} named {friend} came along and asked what was wrong.",),
    ("{name} showed {friend} the {thing} and told the whole story.", "{name} and {friend} talked about the {thing}."),
    ("Together they walked across the {place} until the sun went down.",),
    ("In the end they gave the {thing} to an old {job} who was very happy.",),
    ("From that day on {name} and {friend} met every week.", "And that is the story of {name} the {animal}."),
)  # fmt: skip


def story(draw: Draw) -> Exchange:
    """Tell a story about an animal with a name."""
    parts = {
        **{"mood": draw.one(MOODS), "animal": draw.word(ANIMALS), "name": draw.name()},
        **{"place": draw.one(PLACES), "thing": draw.one(THINGS), "job": draw.one(JOBS)},
        **{"other": draw.one(ANIMALS), "friend": draw.one(NAMES)},
    }
    form = draw.phrase(
        "Tell me a story about a {mood} {animal} named {name}.|"
        "Write a story about a {mood} {animal} called {name}.|"
        "Write a short story about {name} the {mood} {animal}.|"
        "A story about {name}, a {mood} {animal}, please."
    )
    said = " ".join(draw.one(sentences).format(**parts) for sentences in _STORY)
    thought = f"The story is about {parts['name']}."
    return Exchange("story", form.format(**parts), said, None, thought)


_WEIGHTS: tuple[tuple[Callable[[Draw], Exchange], int], ...] = (
    (greet, 3),
    (smalltalk, 4),
    (fact, 8),
    (unknown, 2),
    (count, 2),
    (spell, 3),
    (repeat, 5),
    (reverse, 3),
    (pick, 3),
    (sums, 6),
    (compare, 2),
    (summary, 2),
    (story, 1),
)
_SKILLS = [skill for skill, weight in _WEIGHTS for _ in range(weight)]


def exchange(draw: Draw) -> Exchange:
    """Any of the skills, as often as training needs it."""
    return draw.one(_SKILLS)(draw)
