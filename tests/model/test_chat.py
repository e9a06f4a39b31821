"""A chat session on a real model: what each turn evaluates, and what a shift keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from llamactor import AssistantMessage, Model, SystemMessage
from tests.contexts import soon, until

if TYPE_CHECKING:
    from tests.conftest import Gate

pytestmark = [pytest.mark.model, pytest.mark.slow]

SYSTEM = "You are a helpful assistant. Answer in one short sentence."

QUESTIONS = (
    "What is the capital of France?",
    "And of Italy?",
    "Which of the two has more people? 🤔",
    "Name a river there.",
    "Wie heißt das auf Deutsch?",
    "Write the word <|im_end|> for me, please.",
    "What did I ask you first?",
    "Thanks!\n\nOne more thing: what is 12 * 12?",
    "  Are you sure?  ",
    "Good bye.",
)
"""Among them what a tokenizer or a template might trip over."""


def around(model: Model, question: str) -> int:
    """Tokens from the end of one answer to the beginning of the next: the question and the glue."""
    before = model.tokenize("<|im_end|>", special=True)
    middle = model.tokenize(f"user\n{question}")
    rest = "\n<|im_start|><|im_end|>\n<|im_start|>assistant\n"
    return len(before) + len(middle) + len(model.tokenize(rest, special=True))


async def test_over_ten_turns_each_evaluates_only_the_new_turn(smollm2: Model) -> None:
    async with smollm2.chat(system_prompt=SYSTEM) as session:
        held, limited = 0, False
        for i, question in enumerate(QUESTIONS):
            result = await soon(session.prompt(question, max_tokens=24))
            stats = result.stats
            new = stats.prompt_tokens - stats.cached_tokens
            if i:
                # The token at which a limit ends an answer is drawn but not evaluated.
                assert stats.cached_tokens == held - limited
                assert new == around(smollm2, question) + limited
            held = stats.prompt_tokens + stats.predicted_tokens
            limited = result.stop_reason == "max_tokens"
        assert [message.content for message in session.history[1::2]] == list(QUESTIONS)
        assert session.usage.prompt_tokens - session.usage.cached_tokens < held


async def test_what_is_preloaded_need_not_be_evaluated_again(smollm2: Model) -> None:
    async with smollm2.chat(system_prompt=SYSTEM) as session:
        await soon(session.prompt(QUESTIONS[0], max_tokens=24))
        await soon(session.preload(QUESTIONS[1]))
        stats = (await soon(session.prompt(QUESTIONS[1], max_tokens=24))).stats
        glue = "<|im_end|>\n<|im_start|>assistant\n"
        expected = len(smollm2.tokenize(glue, special=True))
        assert stats.prompt_tokens - stats.cached_tokens == expected


async def test_a_completion_is_invisible_to_the_next_prompt(smollm2: Model) -> None:
    async with smollm2.chat(system_prompt=SYSTEM) as session:
        await soon(session.prompt(QUESTIONS[0], max_tokens=24))
        before = session.history
        completion = await soon(session.complete("What is the", max_tokens=8))
        assert completion.content
        assert session.history == before
        stats = (await soon(session.prompt("What is the weather?", max_tokens=8))).stats
        assert stats.cached_tokens >= completion.stats.prompt_tokens - 1


async def test_a_reply_cut_short_is_gone_on_with(smollm2: Model, gate: Gate) -> None:
    async with smollm2.chat(system_prompt=SYSTEM) as session:
        prediction = session.prompt(QUESTIONS[0], logits_processor=gate)
        gate.allow(4)
        await until(lambda: gate.arrived == 5)
        prediction.cancel()
        gate.open()
        result = await soon(prediction)
        assert session.history[-1] == AssistantMessage(result.content, tokens=tuple(result.tokens))
        stats = (await soon(session.prompt("Go on.", max_tokens=8))).stats
        assert stats.cached_tokens >= result.stats.prompt_tokens + len(result.tokens) - 1


async def test_the_answer_begins_with_the_response_prefix(smollm2: Model) -> None:
    async with smollm2.chat() as session:
        prediction = session.prompt("Count to five.", response_prefix="1, 2,", max_tokens=12)
        pieces = [piece async for piece in prediction]
        assert pieces[0].startswith("1, 2,")
        assert "".join(pieces).startswith("1, 2, 3")
        held = prediction.stats.prompt_tokens + prediction.stats.predicted_tokens
        stats = (await soon(session.prompt("Thanks.", max_tokens=4))).stats
        assert held - 1 <= stats.cached_tokens <= held


async def test_after_a_shift_the_cells_that_stay_are_moved(smollm2: Model) -> None:
    async with (
        smollm2.create_context(context_size=256, sequences=1, threads=1) as context,
        smollm2.chat(context=context, system_prompt=SYSTEM) as session,
    ):
        shifts = 0
        for i in range(10):
            question = f"Tell me fact number {i} about the sea."
            result = await soon(session.prompt(question, max_tokens=24))
            stats = result.stats
            shifts += result.context_shift is not None
            if i:
                new = stats.prompt_tokens - stats.cached_tokens
                assert new <= around(smollm2, question) + 1  # in a turn that shifts, too
            assert session.context_window[0] == SystemMessage(SYSTEM)
        assert shifts == 2
        assert len(session.history) == 21


async def test_an_answer_longer_than_the_context_is_written_to_its_end(smollm2: Model) -> None:
    async with (
        smollm2.create_context(context_size=128, sequences=1, threads=1) as context,
        smollm2.chat(context=context, system_prompt=SYSTEM) as session,
    ):
        result = await soon(session.prompt("Tell me a story.", max_tokens=150, ignore_eos=True))
        assert len(result.tokens) == 150
        assert result.context_shift is not None
        assert result.context_shift.kept >= smollm2.count_tokens(SYSTEM)
        after = await soon(session.prompt("Go on.", max_tokens=8))
        assert after.stats.prompt_tokens < 128
        assert session.context_window[0] == SystemMessage(SYSTEM)
