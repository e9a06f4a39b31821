"""A chat in a file: everything comes back, in another process and another context, or nothing."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor import ChatSession, StateMismatchError
from tests.conftest import PATIENCE, TINYCHAT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from llamactor import Model

NAMED = "Hi, my name is Ada."
ASKED = "What is my name?"
"""After `NAMED`, tinychat answers this with the name."""


async def told(model: Model, **options: Any) -> ChatSession:
    """A chat that knows a name."""
    session = model.chat(**options)
    await session.prompt(NAMED, max_tokens=30)
    return session


# --- what comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("include_state", [True, False])
async def test_a_restored_chat_goes_on_where_it_was(
    tinychat: Model, tmp_path: Path, include_state: bool
) -> None:
    session = await told(tinychat, system_prompt="You are kind.")
    await session.save(tmp_path / "chat", include_state=include_state)
    expected = await session.prompt(ASKED, max_tokens=30)
    async with ChatSession.restore(tmp_path / "chat", tinychat) as restored:
        assert restored.history == session.history[:3]
        answer = await restored.prompt(ASKED, max_tokens=30)
        assert answer.content == expected.content
        assert "Ada" in answer.content
    await session.aclose()


ELSEWHERE = """
import asyncio, json, sys, llamactor

async def main():
    path, size, asked = sys.argv[2], int(sys.argv[3]), sys.argv[4]
    async with llamactor.load_model(sys.argv[1], context_size=size, threads=1) as model:
        async with llamactor.ChatSession.restore(path, model) as session:
            told = session.context_window
            result = await session.prompt(asked, max_tokens=30)
            print(json.dumps([result.content, result.stats.prompt_tokens,
                              result.stats.cached_tokens, len(told)]))

asyncio.run(main())
"""


def answered_elsewhere(path: Path, context_size: int, asked: str) -> tuple[str, int, int, int]:
    """The answer of another process, tokens of its prompt, of those cached, and messages."""
    command = [sys.executable, "-c", ELSEWHERE, *map(str, (TINYCHAT, path, context_size)), asked]
    ran = subprocess.run(command, capture_output=True, timeout=PATIENCE, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    content, n_tokens, n_cached, n_messages = json.loads(ran.stdout)
    return content, n_tokens, n_cached, n_messages


@pytest.mark.parametrize("context_size", [1024, 256])
async def test_another_process_gives_the_same_answer_and_evaluates_one_old_token_at_most(
    tinychat: Model, tmp_path: Path, context_size: int
) -> None:
    session = await told(tinychat)
    await session.prompt("What is 2+3?", max_tokens=30)
    await session.save(tmp_path / "chat")
    here = await session.prompt(ASKED, max_tokens=30)
    await session.aclose()
    answer, n_tokens, n_cached, n_messages = await asyncio.to_thread(
        answered_elsewhere, tmp_path / "chat", context_size, ASKED
    )
    assert (answer, n_tokens, n_messages) == (here.content, here.stats.prompt_tokens, 4)
    new_turn = tinychat.tokenize(
        f"<|im_end|>\n<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n", special=True
    )
    assert n_tokens - n_cached <= len(new_turn) + 1


async def test_a_smaller_context_evaluates_what_it_has_room_for(
    tinychat: Model, tmp_path: Path
) -> None:
    session = await told(tinychat)
    for number in range(12):
        await session.prompt(f"What is {number}+3?", max_tokens=20)
    await session.save(tmp_path / "chat")
    async with (
        tinychat.create_context(context_size=128, sequences=1) as small,
        ChatSession.restore(tmp_path / "chat", small) as restored,
    ):
        result = await restored.prompt("What is 1+3?", max_tokens=20)
        assert result.stats.prompt_tokens < 128
        assert restored.history[:-2] == session.history
        assert len(restored.context_window) < len(restored.history)
    await session.aclose()


async def test_another_layout_of_memory_keeps_the_history(tinychat: Model, tmp_path: Path) -> None:
    session = await told(tinychat)
    await session.save(tmp_path / "chat")
    async with (
        tinychat.create_context(context_size=512, kv_type_k="q8_0") as other,
        ChatSession.restore(tmp_path / "chat", other) as restored,
    ):
        result = await restored.prompt(ASKED, max_tokens=30)
        assert result.stats.cached_tokens == 0
        assert "Ada" in result.content
    await session.aclose()


async def test_options_tools_and_template_come_back(tinychat: Model, tmp_path: Path) -> None:
    tool = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    session = tinychat.chat(
        tools=[tool],
        template_kwargs={"enable_thinking": False},
        max_tokens=7,
        seed=5,
        temperature=0.5,
        stop=["x", [1, 2]],
        logit_bias={3: "never", " a": 1.5},
        repeat_penalty=llamactor.RepeatPenalty(1.2),
        dry=llamactor.Dry(0.5),
        overflow=llamactor.context_shift.last_messages(4),
    )
    await session.save(tmp_path / "chat")
    async with ChatSession.restore(tmp_path / "chat", tinychat, seed=6) as restored:
        before, after = session._settings, restored._settings
        assert after.options == llamactor.GenerationOptions(
            **{
                **{
                    name: getattr(before.options, name)
                    for name in type(before.options).__struct_fields__
                },
                "seed": 6,
            }
        )
        assert after.tools.definitions == before.tools.definitions
        assert after.template_kwargs == before.template_kwargs
    await session.aclose()


async def test_functions_among_the_options_are_given_to_restore_again(
    tinychat: Model, tmp_path: Path
) -> None:
    calls = []

    def processor(tokens: list[int], logits: memoryview[float]) -> None:
        calls.append(len(tokens))

    session = tinychat.chat(logits_processor=processor, max_tokens=3)
    await session.save(tmp_path / "chat")
    async with ChatSession.restore(tmp_path / "chat", tinychat) as silent:
        await silent.prompt("Hello")
        assert calls == []
    async with ChatSession.restore(
        tmp_path / "chat", tinychat, logits_processor=processor
    ) as restored:
        await restored.prompt("Hello")
        assert calls == [0, 1, 2]
    await session.aclose()


async def test_an_empty_chat_can_be_saved(tinychat: Model, tmp_path: Path) -> None:
    session = tinychat.chat()
    await session.save(tmp_path / "chat")
    async with ChatSession.restore(tmp_path / "chat", tinychat) as restored:
        assert restored.history == ()
    await session.aclose()


# --- damaged files --------------------------------------------------------------------------------


def flipped(position: int) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        index = position % len(data)
        return data[:index] + bytes([data[index] ^ 0x40]) + data[index + 1 :]

    return damage


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "only its beginning": lambda data: data[:10],
    "without its last byte": lambda data: data[:-1],
    "cut in half": lambda data: data[: len(data) // 2],
    "a byte more": lambda data: data + b"\0",
    "another kind of file": lambda data: b"GGUF" + data[4:],
    "another version": flipped(16),
    "another model": flipped(20),
    "a number changed": flipped(60),
    "a token changed": flipped(80),
    "a byte of the state changed": lambda data: flipped(len(data) // 2)(data),
    "the note changed": flipped(-40),
    "the checksum changed": flipped(-1),
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("kind", DAMAGE)
async def test_a_damaged_file_is_refused_and_changes_nothing(
    tinychat: Model, tmp_path: Path, kind: str
) -> None:
    session = await told(tinychat)
    await session.save(tmp_path / "chat")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(DAMAGE[kind]((tmp_path / "chat").read_bytes()))
    with pytest.raises(StateMismatchError, match="damaged"):
        await ChatSession.restore(damaged, tinychat)
    stats = tinychat._default_context().stats()
    assert (stats["sequences_active"], stats["sequences_waiting"]) == (0, 0)
    answer = await session.prompt(ASKED, max_tokens=30)
    assert "Ada" in answer.content
    await session.aclose()


async def test_a_file_of_another_model_is_refused(
    tinychat: Model, smollm2: Model, tmp_path: Path
) -> None:
    session = await told(tinychat)
    await session.save(tmp_path / "chat", include_state=False)
    with pytest.raises(StateMismatchError, match="another model"):
        await ChatSession.restore(tmp_path / "chat", smollm2)
    await session.aclose()


async def test_a_sequences_state_is_no_saved_chat(tinychat: Model, tmp_path: Path) -> None:
    async with tinychat.create_context(context_size=256) as context, context.sequence() as sequence:
        await sequence.prefill("Hello there")
        await sequence.save(tmp_path / "state")
    with pytest.raises(StateMismatchError, match="no saved chat"):
        await ChatSession.restore(tmp_path / "state", tinychat)


async def test_a_missing_file_and_an_impossible_folder_are_the_usual_errors(
    tinychat: Model, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        await ChatSession.restore(tmp_path / "nothing", tinychat)
    async with tinychat.chat() as session:
        with pytest.raises(OSError, match="nowhere"):
            await session.save(tmp_path / "nowhere" / "chat")
        with pytest.raises(TypeError, match="path"):
            await session.save(5)  # type: ignore[arg-type]


# --- cancelling and closing -----------------------------------------------------------------------


async def test_cancelling_a_save_leaves_the_file_as_it_was_or_whole(
    tinychat: Model, tmp_path: Path
) -> None:
    session = await told(tinychat)
    await session.save(tmp_path / "chat")
    before = (tmp_path / "chat").read_bytes()
    for turns in range(6):
        task = asyncio.create_task(session.save(tmp_path / "chat"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert (tmp_path / "chat").read_bytes() == before
    assert "Ada" in (await session.prompt(ASKED, max_tokens=30)).content
    await session.aclose()


async def test_cancelling_a_restore_leaves_no_session_and_no_sequence_behind(
    tinychat: Model, tmp_path: Path
) -> None:
    session = await told(tinychat)
    await session.save(tmp_path / "chat")
    async with tinychat.create_context(context_size=512, sequences=2, threads=1) as context:
        for turns in range(8):
            task = asyncio.create_task(ChatSession.restore(tmp_path / "chat", context))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                await task.result().aclose()
        held = [await context.sequence(timeout=PATIENCE) for _ in range(2)]
        for sequence in held:
            await sequence.aclose()
    await session.aclose()


async def test_a_closed_session_is_not_saved(tinychat: Model, tmp_path: Path) -> None:
    session = await told(tinychat)
    await session.aclose()
    with pytest.raises(llamactor.ClosedError):
        await session.save(tmp_path / "chat")
    assert not (tmp_path / "chat").exists()


async def test_a_save_waits_for_the_prompts_before_it(tinychat: Model, tmp_path: Path) -> None:
    session = tinychat.chat()
    prediction = session.prompt(NAMED, max_tokens=30)
    await session.save(tmp_path / "chat")
    assert prediction.done
    async with ChatSession.restore(tmp_path / "chat", tinychat) as restored:
        assert len(restored.history) == 2
    await session.aclose()
