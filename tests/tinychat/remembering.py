"""What the user tells, and is asked for some turns later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.tinychat.skills import worded
from tests.tinychat.words import PETS

if TYPE_CHECKING:
    from tests.tinychat.words import Draw


@dataclass(frozen=True, slots=True)
class Topic:
    """How something is told, confirmed, asked for and answered; `{}` is it, `{pet}` an animal."""

    kind: str
    told: str
    asked: str
    answer: str
    confirmed: str = "Good to know."
    about: str = ""
    """How a system prompt tells it."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Something that was told, ready to be asked for."""

    topic: Topic
    value: str
    pet: str

    def fill(self, form: str) -> str:
        """The form with what was told."""
        return form.format(self.value, pet=self.pet)


NAME = Topic(
    "person",
    "My name is {}.|I am {}.|I'm {}.|Hi, I'm {}.|Hello, my name is {}.|Call me {}.|You can call me {}.|"
    "Hello! My name is {}.|Hi! I am {}.|Hi there, I'm called {}.|My name's {}.|The name is {}.|"
    "Please remember my name: {}.|Remember that my name is {}.|Hey, {} here.|This is {}.|"
    "Good morning, I am {}.|I am called {}.|People call me {}.|Let me introduce myself: I am {}.|"
    "Hello, I am {}. Nice to meet you.|My name is {}. Please remember it.|Hi, my name is {}!|"
    "My name is {}. What can you do?|My name is {}. How are you?",
    "What is my name?|Who am I?|Do you remember my name?|What's my name?|Tell me my name.|"
    "Can you tell me my name?|What was my name?|What was my name again?|Do you know my name?|"
    "What am I called?|What did I say my name was?|Say my name.|And what is my name?|"
    "Which name did I tell you?|Do you still know my name?|Do you know who I am?|"
    "What name did I give you?|Do you remember who I am?|Answer with my name.|So what is my name?",
    "Your name is {}.",
    "Nice to meet you, {}!",
    "The user is called {}.|The user's name is {}.|You are talking to {}.|The name of the user is {}.",
)
TOPICS = (
    NAME,
    Topic(
        "city",
        "I live in {}.|My home is in {}.|I am from {}.|My city is {}.|I moved to {}.|I live in {} now.",
        "Where do I live?|Which city do I live in?|What is my city?|Where is my home?|Where am I from?",
        "You live in {}.",
        about="The user lives in {}.|The user's city is {}.",
    ),
    Topic(
        "colour",
        "My favourite colour is {}.|I like the colour {}.|My favorite color is {}.|I love {} the most.",
        "What is my favourite colour?|Which colour do I like?|What's my favorite color?",
        "Your favourite colour is {}.",
        about="The user's favourite colour is {}.",
    ),
    Topic(
        "person",
        "My {pet} is called {}.|I have a {pet} named {}.|The name of my {pet} is {}.|I have a {pet}. Its name is {}.",
        "What is my {pet} called?|What is the name of my {pet}?|What's my {pet}'s name?|How is my {pet} called?",
        "Your {pet} is called {}.",
        "{} is a nice name for a {pet}.",
    ),
    Topic(
        "food",
        "My favourite food is {}.|I like {}.|I like to eat {}.|I love {}.",
        "What is my favourite food?|Which food do I like?|What do I like to eat?",
        "You like {}.",
        about="The user likes {}.",
    ),
    Topic(
        "job",
        "I work as a {}.|I am a {}.|My job is {}.",
        "What is my job?|What do I do for work?|What do I work as?",
        "You work as a {}.",
        about="The user works as a {}.",
    ),
    Topic(
        "age",
        "I am {} years old.|My age is {}.|I'm {} years old.|I turned {} today.",
        "How old am I?|What is my age?|What's my age?",
        "You are {} years old.",
        about="The user is {} years old.",
    ),
    Topic(
        "code",
        "The secret word is {}.|Remember the code {}.|The password is {}.|Remember this word: {}.|My code is {}.|Keep this in mind: {}.",
        "What is the secret word?|What is the code?|What is the password?|Which word should you remember?|Tell me the secret word.",
        "It is {}.",
        "I will remember {}.",
        about="The secret word is {}.|The password is {}.",
    ),
    Topic(
        "person",
        "My best friend is {}.|My friend is called {}.|I have a friend named {}.|My friend's name is {}.",
        "Who is my best friend?|What is my friend called?|What is the name of my friend?",
        "Your friend is {}.",
    ),
)


def memory(draw: Draw, topic: Topic) -> Memory:
    """Something to tell about this topic."""
    if topic.kind == "age":
        return Memory(topic, str(draw.kept(lambda: draw.number(5, 99))), "")
    if topic.kind == "code" and draw.chance(0.4):
        return Memory(topic, str(draw.kept(lambda: draw.number(100, 9999))), "")
    return Memory(topic, draw.filling(topic.kind), draw.one(PETS))


def told(draw: Draw, one: Memory) -> str:
    """The sentence in which the user tells it."""
    sentence = one.fill(draw.phrase(one.topic.told))
    return sentence[:-1] if draw.chance(0.08) else sentence


def asked(draw: Draw, one: Memory) -> str:
    """The question for it."""
    return worded(draw, one.fill(draw.phrase(one.topic.asked)))
