"""Random lives of sessions: whatever is called, cancelled and waited for, the history is the sum.

Everything is called without waiting for what was called before, so that most of it stands in line,
and some of it is cancelled, at any step. The histories are computed from the outcomes alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from llamactor import (
    AssistantMessage,
    ChatSession,
    Message,
    Model,
    Prediction,
    PredictionResult,
    SystemMessage,
    UserMessage,
)
from tests.contexts import soon, until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

History = tuple[Message, ...]

BEGINNING: History = (SystemMessage("You are a helpful assistant."),)
OTHER: History = (UserMessage("Hi, my name is Bob."), AssistantMessage("Nice to meet you, Bob!"))
TEXTS = ("Hi, my name is Ada.", "What is 2+3?", "What is my name?", "", "Where is the cat? 🐈")

N_CALLS = 40
N_SESSIONS = 3


def turns(history: History) -> list[int]:
    return [i for i, message in enumerate(history) if isinstance(message, UserMessage)]


@dataclass
class Life:
    """A session, what was called on it, and how each call changes a history."""

    session: ChatSession
    draw: random.Random
    handles: list[Prediction] = field(default_factory=list)
    waiting: list[asyncio.Future[Any]] = field(default_factory=list)
    effects: list[Callable[[History], History]] = field(default_factory=list)
    forks: list[tuple[int, asyncio.Task[ChatSession]]] = field(default_factory=list)

    async def call(self) -> None:
        """Call something, wait for nothing, and perhaps cancel it a bit later."""
        calls = [self.prompt] * 8 + [self.complete, self.preload, self.fork]
        await self.draw.choice([*calls, self.rewind, self.delete, self.replace, self.reset])()
        for _ in range(self.draw.choice([0, 0, 1, 3, 10, 30])):
            await asyncio.sleep(0)
        if self.draw.random() < 0.2 and self.waiting:
            self.draw.choice(self.waiting).cancel()

    async def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start something in a task of its own and let it take its place in the line."""
        task = asyncio.create_task(work)
        self.waiting.append(task)
        await asyncio.sleep(0)
        return task

    async def prompt(self) -> None:
        text, record = self.draw.choice(TEXTS), self.draw.random() < 0.8
        limit = self.draw.choice([0, 1, 5, 20])
        prediction = self.session.prompt(text, record=record, max_tokens=limit)
        self.handles.append(prediction)
        await self.read(prediction)
        if self.draw.random() < 0.2:
            prediction.cancel()
        if record:
            self.effects.append(lambda history: history + said(text, prediction))

    async def read(self, prediction: Prediction) -> None:
        if self.draw.random() < 0.7:
            _ = await self.start(prediction.result())
        elif self.draw.random() < 0.5:
            _ = await self.start(first_piece(prediction))

    async def complete(self) -> None:
        completion = self.session.complete("What is", max_tokens=self.draw.randrange(9))
        _ = await self.start(completion.result())

    async def preload(self) -> None:
        _ = await self.start(self.session.preload(self.draw.choice(TEXTS)))

    async def rewind(self) -> None:
        n = self.draw.randrange(3)

        def effect(history: History) -> History:
            found = turns(history)
            return history if n > len(found) or n == 0 else history[: found[-n]]

        await self.edit(self.session.rewind(n), effect)

    async def delete(self) -> None:
        n = self.draw.randrange(6)
        await self.edit(self.session.delete_from(n), lambda history: history[:n])

    async def replace(self) -> None:
        await self.edit(self.session.set_history(OTHER), lambda _: OTHER)

    async def reset(self) -> None:
        await self.edit(
            self.session.reset(),
            lambda history: history[:1] if history[:1] == BEGINNING else (),
        )

    async def edit(
        self, work: Coroutine[Any, Any, Any], effect: Callable[[History], History]
    ) -> None:
        task = await self.start(work)
        self.effects.append(lambda history: history if task.cancelled() else effect(history))

    async def fork(self) -> None:
        self.forks.append((len(self.effects), await self.start(self.session.fork())))

    def expected(self, n_effects: int | None = None) -> History:
        history = BEGINNING
        for effect in self.effects[:n_effects]:
            history = effect(history)
        return history


def said(text: str, prediction: Prediction) -> History:
    """What a prompt has added."""
    result = outcome(prediction)
    if result.stop_reason == "cancelled" and not result.tokens:
        return ()
    (answer,) = result.messages
    assert isinstance(answer, AssistantMessage)
    assert (answer.content, answer.reasoning) == (result.content, result.reasoning)
    # Of reasoning the ids are found again where that is possible.
    assert result.segments or answer.tokens == tuple(result.tokens)
    return (UserMessage(text), answer)


def outcome(prediction: Prediction) -> PredictionResult:
    result = prediction._state.result
    assert result is not None
    return result


async def first_piece(prediction: Prediction) -> None:
    async for _ in prediction:
        return


@pytest.mark.every_loop
@pytest.mark.parametrize("seed", range(4))
async def test_the_history_is_the_sum_of_what_was_not_cancelled(tinychat: Model, seed: int) -> None:
    draw = random.Random(seed)
    async with tinychat.create_context(context_size=256, sequences=2, threads=1) as context:
        lives = [
            Life(tinychat.chat(context=context, history=BEGINNING), random.Random(draw.random()))
            for _ in range(N_SESSIONS)
        ]
        for _ in range(N_CALLS):
            for life in lives:
                await life.call()
        for life in lives:
            await came_out_right(life)
            await life.session.aclose()
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert context.stats.sequences_active == 0


async def came_out_right(life: Life) -> None:
    await soon(asyncio.wait(life.waiting))
    await soon(life.session.preload("x"))  # behind everything else
    for n_effects, fork in life.forks:
        if not fork.cancelled():
            async with fork.result() as session:
                assert session.history == life.expected(n_effects)
    for task in life.waiting:
        with contextlib.suppress(asyncio.CancelledError, ValueError):
            task.result()
    assert life.session.history == life.expected()
