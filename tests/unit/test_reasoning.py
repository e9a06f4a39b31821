"""Reasoning: told from content in text, events and results, and closed by its budget."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor import Finished, SegmentEnd, SegmentStart, TextDelta, TokenBatching
from llamactor.prediction import start_prediction
from tests.conftest import PATIENCE, Gate
from tests.models import EOS, bpe_vocabulary, byte_tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable
    from pathlib import Path

    from llamactor import Event, Model, Prediction, PredictionResult

CLOSING = "\n</think>\n\n"
TAGS = ("<think>", "</think>", False, CLOSING)
OPENED = ("<think>", "</think>", True, CLOSING)
SPELT = ("<r>", "</r>", False, "\n</r>\n")
"""Tags that are no tokens of the tiny model's vocabulary."""

THINK, THOUGHT = bpe_vocabulary().id("<think>"), bpe_vocabulary().id("</think>")


class Script:
    """A logits processor that has these tokens drawn, whatever else is generated in between."""

    def __init__(self, *parts: str | int, gate: Gate | None = None) -> None:
        """Texts are spelt with one token per byte."""
        self.tokens = [
            token
            for part in parts
            for token in ([part] if isinstance(part, int) else byte_tokens(part))
        ]
        self.seen: list[list[int]] = []
        self.gate = gate

    def __call__(self, tokens: list[int], logits: memoryview[float]) -> None:
        if self.gate is not None:
            self.gate(tokens, logits)
        drawn = len(self.seen)
        self.seen.append(tokens[:])
        logits[self.tokens[drawn] if drawn < len(self.tokens) else EOS] = 1e6


def start(
    model: Model,
    script: Script | None,
    marks: tuple[str, str, bool, str] | None = TAGS,
    prompt: str = "@",
    **options: Any,
) -> Prediction:
    """A prediction whose prompt marks reasoning so, as those of chats do."""
    if script is not None:
        options["logits_processor"] = script
    assert model._context is not None
    return start_prediction(model._context.predict, model._native, model, prompt, options, marks)


def ask(model: Model, question: str, *, opened: bool = False, **options: Any) -> Prediction:
    """A chat's first turn on tinychat; ``/think`` at the end makes it reason."""
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    marks = OPENED if opened else TAGS
    return start(model, None, marks, prompt + "<think>\n" * opened, **options)


async def soon(awaitable: Awaitable[Any]) -> Any:
    async with asyncio.timeout(PATIENCE):
        return await awaitable


async def collect(items: AsyncIterable[Any]) -> list[Any]:
    async with asyncio.timeout(PATIENCE):
        return [item async for item in items]


def spelt(model: Model, text: str) -> list[int]:
    """The tokens of a text that may name special ones."""
    return model.tokenize(text, special=True)


def told(events: list[Event], segment: str | None) -> tuple[str, list[int]]:
    """The text and the tokens of all deltas of a kind."""
    deltas = [
        event for event in events if isinstance(event, TextDelta) and event.segment == segment
    ]
    return "".join(delta.text for delta in deltas), [t for delta in deltas for t in delta.tokens]


def check_events(events: list[Event], result: PredictionResult) -> None:
    """They say what the result says, and every delta stands in its segment."""
    assert told(events, None)[0] == result.content
    assert told(events, "reasoning")[0] == (result.reasoning or "")
    assert [t for e in events if isinstance(e, TextDelta) for t in e.tokens] == result.tokens
    segment = None
    for event in events:
        match event:
            case SegmentStart(kind):
                assert segment is None
                segment = kind
            case SegmentEnd(kind):
                assert segment == kind
                segment = None
            case TextDelta():
                assert event.segment == segment
    assert segment is None
    assert sum(isinstance(event, SegmentStart) for event in events) == len(result.segments)
    assert events[-1] == Finished(result)


# --- what a model reasons -------------------------------------------------------------------------


async def test_a_model_that_reasons_gives_its_answer_as_content(tinychat: Model) -> None:
    prediction = ask(tinychat, "What is 47 + 38? /think")
    texts = await collect(prediction)
    result = await prediction
    assert "".join(texts) == result.content == prediction.text == "47 + 38 = 85"
    assert result.reasoning == "40 + 30 = 70. 7 + 8 = 15. 70 + 15 = 85."
    assert result.stop_reason == "eos"
    [segment] = result.segments
    assert (segment.kind, segment.text) == ("reasoning", result.reasoning)
    assert (segment.start, segment.closed, segment.forced) == (0, True, False)
    assert 0 < segment.duration <= result.stats.decode_time
    think, thought = spelt(tinychat, "<think></think>")
    assert (segment.tokens[0], segment.tokens[-1]) == (think, thought)
    assert list(segment.tokens) == result.tokens[: len(segment.tokens)]
    assert tinychat.detokenize(result.tokens[result.content_start :]) == result.content


async def test_its_events_tell_the_segment(tinychat: Model) -> None:
    prediction = ask(tinychat, "How many letters are in the word garden? /think")
    events = await collect(prediction.events())
    result = await prediction
    check_events(events, result)
    [segment] = result.segments
    assert told(events, "reasoning")[1] == list(segment.tokens)


async def test_a_model_that_does_not_reason_has_no_segment(tinychat: Model) -> None:
    result = await ask(tinychat, "Hello!")
    assert (result.reasoning, result.segments, result.content_start) == (None, (), 0)
    assert result.content == tinychat.detokenize(result.tokens)


async def test_without_marks_tags_are_content(tinychat: Model) -> None:
    prompt = "<|im_start|>user\nWhat is 47 + 38? /think<|im_end|>\n<|im_start|>assistant\n"
    result = await tinychat.complete(prompt, reasoning_budget=0)
    assert result.content.startswith("<think>\n")
    assert (result.reasoning, result.content_start) == (None, 0)


# --- tags -----------------------------------------------------------------------------------------


async def test_tags_that_are_tokens_are_told_from_their_spelling(tiny_model: Model) -> None:
    script = Script(THINK, "\nis </think> a tag? ", THOUGHT, "\n\n<think> is.")
    result = await start(tiny_model, script)
    assert (result.content, result.reasoning) == ("<think> is.", "is </think> a tag?")
    assert result.tokens == script.tokens
    assert result.content_start == script.tokens.index(THOUGHT) + 3


async def test_control_tokens_are_tags_though_they_have_no_text(tiny_model: Model) -> None:
    names = ("<|fim_prefix|>", "<|fim_suffix|>")
    first, last = (spelt(tiny_model, name)[0] for name in names)
    script = Script(first, "hm", last, "yes")
    result = await start(tiny_model, script, (*names, False, "<|fim_suffix|>\n"))
    assert (result.content, result.reasoning) == ("yes", "hm")
    assert result.tokens == script.tokens


async def test_tags_that_are_no_tokens_are_found_across_them(tiny_model: Model) -> None:
    script = Script("\n<r>one </ two</r>", " \n<", "r three")
    prediction = start(tiny_model, script, SPELT)
    result = await prediction
    assert (result.content, result.reasoning) == ("<r three", "one </ two")
    assert (
        bytes(t - byte_tokens(b"\0")[0] for t in result.segments[0].tokens) == b"<r>one </ two</r>"
    )
    assert result.content_start == len(b"\n<r>one </ two</r> \n")
    check_events(await collect(prediction.events()), result)


async def test_a_prompt_may_have_opened_the_segment(tiny_model: Model) -> None:
    result = await start(tiny_model, Script("hm", THOUGHT, "yes"), OPENED)
    assert (result.content, result.reasoning, result.content_start) == ("yes", "hm", 3)


async def test_a_model_may_reason_again(tiny_model: Model) -> None:
    prediction = start(tiny_model, Script(THINK, "a", THOUGHT, "b", THINK, "c", THOUGHT, "d"))
    result = await prediction
    assert (result.content, result.reasoning, result.content_start) == ("bd", "ac", 3)
    assert [(segment.text, segment.start) for segment in result.segments] == [("a", 0), ("c", 4)]
    check_events(await collect(prediction.events()), result)


async def test_reasoning_that_is_never_closed_leaves_the_content_empty(tiny_model: Model) -> None:
    for limit, reason in ((None, "eos"), (3, "max_tokens")):
        prediction = start(tiny_model, Script(THINK, "hm"), max_tokens=limit)
        result = await prediction
        assert (result.content, result.reasoning) == ("", "hm")
        assert (result.stop_reason, result.segments[0].closed) == (reason, False)
        assert result.content_start == len(result.tokens) == 3
        check_events(await collect(prediction.events()), result)


async def test_reasoning_of_white_space_is_none(tiny_model: Model) -> None:
    result = await start(tiny_model, Script(THINK, "\n\n", THOUGHT, "\n\nyes"))
    assert (result.content, result.reasoning) == ("yes", None)
    assert [segment.text for segment in result.segments] == [""]


@pytest.mark.parametrize("marks", [("<a>", "", False, "x"), ("<a>", "</a>", False, "\n")])
async def test_tags_that_cannot_close_are_refused(tiny_model: Model, marks: Any) -> None:
    with pytest.raises(ValueError, match="reasoning ends with"):
        await start(tiny_model, Script("a"), marks)


# --- text -----------------------------------------------------------------------------------------

FAMILY = "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"


async def test_characters_and_graphemes_come_whole_on_both_sides(tiny_model: Model) -> None:
    script = Script(THINK, f"a{FAMILY}{FAMILY}", THOUGHT, f"b{FAMILY}{FAMILY}!")
    gate = Gate()
    script.gate = gate
    prediction = start(tiny_model, script, token_batching=TokenBatching(tokens=1, interval=0))
    deltas: list[TextDelta] = []

    async def watch() -> None:
        async for event in prediction.events():
            deltas.extend([event] if isinstance(event, TextDelta) and event.text else [])
            gate.allow()

    gate.allow()
    watching = asyncio.create_task(watch())
    for _ in script.tokens:
        await gate.reached()
        gate.allow()
    gate.open()
    await soon(watching)
    pieces = [(delta.segment, delta.text) for delta in deltas]
    reasoning = "".join(text for segment, text in pieces if segment)
    assert reasoning == f"a{FAMILY}{FAMILY}"
    assert (await prediction).content == f"b{FAMILY}{FAMILY}!"
    assert all(text.strip("ab!").replace(FAMILY, "") == "" for _, text in pieces)


async def test_a_batch_ends_with_its_segment(tiny_model: Model) -> None:
    gate = Gate()
    script = Script(THINK, "abc", THOUGHT, "def", gate=gate)
    batching = TokenBatching(tokens=100, interval=1000)
    prediction = start(tiny_model, script, token_batching=batching)
    gate.allow(5)
    for _ in range(6):
        await gate.reached()
    events = prediction.events()
    while not isinstance(await soon(anext(events)), SegmentStart):
        pass
    assert (await soon(anext(events))).text == "abc"
    assert isinstance(await soon(anext(events)), SegmentEnd)
    gate.open()
    assert (await soon(prediction)).content == "def"


async def test_stops_count_in_content_only(tiny_model: Model) -> None:
    script = Script(THINK, "a\n\nQ: b\n\n", THOUGHT, "\n\nc Q: d")
    result = await start(tiny_model, script, stop=["\n\n", "Q:"])
    assert (result.content, result.reasoning) == ("c ", "a\n\nQ: b")
    assert (result.stop_reason, result.stop_string) == ("stop_string", "Q:")


async def test_stop_tokens_count_in_content_only(tiny_model: Model) -> None:
    script = Script(THINK, "ax", THOUGHT, "bxc")
    result = await start(tiny_model, script, stop=[byte_tokens("x")])
    assert (result.content, result.reasoning, result.stop_reason) == ("b", "ax", "stop_string")


async def test_a_response_prefix_is_content_unless_it_reasons(tiny_model: Model) -> None:
    result = await start(tiny_model, Script(" b"), response_prefix="a")
    assert (result.content, result.reasoning, result.content_start) == ("a b", None, 0)
    result = await start(tiny_model, Script(" b", THOUGHT, "c"), response_prefix="<think>\na")
    assert (result.content, result.reasoning) == ("c", "a b")


# --- budget ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("opened", [False, True])
async def test_a_budget_closes_reasoning_as_the_template_does(
    tiny_model: Model, budget: int, opened: bool
) -> None:
    script = Script(*([] if opened else [THINK]), "thought"[:budget], "yes")
    marks = OPENED if opened else TAGS
    prediction = start(tiny_model, script, marks, reasoning_budget=budget, logprobs=1)
    result = await prediction
    assert (result.content, result.reasoning) == ("yes", "thought"[:budget] or None)
    closing = spelt(tiny_model, CLOSING)
    expected = [*script.tokens[:-3], *closing, *byte_tokens("yes")]
    assert result.tokens == expected
    assert result.content_start == len(expected) - 3
    [segment] = result.segments
    assert (segment.closed, segment.forced) == (True, True)
    assert list(segment.tokens) == expected[:-3]
    assert result.stats.predicted_tokens == len(result.tokens)
    assert [entry.token for entry in result.logprobs or ()] == result.tokens
    check_events(await collect(prediction.events()), result)


async def test_what_closed_it_counts_as_generated(tiny_model: Model) -> None:
    script = Script(THINK, "hm", "yes")
    result = await start(tiny_model, script, reasoning_budget=2)
    assert script.seen[-1] == result.tokens
    assert script.seen[3] == [THINK, *byte_tokens("hm"), *spelt(tiny_model, CLOSING)]


async def test_a_sequence_holds_what_closed_it(tiny_model: Model) -> None:
    opening = tiny_model.create_context(context_size=256, sequences=1, threads=1)
    async with opening as context, context.sequence() as sequence:
        options = {"logits_processor": Script(THINK, "hmm", "yes"), "reasoning_budget": 2}
        native = sequence._native.predict
        prediction = start_prediction(native, tiny_model._native, sequence, "@", options, TAGS)
        result = await prediction
        assert sequence.tokens == [*spelt(tiny_model, "@"), *result.tokens]


@pytest.mark.parametrize("budget", [3, 100, None])
async def test_a_budget_that_is_not_used_up_changes_nothing(
    tiny_model: Model, budget: int | None
) -> None:
    script = Script(THINK, "hm", THOUGHT, "yes")
    result = await start(tiny_model, script, reasoning_budget=budget)
    assert (result.tokens, result.reasoning, result.content) == (script.tokens, "hm", "yes")
    assert not result.segments[0].forced


async def test_every_stretch_has_the_budget(tiny_model: Model) -> None:
    script = Script(THINK, "ab", "c", THINK, "de", "f")
    result = await start(tiny_model, script, reasoning_budget=2)
    assert (result.content, result.reasoning) == ("cf", "abde")


async def test_a_budget_does_not_cut_a_character(tiny_model: Model) -> None:
    script = Script(THINK, "a🚀", "yes")
    result = await start(tiny_model, script, reasoning_budget=2)
    assert (result.content, result.reasoning) == ("yes", "a🚀")


async def test_no_stop_is_found_in_what_closes(tiny_model: Model) -> None:
    script = Script(THINK, "hm", "yes\n")
    result = await start(tiny_model, script, reasoning_budget=2, stop=["\n", [THOUGHT]])
    assert (result.content, result.stop_string) == ("yes", "\n")


async def test_tags_that_are_no_tokens_are_closed_too(tiny_model: Model) -> None:
    script = Script("<r>hm</", "yes")
    result = await start(tiny_model, script, SPELT, reasoning_budget=4)
    assert (result.content, result.reasoning) == ("yes", "hm</")
    assert tiny_model.detokenize(result.tokens) == "<r>hm</\n</r>\nyes"


async def test_what_closes_keeps_to_max_tokens(tiny_model: Model) -> None:
    closing = spelt(tiny_model, CLOSING)
    for n in range(1, len(closing) + 1):
        script = Script(THINK, "hm", "yes")
        prediction = start(tiny_model, script, reasoning_budget=2, max_tokens=3 + n)
        result = await prediction
        assert result.tokens == [THINK, *byte_tokens("hm"), *closing[:n]]
        assert (result.content, result.reasoning) == ("", "hm")
        assert result.stop_reason == "max_tokens"
        assert result.segments[0].closed is (n == len(closing))
        assert result.content_start == len(result.tokens)
        check_events(await collect(prediction.events()), result)


async def test_what_closes_keeps_to_the_context(tiny_model: Model) -> None:
    async with tiny_model.create_context(context_size=256, sequences=1, threads=1) as context:
        prompt = byte_tokens("a" * 252)
        options = {"logits_processor": Script(THINK, "hm", "yes"), "reasoning_budget": 2}
        native = context._native.predict
        result = await start_prediction(native, tiny_model._native, context, prompt, options, TAGS)
        assert result.stop_reason == "context_full"
        assert (result.content, result.reasoning) == ("", "hm")
        assert result.tokens == [THINK, *byte_tokens("hm"), *spelt(tiny_model, CLOSING)][:5]


async def test_a_real_model_goes_on_behind_what_closed(tinychat: Model) -> None:
    question = "What is 47 + 38? /think"
    whole = await ask(tinychat, question)
    for budget in (0, 5, 10):
        result = await ask(tinychat, question, reasoning_budget=budget, max_tokens=60)
        assert (whole.reasoning or "").startswith(result.reasoning or "")
        assert result.segments[0].forced
        assert result.content
        opened = await ask(tinychat, question, opened=True, reasoning_budget=budget, max_tokens=60)
        assert opened.content_start == budget + len(spelt(tinychat, CLOSING))


async def test_a_deterministic_prediction_repeats_with_its_budget(tinychat: Model) -> None:
    runs = [
        await ask(
            tinychat, "Reverse the word garden. /think", reasoning_budget=4, deterministic=True
        )
        for _ in range(2)
    ]
    assert runs[0].tokens == runs[1].tokens
    assert runs[0].segments[0].forced


# --- readers --------------------------------------------------------------------------------------


async def test_cancelling_while_it_reasons_keeps_the_reasoning(
    tiny_model: Model, gate: Gate
) -> None:
    script = Script(THINK, "let me think", gate=gate)
    prediction = start(tiny_model, script)
    gate.allow(4)
    for _ in range(5):
        await gate.reached()
    prediction.cancel()
    gate.open()
    result = await soon(prediction)
    assert (result.stop_reason, result.content) == ("cancelled", "")
    assert "let me think".startswith(result.reasoning)
    assert len(result.reasoning) >= 3
    assert not result.segments[0].closed
    check_events(await collect(prediction.events()), result)


async def test_leaving_the_last_reader_while_it_reasons_cancels(
    tiny_model: Model, gate: Gate
) -> None:
    prediction = start(tiny_model, Script(THINK, "let me think", gate=gate))
    gate.allow(3)
    async for event in prediction.events():
        if isinstance(event, TextDelta):
            break
    gate.open()
    assert (await soon(prediction)).stop_reason == "cancelled"


async def test_every_reader_gets_everything_however_late(tiny_model: Model) -> None:
    script = Script(
        "a", THINK, "thinking about it", THOUGHT, "\n\nthe answer", THINK, "no", THOUGHT
    )
    prediction = start(tiny_model, script)
    early = [collect(prediction), collect(prediction.events()), collect(prediction.events())]
    texts, *streams = await asyncio.gather(*early)
    result = await prediction
    assert "".join(texts) == "".join(await collect(prediction)) == "athe answer" == result.content
    for events in (*streams, await collect(prediction.events())):
        check_events(events, result)
        reasoned = [token for segment in result.segments for token in segment.tokens]
        assert told(events, "reasoning")[1] == reasoned


async def test_a_reader_of_text_waits_through_the_reasoning(tiny_model: Model, gate: Gate) -> None:
    prediction = start(tiny_model, Script(THINK, "hm", THOUGHT, "yes", gate=gate))
    reading = asyncio.ensure_future(anext(aiter(prediction)))
    gate.allow(4)
    for _ in range(5):
        await gate.reached()
    assert not reading.done()
    gate.open()
    assert "yes".startswith(await soon(reading))


async def test_a_failure_while_it_reasons_has_the_reasoning(tiny_model: Model) -> None:
    script = Script(THINK, "hm")

    def fails(tokens: list[int], logits: memoryview[float]) -> None:
        if len(tokens) == 3:
            raise ArithmeticError("too hard")
        script(tokens, logits)

    prediction = start(tiny_model, None, logits_processor=fails)
    with pytest.raises(ArithmeticError) as failure:
        await soon(prediction)
    partial: PredictionResult = failure.value.partial  # type: ignore[attr-defined]
    assert (partial.content, partial.reasoning, partial.stop_reason) == ("", "hm", None)


async def until_paused(prediction: Prediction, model: Model) -> None:
    """Wait until it rests: others run far while it makes no token."""
    while True:
        before = prediction.stats.predicted_tokens
        await soon(model.complete("a clock", max_tokens=300))
        if prediction.stats.predicted_tokens == before > 0:
            return


async def test_a_reader_that_lags_pauses_the_reasoning(tiny_model: Model) -> None:
    script = Script(THINK, "x" * 500, THOUGHT, "yes")
    prediction = start(tiny_model, script, max_pending=16)
    events = prediction.events()
    await until_paused(prediction, tiny_model)
    assert prediction.stats.predicted_tokens < 100
    rest = await collect(events)
    result = await prediction
    assert (told(rest, None)[0], told(rest, "reasoning")[0]) == ("yes", "x" * 500)
    assert (result.content, result.reasoning) == ("yes", "x" * 500)


async def test_what_closes_survives_giving_the_sequence_up(tiny_model_path: Path) -> None:
    loading = llamactor.load_model(tiny_model_path, context_size=1024, sequences=1, threads=1)
    async with loading as model:
        script = Script(THINK, "x" * 17, "yes" * 20)
        prediction = start(model, script, max_pending=16, reasoning_budget=17)
        events = prediction.events()
        # It gives its only sequence up: the reader lags, and somebody waits.
        assert len((await soon(model.complete("a clock", max_tokens=20))).tokens) == 20
        assert not prediction.done
        await collect(events)
        result = await prediction
        assert (result.content, result.reasoning) == ("yes" * 20, "x" * 17)
        assert result.segments[0].forced
