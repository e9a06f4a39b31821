"""Grammars: what an answer may be, on models that would say anything else."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor import Grammar, GrammarError, _core
from llamactor.prediction import start_prediction
from tests.conftest import PATIENCE, Gate
from tests.contexts import until
from tests.models import EOS, IM_END, bpe_vocabulary, byte_tokens, tiny_llama, tiny_spm
from tests.unit.test_loading import is_mapped, until_unmapped

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from llamactor import Model, Prediction, PredictionResult

SPOKEN = bpe_vocabulary()
THINK, THOUGHT = SPOKEN.id("<think>"), SPOKEN.id("</think>")
TAGS = ("<think>", "</think>", False, "\n</think>\n\n")
OPENED = ("<think>", "</think>", True, "\n</think>\n\n")
SPELT = ("<r>", "</r>", False, "\n</r>\n")
"""Tags that are no tokens of the tiny model's vocabulary."""

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
NESTED = Grammar.gbnf('root ::= "(" root ")" | [a-c] [a-c]')
CALL = Grammar.lark(
    'start: NAME "(" [NUMBER ("," NUMBER)*] ")"\nNAME: /[a-z]{1,8}/\nNUMBER: /[0-9]{1,4}/'
)


class Wish:
    """A logits processor that wants these tokens most, one after the other; then anything."""

    def __init__(self, *parts: str | int) -> None:
        """Texts are spelt with one token per byte."""
        self.tokens = [
            token
            for part in parts
            for token in ([part] if isinstance(part, int) else byte_tokens(part))
        ]
        self.calls = 0

    def __call__(self, tokens: list[int], logits: memoryview[float]) -> None:
        if self.calls < len(self.tokens):
            logits[self.tokens[self.calls]] = 1e6
        self.calls += 1


def start(
    model: Model,
    marks: tuple[str, str, bool, str] | None = None,
    constraint: dict[str, object] | None = None,
    prompt: str = "@",
    **options: Any,
) -> Prediction:
    """A prediction with what only chats set: marks of reasoning, or a constraint of any kind."""
    assert model._context is not None
    predict = model._context.predict

    def begin(hub: Any, prompt: str | list[int], native: dict[str, object]) -> Any:
        return predict(
            hub, prompt, native if constraint is None else native | {"constraint": constraint}
        )

    return start_prediction(begin, model._native, model, prompt, options, marks)


async def soon(awaitable: Awaitable[Any]) -> Any:
    async with asyncio.timeout(PATIENCE):
        return await awaitable


async def batches(model: Model) -> int:
    """Decode calls so far."""
    assert model._context is not None
    return int(str(model._context.stats()["batches"]))


# --- answers keep to it --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
async def test_a_regular_expression_is_matched_as_a_whole(tiny_model: Model, seed: int) -> None:
    pattern = r"(yes|no|maybe) [a-z]{2,5}!"
    result = await soon(
        tiny_model.complete("@", regex=pattern, max_tokens=60, temperature=1.0, seed=seed)
    )
    assert re.fullmatch(pattern, result.content)
    assert (result.stop_reason, result.completed) == ("eos", True)


@pytest.mark.parametrize("grammar", [NESTED, CALL], ids=["gbnf", "lark"])
async def test_a_grammar_is_kept_to(tiny_model: Model, grammar: Grammar) -> None:
    results = await soon(
        asyncio.gather(
            *(
                tiny_model.complete("@", grammar=grammar, max_tokens=80, temperature=1.0, seed=seed)
                for seed in range(12)
            )
        )
    )
    whole = [result for result in results if result.stop_reason == "eos"]
    assert len(whole) > 3
    for result in whole:
        assert result.completed
        assert grammar.accepts(result.content), result.content


@pytest.mark.parametrize("name", ["json", "json_array"])
async def test_json_is_json_however_long_it_may_be(tiny_model: Model, name: str) -> None:
    for seed, limit in enumerate((2, 5, 9, 17, 40)):
        result = await soon(
            tiny_model.complete(
                "@", grammar=Grammar.builtin(name), max_tokens=limit, temperature=1.0, seed=seed
            )
        )
        assert isinstance(json.loads(result.content), dict if name == "json" else list)
        assert len(result.tokens) <= limit


async def test_a_schema_is_kept_to_on_a_chat_model(tinychat: Model) -> None:
    for seed in range(4):
        result = await soon(
            tinychat.respond("Where?", schema=POINT, max_tokens=60, temperature=1.0, seed=seed)
        )
        point = json.loads(result.content)
        assert list(point) == ["x", "y"]
        assert all(isinstance(value, int) for value in point.values())


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.0, "top_k": None, "top_p": 0.5, "typical_p": 0.5},
        {"temperature": 1.0, "repeat_penalty": 1.5},
        {"temperature": 1.0, "dry": llamactor.Dry(multiplier=1.0)},
        {"temperature": 1.0, "xtc": llamactor.Xtc(probability=1.0, threshold=0.1)},
        {"temperature": 1.0, "mirostat": llamactor.Mirostat(version=1)},
        {"temperature": 1.0, "mirostat": llamactor.Mirostat(version=2)},
        {"temperature": 1.0, "deterministic": True},
        {"temperature": 0.0, "logprobs": 2},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
async def test_whatever_samplers_would_draw(tiny_model: Model, options: dict[str, Any]) -> None:
    result = await soon(tiny_model.complete("@", regex="[0-9]{8}", seed=1, **options))
    assert re.fullmatch("[0-9]{8}", result.content)


@pytest.mark.parametrize("speaks", ["text", "bytes", "anything"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_spm])
async def test_whatever_the_vocabulary(tmp_path: Path, make: Any, speaks: str) -> None:
    """Byte-pair and SentencePiece; tokens that are parts of characters, and control tokens."""
    path = make(tmp_path / "model.gguf", speaks=speaks)
    async with llamactor.load_model(path, context_size=512, threads=1) as model:
        for seed in range(4):
            options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 60}
            text = await soon(model.complete("@", schema={"type": "string"}, **options))
            assert isinstance(json.loads(text.content), str)
            letters = await soon(model.complete("@", regex="[а-я日本語]{3,9}", **options))
            assert re.fullmatch("[а-я日本語]{3,9}", letters.content)
            spelt = Grammar.gbnf('root ::= [а-я日本語] [^a-z] "é" "!"')
            rest = await soon(model.complete("@", grammar=spelt, **options))
            assert spelt.accepts(rest.content)


async def test_biases_count_among_what_is_allowed(tiny_model: Model) -> None:
    (a,) = byte_tokens("a")
    never: dict[int | str, Any] = {token: "never" for token in range(len(SPOKEN)) if token != a}
    result = await soon(tiny_model.complete("@", regex="[ab]{5}", logit_bias=never))
    assert result.content == "aaaaa"
    with pytest.raises(GrammarError, match="no token of the model's vocabulary can follow"):
        await soon(tiny_model.complete("@", regex="a{2}b", logit_bias=never))


async def test_the_same_seed_gives_the_same_answer(tiny_model: Model) -> None:
    first, again = [
        await soon(
            tiny_model.complete(
                "@", grammar=NESTED, max_tokens=30, temperature=1.0, seed=7, deterministic=True
            )
        )
        for _ in range(2)
    ]
    assert (first.tokens, first.content) == (again.tokens, again.content)


async def test_log_probabilities_are_the_model_s_own(tiny_model: Model) -> None:
    async with tiny_model.create_context(context_size=256, sequences=1, threads=1) as context:
        prompt = tiny_model.tokenize("once upon a time")
        async with context.sequence() as sequence:
            result = await soon(sequence.predict(prompt, regex="[a-f]{6}", logprobs=0))
        async with context.sequence() as sequence:
            scores = await soon(sequence.score([*prompt, *result.tokens]))
    assert result.logprobs is not None
    for entry, score in zip(result.logprobs, scores[len(prompt) :], strict=True):
        assert entry.logprob == pytest.approx(score, abs=0.1)


async def test_pieces_are_those_of_the_answer(tiny_model: Model) -> None:
    prediction = tiny_model.complete("@", schema=POINT, max_tokens=60, temperature=1.0, seed=3)
    async with asyncio.timeout(PATIENCE):
        pieces = [piece async for piece in prediction]
    result = await prediction
    assert "".join(pieces) == result.content


AMBIGUOUS = {
    "lines": Grammar.gbnf('root ::= line+\nline ::= [^\\n]+ "\\n"?'),
    "words": Grammar.gbnf('root ::= (word " "?)+\nword ::= [a-zA-Z.,]+'),
    "either": Grammar.gbnf('root ::= (word | quoted)+\nword ::= [a-z]+\nquoted ::= "\'" word "\'"'),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
async def test_a_grammar_may_say_the_same_in_many_ways(tiny_model: Model, name: str) -> None:
    grammar = AMBIGUOUS[name]
    result = await soon(
        tiny_model.complete("@", grammar=grammar, max_tokens=300, temperature=1.0, seed=3)
    )
    assert result.stop_reason in {"eos", "max_tokens"}
    assert not result.completed or grammar.accepts(result.content)
    assert grammar.accepts("a" * 20_000)


def random_rules(rng: random.Random) -> dict[str, list[list[str]]]:
    """Rules that may begin with themselves and each other, be nothing, and say the same twice."""
    names = [f"r{n}" for n in range(rng.randint(2, 4))]
    parts = ['"a"', '"b"', *names]
    rules = {
        name: [
            [rng.choice(parts) for _ in range(rng.choice([0, 1, 1, 2, 2, 3]))]
            for _ in range(rng.randint(1, 3))
        ]
        for name in names
    }
    return rules | {"root": [["r0"], ["r0", "root"], ["r0", "r1", "root"]]}


def derived(rules: dict[str, list[list[str]]], length: int) -> set[str]:
    """All texts of the root up to a length, by writing the rules out until nothing is new."""
    texts: dict[str, set[str]] = {name: set() for name in rules}
    texts |= {'"a"': {"a"}, '"b"': {"b"}}
    grown = True
    while grown:
        before = sum(map(len, texts.values()))
        for name, alternatives in rules.items():
            for alternative in alternatives:
                said = {""}
                for part in alternative:
                    said = {a + b for a in said for b in texts[part] if len(a + b) <= length}
                texts[name] |= said
        grown = sum(map(len, texts.values())) > before
    return texts["root"]


def test_a_grammar_says_what_its_rules_derive_however_they_lead_back_to_themselves() -> None:
    rng = random.Random(5)
    for _ in range(80):
        rules = random_rules(rng)
        expected = derived(rules, 5)
        text = "\n".join(
            f"{name} ::= " + " | ".join(" ".join(parts) or '""' for parts in alternatives)
            for name, alternatives in rules.items()
        )
        if expected:
            grammar = Grammar.gbnf(text)
            every = ("".join(word) for n in range(6) for word in itertools.product("ab", repeat=n))
            assert {word for word in every if grammar.accepts(word)} == expected, text


async def test_a_named_token_is_found_in_a_few_draws(tiny_model: Model) -> None:
    """Penalties that come after the temperature are asked for at every draw."""
    draws = 0

    def count(tokens: list[int]) -> list[int]:
        nonlocal draws
        draws += 1
        return []

    result = await soon(
        tiny_model.complete(
            "@",
            grammar=Grammar.gbnf('root ::= "a" <|fim_middle|> "b"'),
            temperature=1.0,
            top_k=None,
            seed=1,
            repeat_penalty=llamactor.RepeatPenalty(penalty=1.5, punish_tokens_filter=count),
            sampler_order=["temperature", "penalties"],
        )
    )
    assert (result.content, SPOKEN.id("<|fim_middle|>") in result.tokens) == ("ab", True)
    assert draws < 50


# --- the end -------------------------------------------------------------------------------------


async def test_where_nothing_may_follow_it_ends_without_another_decode(tiny_model: Model) -> None:
    before = await batches(tiny_model)
    result = await soon(tiny_model.complete("@", regex="abc", logits_processor=Wish("abc")))
    assert (result.content, result.stop_reason, len(result.tokens)) == ("abc", "eos", 3)
    assert await batches(tiny_model) - before == 3  # the prompt, `a` and `b`


async def test_the_end_is_drawn_only_where_it_may_come(tiny_model: Model) -> None:
    wish = Wish(EOS, EOS, EOS, EOS, EOS)
    result = await soon(tiny_model.complete("@", regex="[a-z]{3}[0-9]*", logits_processor=wish))
    assert re.fullmatch("[a-z]{3}", result.content)
    assert result.stop_reason == "eos"


async def test_a_whole_answer_ends_even_if_ends_are_ignored(tiny_model: Model) -> None:
    result = await soon(tiny_model.complete("@", regex="[a-z]{3}", ignore_eos=True))
    assert (result.stop_reason, len(result.content)) == ("eos", 3)


async def test_an_answer_of_nothing_is_no_token(tiny_model: Model) -> None:
    result = await soon(tiny_model.complete("@", regex=""))
    assert (result.content, result.tokens, result.stop_reason) == ("", [], "eos")
    assert result.completed


async def test_a_stop_still_stops(tiny_model: Model) -> None:
    result = await soon(
        tiny_model.complete("@", regex="[a-z]+", stop="xyz", logits_processor=Wish("abxyzc"))
    )
    assert (result.content, result.stop_reason) == ("ab", "stop_string")
    assert not result.completed


async def test_cancelling_leaves_what_was_said(tiny_model: Model, gate: Gate) -> None:
    prediction = tiny_model.complete("@", regex="[a-z]+", max_tokens=9, logits_processor=gate)
    gate.allow(3)
    for _ in range(4):
        await gate.reached()
    prediction.cancel()
    gate.open()
    result = await soon(prediction)
    assert result.stop_reason == "cancelled"
    assert re.fullmatch("[a-z]+", result.content)
    assert not result.completed


# --- limits --------------------------------------------------------------------------------------


async def test_a_limit_closes_what_has_begun(tiny_model: Model) -> None:
    schema = {"type": "array", "items": POINT, "minItems": 1}
    shortest = len('[{"x":0,"y":0}]')
    closed = 0
    for limit in range(shortest, shortest + 25):
        result = await soon(
            tiny_model.complete("@", schema=schema, max_tokens=limit, temperature=1.0, seed=limit)
        )
        points = json.loads(result.content)
        assert points
        assert all(list(point) == ["x", "y"] for point in points)
        assert len(result.tokens) <= limit
        assert result.completed == (result.stop_reason == "eos")
        closed += not result.completed
    assert closed > 3


async def test_a_regular_expression_is_closed_as_well(tiny_model: Model) -> None:
    pattern = r"<[a-z]*>( and <[a-z]*>){2}"
    for limit in range(25, 45):
        result = await soon(
            tiny_model.complete("@", regex=pattern, max_tokens=limit, temperature=1.0, seed=limit)
        )
        assert re.fullmatch(pattern, result.content), limit


async def test_the_end_of_the_context_closes_as_well(tiny_model: Model) -> None:
    async with tiny_model.create_context(context_size=64, sequences=1, threads=1) as context:
        for length in (3, 20, 40, 52):
            async with context.sequence() as sequence:
                prompt = list(range(100, 100 + length))
                result = await soon(
                    sequence.predict(
                        prompt, schema={"type": "string"}, temperature=1.0, seed=length
                    )
                )
            assert isinstance(json.loads(result.content), str)
            assert result.stop_reason in {"eos", "context_full"}
            assert result.completed == (result.stop_reason == "eos")


async def test_a_limit_below_the_shortest_answer_is_refused(tiny_model: Model) -> None:
    before = await batches(tiny_model)
    with pytest.raises(GrammarError, match=r"needs \d+ tokens, but max_tokens=4 leaves 4"):
        await soon(tiny_model.complete("@", schema=POINT, max_tokens=4))
    with pytest.raises(GrammarError, match=r"needs 3 tokens, but max_tokens=0"):
        await soon(tiny_model.complete("@", regex="[0-9]{3}", max_tokens=0))
    assert await batches(tiny_model) == before


async def test_other_grammars_are_cut(tiny_model: Model) -> None:
    result = await soon(
        tiny_model.complete("@", grammar=NESTED, max_tokens=5, logits_processor=Wish("((((("))
    )
    assert (result.content, result.stop_reason, result.completed) == ("(((((", "max_tokens", False)


async def test_without_a_grammar_every_answer_is_complete(tiny_model: Model) -> None:
    result = await soon(tiny_model.complete("@", max_tokens=3))
    assert result.completed


# --- a response prefix ---------------------------------------------------------------------------


async def test_a_response_prefix_is_a_part_of_what_must_match(tiny_model: Model) -> None:
    result = await soon(
        tiny_model.complete("@", schema=POINT, response_prefix='{"x": 12', max_tokens=40)
    )
    assert json.loads(result.content)["x"] >= 12
    whole = await soon(tiny_model.complete("@", regex="[a-c]{3}", response_prefix="abc"))
    assert (whole.content, whole.tokens, whole.stop_reason) == ("abc", [], "eos")


async def test_an_impossible_response_prefix_is_refused(tiny_model: Model) -> None:
    for options in ({"schema": POINT}, {"regex": "[a-z]+"}, {"grammar": NESTED}, {"grammar": CALL}):
        with pytest.raises(GrammarError, match=r'begins with "\?'):
            await soon(tiny_model.complete("@", response_prefix="?", **options))


# --- with reasoning ------------------------------------------------------------------------------


async def test_reasoning_is_free_and_the_content_keeps_to_the_grammar(tiny_model: Model) -> None:
    wish = Wish(THINK, "let me see: {", THOUGHT, "hello")
    result = await soon(start(tiny_model, TAGS, regex="[0-9]{4}", logits_processor=wish))
    assert result.reasoning == "let me see: {"
    assert re.fullmatch("[0-9]{4}", result.content)
    assert result.stop_reason == "eos"


async def test_without_reasoning_the_content_begins_at_once(tiny_model: Model) -> None:
    result = await soon(start(tiny_model, TAGS, regex="[0-9]{4}", logits_processor=Wish("hello")))
    assert result.reasoning is None
    assert re.fullmatch("[0-9]{4}", result.content)


async def test_reasoning_that_the_prompt_has_opened_is_free(tiny_model: Model) -> None:
    wish = Wish("well…", THOUGHT, "\n\nhello")
    result = await soon(start(tiny_model, OPENED, regex="[0-9]{4}", logits_processor=wish))
    assert result.reasoning == "well…"
    assert re.fullmatch("[0-9]{4}", result.content)


async def test_tags_may_be_spelt(tiny_model: Model) -> None:
    wish = Wish(" <r>so <r> it is</r>", "x")
    result = await soon(start(tiny_model, SPELT, regex="[0-9]{4}", logits_processor=wish))
    assert result.reasoning == "so <r> it is"
    assert re.fullmatch("[0-9]{4}", result.content)


async def test_what_only_begins_like_a_tag_is_content_or_nothing(tiny_model: Model) -> None:
    wish = Wish("<a>", EOS)
    result = await soon(start(tiny_model, SPELT, regex="<[a-z]+>", logits_processor=wish))
    assert (result.content, result.reasoning) == ("<a>", None)


async def test_content_that_could_not_be_ended_is_the_tag(tiny_model: Model) -> None:
    pattern = "(ok|<[a-z]{100}>)"
    for limit in range(25, 60, 5):
        wish = Wish("<ab")
        result = await soon(
            start(tiny_model, SPELT, regex=pattern, max_tokens=limit, logits_processor=wish)
        )
        assert re.fullmatch(pattern, result.content), (limit, result)
        assert len(result.tokens) <= limit


async def test_a_tag_within_content_is_content(tiny_model: Model) -> None:
    wish = Wish('"a <r> b</r>"')
    result = await soon(start(tiny_model, SPELT, schema={"type": "string"}, logits_processor=wish))
    assert (json.loads(result.content), result.reasoning) == ("a <r> b</r>", None)


async def test_nothing_ends_within_reasoning(tiny_model: Model) -> None:
    wish = Wish(THINK, "hm", EOS, IM_END, THOUGHT)
    result = await soon(start(tiny_model, TAGS, regex="ok", max_tokens=200, logits_processor=wish))
    assert (result.content, result.stop_reason) == ("ok", "eos")


async def test_a_reasoning_budget_leads_to_the_answer(tiny_model: Model) -> None:
    result = await soon(
        start(tiny_model, TAGS, regex="[0-9]{3}", reasoning_budget=5, logits_processor=Wish(THINK))
    )
    assert re.fullmatch("[0-9]{3}", result.content)
    assert result.segments[0].forced


async def test_a_limit_closes_reasoning_so_that_an_answer_fits(tiny_model: Model) -> None:
    for limit in range(40, 70, 3):
        result = await soon(
            start(tiny_model, OPENED, schema=POINT, max_tokens=limit, temperature=1.0, seed=limit)
        )
        assert list(json.loads(result.content)) == ["x", "y"], limit
        assert len(result.tokens) <= limit
        assert result.reasoning
    with pytest.raises(GrammarError, match="the shortest answer"):
        await soon(start(tiny_model, OPENED, schema=POINT, max_tokens=10))


async def test_where_there_is_no_room_for_reasoning_none_begins(tiny_model: Model) -> None:
    result = await soon(
        start(tiny_model, TAGS, schema=POINT, max_tokens=16, logits_processor=Wish(THINK))
    )
    assert result.reasoning is None
    assert list(json.loads(result.content)) == ["x", "y"]


async def test_a_response_prefix_may_hold_the_reasoning(tiny_model: Model) -> None:
    prefix = "<think>\nI know\n</think>\n\n12"
    result = await soon(start(tiny_model, TAGS, regex="[0-9]{4}", response_prefix=prefix))
    assert result.reasoning == "I know"
    assert re.fullmatch("12[0-9]{2}", result.content)


# --- of several, and lazily ----------------------------------------------------------------------


def gbnf(text: str, **more: object) -> dict[str, object]:
    return {"kind": "gbnf", "text": text, "root": "root", **more}


def lazy(text: str, *triggers: tuple[str, str], **more: object) -> dict[str, object]:
    return {
        "kind": "lazy",
        "of": gbnf(text),
        "triggers": [{"kind": kind, "value": value} for kind, value in triggers],
        **more,
    }


async def test_of_several_whatever_one_allows(tiny_model: Model) -> None:
    either: dict[str, object] = {
        "kind": "any",
        "of": [{"kind": "regex", "text": "ab[0-9]{2}"}, gbnf('root ::= "ac" [x-z]{3}')],
    }
    for wish, expected in (("ab", "ab[0-9]{2}"), ("ac", "ac[x-z]{3}")):
        result = await soon(start(tiny_model, constraint=either, logits_processor=Wish(wish)))
        assert re.fullmatch(expected, result.content)


async def test_a_lazy_grammar_waits_for_its_word(tiny_model: Model) -> None:
    grammar = lazy('root ::= "<call>" [0-9]{3} "</call>"', ("word", "<call>"))
    wish = Wish("free text, then <call>and")
    result = await soon(start(tiny_model, constraint=grammar, logits_processor=wish))
    assert re.fullmatch("free text, then <call>[0-9]{3}</call>", result.content)
    assert result.completed


async def test_without_a_trigger_the_text_is_free(tiny_model: Model) -> None:
    grammar = lazy('root ::= "<call>" [0-9]{3}', ("word", "<call>"))
    wish = Wish("just <cal text", EOS)
    result = await soon(start(tiny_model, constraint=grammar, logits_processor=wish))
    assert (result.content, result.stop_reason) == ("just <cal text", "eos")


async def test_a_token_can_be_a_trigger(tiny_model: Model) -> None:
    call = SPOKEN.id("<tool_call>")
    grammar = lazy('root ::= <tool_call> "{" [0-9]{2} "}"', ("token", "<tool_call>"))
    wish = Wish("so <tool_call", call, "hello")
    result = await soon(start(tiny_model, constraint=grammar, logits_processor=wish))
    assert re.fullmatch(r"so <tool_call<tool_call>\{[0-9]{2}\}", result.content)


async def test_patterns_can_be_triggers(tiny_model: Model) -> None:
    found = lazy('root ::= "f(" [0-9]{2} ")"', ("pattern", r"call: (f\()"))
    wish = Wish("call: f(")
    result = await soon(start(tiny_model, constraint=found, logits_processor=wish))
    assert re.fullmatch(r"call: f\([0-9]{2}\)", result.content)
    whole = lazy('root ::= "f(" [0-9]{2} ")"', ("pattern_full", r"\s*(f\()"))
    wish = Wish("xf(", EOS)
    result = await soon(start(tiny_model, constraint=whole, logits_processor=wish))
    assert result.content == "xf("
    wish = Wish("  f(")
    result = await soon(start(tiny_model, constraint=whole, logits_processor=wish))
    assert re.fullmatch(r"  f\([0-9]{2}\)", result.content)


async def test_what_would_trigger_without_fitting_is_not_drawn(tiny_model: Model) -> None:
    grammar = lazy('root ::= "[" [0-9]{2} "]"', ("pattern", r"now([\s\S])"))
    result = await soon(
        start(tiny_model, constraint=grammar, logits_processor=Wish("now!"), max_tokens=50)
    )
    assert re.fullmatch(r"now\[[0-9]{2}\]", result.content)


async def test_control_tokens_are_spelt_only_where_they_are_preserved(tiny_model: Model) -> None:
    text = 'root ::= "<|fim_middle|>" "a"'
    wish = Wish(SPOKEN.id("<|fim_middle|>"))
    plain = await soon(start(tiny_model, constraint=gbnf(text), logits_processor=wish))
    assert SPOKEN.id("<|fim_middle|>") not in plain.tokens
    assert plain.content == "<|fim_middle|>a"
    kept = gbnf(text, preserved=["<|fim_middle|>"])
    wish = Wish(SPOKEN.id("<|fim_middle|>"))
    named = await soon(start(tiny_model, constraint=kept, logits_processor=wish))
    assert named.tokens[0] == SPOKEN.id("<|fim_middle|>")


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.gbnf('root ::= "a" <|fim_middle|> "b"'),
        Grammar.gbnf(f'root ::= "a" <[{SPOKEN.id("<|fim_middle|>")}]> "b"'),
        Grammar.gbnf(f'root ::= "a" !<[{EOS}]> "b"'),
        Grammar.lark('start: "a" <|fim_middle|> "b"'),
        Grammar.lark(f'start: "a" <[{EOS}-{SPOKEN.id("<|fim_middle|>")}]> "b"'),
    ],
    ids=lambda grammar: f"{grammar.kind}: {grammar.text}",
)
async def test_control_tokens_can_be_named(tiny_model: Model, grammar: Grammar) -> None:
    middle = SPOKEN.id("<|fim_middle|>")
    wish = Wish("a", middle, "b")
    result = await soon(tiny_model.complete("@", grammar=grammar, logits_processor=wish))
    assert (result.content, result.tokens) == ("ab", [*byte_tokens("a"), middle, *byte_tokens("b")])
    assert result.stop_reason == "eos"


@pytest.mark.parametrize(
    ("grammar", "name"),
    [
        (Grammar.gbnf('root ::= "a" <|im_end|>'), r"<\|im_end\|>"),
        (Grammar.gbnf(f'root ::= "a" ("b" | <[{EOS}]>)'), rf"<\[{EOS}\]>"),
        (Grammar.lark('start: "a" <|im_end|>'), r"<\|im_end\|>"),
        (Grammar.lark(f'start: "a" <[{EOS}]>?'), r"<\|endoftext\|>"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
async def test_tokens_that_end_a_generation_cannot_be_named(
    tiny_model: Model, grammar: Grammar, name: str
) -> None:
    with pytest.raises(GrammarError, match=f"{name} ends a generation.*cannot be named"):
        await soon(tiny_model.complete("@", grammar=grammar))


async def test_a_grammar_may_have_begun_in_the_prompt(tiny_model: Model) -> None:
    begun = gbnf('root ::= "<call>" [0-9]{3}', prefix="<call>")
    result = await soon(start(tiny_model, constraint=begun))
    assert re.fullmatch("[0-9]{3}", result.content)


# --- malformed and hostile -----------------------------------------------------------------------

DEEP = 60_000
HOSTILE = {
    "nested-gbnf": Grammar.gbnf(f'root ::= {"(" * DEEP}"a"{")" * DEEP}'),
    "nested-lark": Grammar.lark(f'start: {"(" * DEEP}"a"{")" * DEEP}'),
    "nested-regex": Grammar.regex("(" * DEEP + "a" + ")" * DEEP),
    "long-gbnf": Grammar.gbnf("root ::= " + '"a" ' * 2_500_000),
    "long-regex": Grammar.regex("a" * 10_000_000),
    "long-lark": Grammar.lark("start: " + '"a" ' * 2_500_000),
    "repeated-gbnf": Grammar.gbnf('root ::= ((("a"{1000}){1000}){1000}){1000}'),
    "repeated-regex": Grammar.regex("(((a{1000}){1000}){1000}){1000}"),
    "repeated-lark": Grammar.lark('start: ((("a"~1000)~1000)~1000)~1000'),
    "counted-regex": Grammar.regex("(x+x+)+y" * 20 + "(.*a.{30})*"),
    "alternatives": Grammar.regex("|".join(f"a{n}" for n in range(50_000))),
    "left-recursive-lark": Grammar.lark('start: start "a" | start start | "a"'),
    "chain-gbnf": Grammar.gbnf(
        "root ::= r0\n"
        + "".join(f"r{n} ::= r{n + 1}? r{n + 1}? r{n + 1}?\n" for n in range(300))
        + 'r300 ::= "a"'
    ),
    "chain-lark": Grammar.lark(
        "start: r0\n" + "".join(f"r{n}: r{n + 1} r{n + 1}\n" for n in range(20_000)) + 'r20000: "a"'
    ),
    "terminals-lark": Grammar.lark(
        "start: T0\n" + "".join(f"T{n}: T{n + 1} T{n + 1}\n" for n in range(60)) + 'T60: "a"'
    ),
    "ambiguous-gbnf": Grammar.gbnf('root ::= root root root | "a" | "b" | ""'),
}


@pytest.fixture
async def heartbeat() -> AsyncIterator[list[int]]:
    """Counts the turns of the loop."""
    turns = [0]

    async def beat() -> None:
        while True:
            await asyncio.sleep(0)
            turns[0] += 1

    task = asyncio.create_task(beat())
    yield turns
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_grammar_ends_in_an_error_or_an_answer(
    tiny_model: Model, heartbeat: list[int], name: str
) -> None:
    prediction = tiny_model.complete("@", grammar=HOSTILE[name], max_tokens=8, temperature=1.0)
    refusal = ""
    try:
        await soon(prediction)
    except GrammarError as error:
        refusal = str(error)
    assert "bytes; at most" in refusal or "long" not in name
    # What is too long is refused unread, perhaps before the loop has turned so often.
    assert heartbeat[0] > 3 or "bytes; at most" in refusal
    after = await soon(tiny_model.complete("@", regex="ok"))
    assert after.content == "ok"


async def test_a_schema_that_takes_too_much_keeps_neither_thread_nor_model(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "own.gguf")
    kinds = [{"type": "string", "pattern": f"^[a-z]{{1,2000}}-{n}$"} for n in range(9000)]
    patterns = {f"p{n}": kind for n, kind in enumerate(kinds)}
    schema = {"type": "object", "properties": patterns, "required": list(patterns)}
    async with llamactor.load_model(path, context_size=512, sequences=1, threads=1) as model:
        assert is_mapped(path)
        await soon(model.complete("x", max_tokens=1))
        threads = Path("/proc/self/task")
        n_threads = len(list(threads.iterdir()))
        with pytest.raises(GrammarError, match="the grammar takes more than"):
            await soon(model.complete("x", schema=schema))
        await until(lambda: len(list(threads.iterdir())) <= n_threads)
    await until_unmapped(path)


MALFORMED = {
    "GBNF: no end": (Grammar.gbnf('root ::= "a'), "line 1, column 12.*unexpected end of input"),
    "GBNF: no rule": (Grammar.gbnf("root ::= foo"), "Undefined rule identifier 'foo'"),
    "GBNF: no root": (Grammar.gbnf('a ::= "b"'), "does not contain a 'root' symbol; it has a"),
    "GBNF: endless": (Grammar.gbnf("root ::= root"), "allows no text"),
    "Lark: no rule": (
        Grammar.lark("start: foo"),
        'Lark grammar cannot be used.*unknown name: "foo"',
    ),
    "Lark: no start": (Grammar.lark('begin: "a"'), "Lark grammar cannot be used.*start"),
    "regex: open": (Grammar.regex("(a"), "regular expression cannot be used.*unclosed group"),
    "regex: lookahead": (Grammar.regex("(?=a)b"), "regular expression cannot be used.*look-around"),
    "schema: unknown": (Grammar("json_schema", '{"foo": 1}'), "foo"),
    "schema: no JSON": (Grammar("json_schema", "{"), "is not JSON"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_grammar_says_what_is_wrong(tiny_model: Model, name: str) -> None:
    grammar, words = MALFORMED[name]
    with pytest.raises(GrammarError, match=f"(?s){words}"):
        await soon(tiny_model.complete("@", grammar=grammar))
    with pytest.raises(GrammarError, match=f"(?s){words}"):
        grammar.accepts("a")


async def test_a_grammar_that_fails_leaves_the_sequence_to_others(tiny_model: Model) -> None:
    failing = [tiny_model.complete("@", grammar=Grammar.gbnf("root ::=  x")) for _ in range(20)]
    outcomes = await soon(asyncio.gather(*failing, return_exceptions=True))
    assert all(isinstance(outcome, GrammarError) for outcome in outcomes)
    assert (await soon(tiny_model.complete("@", max_tokens=1))).tokens


# --- values --------------------------------------------------------------------------------------


def test_one_at_most_is_given() -> None:
    with pytest.raises(ValueError, match="grammar and regex"):
        llamactor.GenerationOptions(grammar=NESTED, regex="a")
    with pytest.raises(ValueError, match="schema and regex"):
        llamactor.GenerationOptions(schema=POINT, regex="a")


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="grammar must be Grammar"):
        llamactor.GenerationOptions(grammar="root ::= x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="regex"):
        llamactor.GenerationOptions(regex=re.compile("a"))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Grammar.gbnf(1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind"):
        Grammar("ebnf", "a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name"):
        Grammar.builtin("klingon")


def test_grammars_are_values() -> None:
    assert Grammar.regex("a+") == Grammar.regex("a+") != Grammar.lark('start: "a"+')
    assert len({Grammar.regex("a"), Grammar.regex("a"), Grammar.regex("b")}) == 2
    with pytest.raises(AttributeError):
        Grammar.regex("a").text = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("json", '{"a": [1, null, "b"]}', "[1]"),
        ("json_array", '[{"a": 1}, true]', '{"a": 1}'),
        ("list", "- one\n- two\n", "- one\ntwo\n"),
        ("arithmetic", "(x + 10) * 2 = y1\n", "(x + = 2\n"),
        ("chess", "1. e4 e5\n2. Nf3 Nc6\n3. O-O Qxd7+\n", "1. e9 e5\n"),
        ("english", "It works, at last.", "größer"),
        ("japanese", "日本語 です。", "nihongo"),
    ],
)
def test_builtin_grammars_describe_what_they_are_named_after(
    name: str, good: str, bad: str
) -> None:
    grammar = Grammar.builtin(name)
    assert grammar.accepts(good)
    assert not grammar.accepts(bad)
    assert not grammar.accepts("")


def test_parsing_gives_the_value_of_json_and_other_texts_as_they_are() -> None:
    assert Grammar.json_schema(POINT).parse('{"x": 1, "y": 2}') == {"x": 1, "y": 2}
    assert Grammar.regex("[a-z]+").parse("abc") == "abc"
    with pytest.raises(GrammarError, match="not what the json_schema grammar describes"):
        Grammar.json_schema(POINT).parse('{"x": 1}')
    with pytest.raises(GrammarError, match="not what the regex grammar describes: '1'"):
        Grammar.regex("[a-z]+").parse("1")


def test_anchors_at_the_ends_change_nothing() -> None:
    for pattern in ("^[a-c]{2}$", "[a-c]{2}$", "^[a-c]{2}"):
        assert Grammar.regex(pattern).accepts("ab")
        assert not Grammar.regex(pattern).accepts("abc")
    assert Grammar.regex(r"a\$").accepts("a$")


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"\s", r"\w", r"\d", ".", r"\S", r"\W", r"\D"),
        *(r"[^\s]", r"[^\w]", r"[^\S]", r"[^\W]", r"[^\D]", r"[\S]"),
    ],
)
def test_what_a_pattern_of_a_schema_takes_python_takes_as_well(pattern: str) -> None:
    ours, theirs = _core.Pattern(f"^{pattern}$"), re.compile(rf"^{pattern}\Z")
    characters = map(chr, [*range(0xD800), *range(0xE000, 0x2_0000)])
    assert [one for one in characters if ours.search(one) and not theirs.search(one)] == []


async def test_an_answer_that_goes_as_deep_as_it_may_is_closed(tiny_model: Model) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"$ref": "#"}},
        "additionalProperties": False,
    }
    begun = '{"n":' * 63
    assert Grammar.json_schema(schema).accepts(begun + "{}" + "}" * 63)
    assert not Grammar.json_schema(schema).accepts(begun + '{"n":{}}' + "}" * 63)
    result = await soon(
        tiny_model.complete("@", schema=schema, response_prefix=begun + "{", max_tokens=150)
    )
    assert result.content.startswith(begun + "{")
    assert result.parsed == json.loads(begun + "{}" + "}" * 63)


def test_grammars_are_followed_from_several_threads() -> None:
    """What is compiled once serves all at the same time."""
    from concurrent.futures import ThreadPoolExecutor

    grammar = Grammar.json_schema({"type": "array", "items": POINT})
    text = json.dumps([{"x": n, "y": -n} for n in range(50)])
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(grammar.accepts, [text] * 64))


async def results_of(predictions: list[Prediction]) -> list[PredictionResult]:
    return list(await soon(asyncio.gather(*predictions)))


async def test_many_at_once_keep_to_one_grammar(tiny_model: Model) -> None:
    """Twenty answers share what was compiled and nothing else."""
    predictions = [
        tiny_model.complete("@", schema=POINT, max_tokens=40, temperature=1.0, seed=seed)
        for seed in range(20)
    ]
    for result in await results_of(predictions):
        assert list(json.loads(result.content)) == ["x", "y"]


async def test_a_parked_answer_goes_on_where_it_was(tiny_model_path: Any) -> None:
    """A paused prediction gives its sequence up, and takes its grammar along."""
    async with llamactor.load_model(
        tiny_model_path, context_size=512, sequences=1, threads=1
    ) as model:
        pattern = "(ab[0-9]){40}"
        slow = model.complete("@", regex=pattern, max_pending=4, temperature=1.0, seed=1)
        pieces = aiter(slow)
        text = await soon(anext(pieces))
        other = await soon(model.complete("!", regex="[x-z]{5}"))
        assert re.fullmatch("[x-z]{5}", other.content)
        async with asyncio.timeout(PATIENCE):
            async for piece in pieces:
                text += piece
        assert re.fullmatch(pattern, text)
