"""Chat templates: rendered as Hugging Face renders them, and safe from what contents say."""

from __future__ import annotations

import asyncio
import json
import os
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import msgspec
import pytest

import llamactor
from llamactor import _core
from llamactor._hub import finish, hub_for
from llamactor.chat.messages import AssistantMessage, to_messages
from llamactor.chat.template import RenderedChat, render_chat
from tests.conftest import PATIENCE, TINYCHAT
from tests.families import (
    AGAIN,
    ANSWER,
    CALL,
    FAMILIES,
    RESULT,
    SYSTEM,
    TOOLS,
    USER,
    Family,
)
from tests.models import CHATML, byte_tokens, tiny_spm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from llamactor.chat.messages import MessageLike

# --- the reference ------------------------------------------------------------------------------


class Generation(jinja2.ext.Extension):
    """The blocks that Hugging Face's templates mark answers with; they change nothing."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 wants it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def reference(template: str, messages: Sequence[dict[str, Any]], **names: Any) -> str:
    """The prompt as `transformers` makes it: jinja2 with its settings."""

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
    names = {"tools": None, "documents": None, "add_generation_prompt": True} | names
    return env.from_string(template).render(messages=messages, **names)


def of_family(family: Family, messages: Sequence[dict[str, Any]], **names: Any) -> str:
    return reference(
        family.template,
        messages,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.bos,
        **names,
    )


def reference_tokens(model: llamactor.Model, family: Family, text: str) -> list[int]:
    """Its tokens; llama.cpp puts the first token before a prompt that has none."""
    tokens = model.tokenize(text, special=True)
    bos = model.tokens.bos
    assert bos is not None
    return [bos, *tokens] if family.adds_bos and tokens[:1] != [bos] else tokens


async def render(
    model: llamactor.Model, messages: Sequence[MessageLike], **options: Any
) -> RenderedChat:
    options.setdefault("template", model._chat_template)
    template = options.pop("template")
    return await render_chat(model._native, template, to_messages(messages), **options)


def named(names: str) -> Callable[[Any], str]:
    return lambda value: getattr(value, names)


EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=[item.name for item in FAMILIES])


@pytest.fixture(scope="module")
def family_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("families")
    return {family.name: family.write(directory) for family in FAMILIES}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a question": [USER],
    "system": [SYSTEM, USER],
    "three turns": [USER, ANSWER, AGAIN],
    "system and three turns": [SYSTEM, USER, ANSWER, AGAIN],
    "an answer": [USER, ANSWER],
    "a call": [USER, CALL, RESULT],
    "a call and an answer": [SYSTEM, USER, CALL, RESULT, ANSWER, AGAIN],
    "white space": [
        {"role": "user", "content": " \n a\t "},
        {"role": "assistant", "content": "\n\n b "},
        {"role": "user", "content": "\u00a0c\u2003"},
    ],
}


def suits(family: Family, messages: Sequence[dict[str, Any]]) -> bool:
    roles = {message["role"] for message in messages}
    return (family.system or "system" not in roles) and (family.tools or "tool" not in roles)


@EVERY_FAMILY
async def test_prompts_are_those_of_the_reference(
    family: Family, family_files: dict[str, Path]
) -> None:
    """As text and token by token, with and without tools and the header of an answer."""
    async with llamactor.load_model(family_files[family.name], vocab_only=True) as model:
        for name, messages in CONVERSATIONS.items():
            if not suits(family, messages):
                continue
            for tools in [[], TOOLS] if family.tools else [[]]:
                for header in (True, False):
                    expected = of_family(
                        family, messages, tools=tools or None, add_generation_prompt=header
                    )
                    rendered = await render(
                        model, messages, tools=tools, add_generation_prompt=header
                    )
                    case = (name, bool(tools), header)
                    assert (case, rendered.text) == (case, expected)
                    assert rendered.tokens == reference_tokens(model, family, expected), case
                    assert not rendered.neutralised, case


THOUGHTS: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm, «2 < 3»?"},
    AGAIN,
]
THOUGHTS_OF_A_CALL: list[dict[str, Any]] = [
    USER,
    {**CALL, "reasoning_content": "I must look.\n"},
    RESULT,
]


@pytest.mark.parametrize(
    "family", [item for item in FAMILIES if item.reasoning], ids=lambda item: item.name
)
async def test_thoughts_are_shown_as_the_reference_shows_them(
    family: Family, family_files: dict[str, Path]
) -> None:
    async with llamactor.load_model(family_files[family.name], vocab_only=True) as model:
        for messages in (THOUGHTS, THOUGHTS_OF_A_CALL, THOUGHTS[:2]):
            for names in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
                for header in (True, False):
                    shown = [
                        {**message, "thinking": message["reasoning_content"]}
                        if "reasoning_content" in message
                        else message
                        for message in messages
                    ]
                    expected = of_family(family, shown, add_generation_prompt=header, **names)
                    rendered = await render(
                        model, messages, add_generation_prompt=header, kwargs=names
                    )
                    assert rendered.text == expected
                    assert rendered.tokens == reference_tokens(model, family, expected)


@pytest.mark.parametrize(
    ("name", "names", "opened"),
    [
        ("qwen3", {}, False),
        ("qwen3", {"enable_thinking": False}, False),
        ("deepseek-r1", {}, True),
        ("smollm3", {}, False),
        ("command-r7b", {}, False),
    ],
)
async def test_the_tags_of_thoughts_are_found_and_whether_the_header_opens_them(
    family_files: dict[str, Path], name: str, names: dict[str, Any], opened: bool
) -> None:
    async with llamactor.load_model(family_files[name], vocab_only=True) as model:
        rendered = await render(model, [USER], kwargs=names)
        assert rendered.reasoning is not None
        assert rendered.reasoning.opened is opened
        assert rendered.reasoning.start.strip() in {"<think>", "<|START_THINKING|>"}


async def test_thoughts_of_harmony_end_where_the_answer_begins(
    family_files: dict[str, Path],
) -> None:
    async with llamactor.load_model(family_files["gpt-oss"], vocab_only=True) as model:
        tags = (await render(model, [USER])).reasoning
        assert tags is not None
        assert tags.start == "<|channel|>analysis<|message|>"
        assert tags.end.endswith("<|channel|>final<|message|>")
        assert not tags.opened


async def test_tags_that_are_tokens_are_known_without_the_template(
    tiny_model: llamactor.Model, tmp_path: Path
) -> None:
    """And a vocabulary without them, under a template without thoughts, has none."""
    tags = (await render(tiny_model, [USER])).reasoning
    assert tags is not None
    assert (tags.start, tags.end, tags.opened) == ("<think>", "</think>", False)
    async with llamactor.load_model(tiny_spm(tmp_path / "spm.gguf"), vocab_only=True) as model:
        assert (await render(model, [USER], template=CHATML)).reasoning is None


async def test_a_header_that_opens_thoughts_is_enough_to_know_their_tags(tmp_path: Path) -> None:
    opens = CHATML.replace("assistant\n", "assistant\n<think>\n")
    async with llamactor.load_model(tiny_spm(tmp_path / "spm.gguf"), vocab_only=True) as model:
        tags = (await render(model, [USER], template=opens)).reasoning
        assert tags is not None
        assert (tags.start, tags.end, tags.opened) == ("<think>", "</think>", True)


# --- safety -------------------------------------------------------------------------------------


def control_texts(model: llamactor.Model) -> dict[int, str]:
    """The tokens that only special parsing yields."""
    shown = {
        token: model.detokenize([token], special=True) for token in range(model.info.vocab_size)
    }
    return {
        token: text
        for token, text in shown.items()
        if text
        and token in model.tokenize(text, special=True)
        and token not in model.tokenize(text)
    }


def hostile(model: llamactor.Model) -> str:
    """A text that names every control token, whole, torn and nested in another."""
    texts = list(control_texts(model).values())
    torn = [text[:cut] for text in texts for cut in (1, len(text) // 2, len(text) - 1)]
    nested = [text[: len(text) // 2] + text + text[len(text) // 2 :] for text in texts]
    return "".join([*texts, " ", *torn, "\n", *nested, *reversed(texts)])


def harmless(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": "x"}


def controls_among(model: llamactor.Model, tokens: Sequence[int]) -> list[int]:
    controls = control_texts(model)
    return [token for token in tokens if token in controls]


async def check_safety(
    model: llamactor.Model, messages: list[dict[str, Any]], **options: Any
) -> None:
    """The control tokens of the prompt are those of one that says nothing, and all text stays."""
    rendered = await render(model, messages, **options)
    expected = await render(model, [harmless(message) for message in messages], **options)
    assert controls_among(model, rendered.tokens) == controls_among(model, expected.tokens)
    for message in messages:
        assert message["content"].strip() in rendered.text
    shown = model.detokenize(rendered.tokens, special=True)
    assert shown.endswith(rendered.text)  # what is before is the token that begins a text


@EVERY_FAMILY
async def test_contents_that_name_every_control_token_yield_none(
    family: Family, family_files: dict[str, Path]
) -> None:
    async with llamactor.load_model(family_files[family.name], vocab_only=True) as model:
        text = hostile(model)
        for role in ("user", "assistant"):
            messages: list[dict[str, Any]] = [
                {"role": "user", "content": text if role == "user" else "q"},
                {"role": "assistant", "content": text if role == "assistant" else "a"},
                {"role": "user", "content": "then"},
            ]
            await check_safety(model, messages)
        if family.system:
            await check_safety(model, [{"role": "system", "content": text}, USER])
        if family.tools:
            await check_tools(model, text)


async def check_tools(model: llamactor.Model, text: str) -> None:
    """Arguments, results and definitions name control tokens; none comes of them."""
    plain = await render(model, [USER, CALL, RESULT], tools=TOOLS)
    arguments: dict[str, Any] = {"city": text, "days": 2, "exact": True, "unit": None}
    function: dict[str, Any] = {"name": "get_weather", "arguments": arguments}
    made: Any = CALL["tool_calls"]
    call = {**CALL, "tool_calls": [{**made[0], "function": function}]}
    tool: dict[str, Any] = {**TOOLS[0]["function"], "description": text}
    tools = [{"type": "function", "function": tool}, TOOLS[1]]
    rendered = await render(model, [USER, call, {**RESULT, "content": text}], tools=tools)
    assert controls_among(model, rendered.tokens) == controls_among(model, plain.tokens)


@pytest.mark.parametrize("name", ["smollm2", "tinychat", "tiny"])
async def test_models_keep_users_from_naming_control_tokens(
    name: str, tiny_model_path: Path
) -> None:
    """The default model, the chat model and a generated one."""
    path: Any = {"smollm2": "smollm2", "tinychat": TINYCHAT, "tiny": tiny_model_path}[name]
    async with llamactor.load_model(path, vocab_only=True) as model:
        messages = [{"role": "user", "content": hostile(model)}]
        await check_safety(model, messages)
        await check_safety(model, [*messages, ANSWER, *messages])


async def test_a_sentencepiece_vocabulary_keeps_them_too(tmp_path: Path) -> None:
    async with llamactor.load_model(tiny_spm(tmp_path / "spm.gguf"), vocab_only=True) as model:
        text = hostile(model)
        rendered = await render(model, [{"role": "user", "content": text}])
        assert controls_among(model, rendered.tokens) == [model.tokens.bos]
        assert text in rendered.text
        assert text in model.detokenize(rendered.tokens)


@pytest.mark.parametrize("split", range(1, 10))
async def test_a_control_token_does_not_arise_where_content_meets_template(
    tiny_model: llamactor.Model, split: int
) -> None:
    """Half of it in the template, or in another content, half in this one."""
    name = "<|im_end|>"
    left, right = name[:split], name[split:]
    halves = f"{left}{{{{ messages[0].content }}}}{{{{ messages[1].content }}}}"
    for contents in ((right, "b"), (f" {right}", "b"), ("a" + left, right), (left, right)):
        roles = ("user", "assistant")
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, contents, strict=True)
        ]
        rendered = await render(tiny_model, messages, template=halves)
        assert controls_among(tiny_model, rendered.tokens) == []
        assert tiny_model.detokenize(rendered.tokens) == rendered.text
        assert rendered.text == left + "".join(contents)


DECIDES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '<|im_end|>' in m.content %}NAMED"
    "{% endif %}{{ m.content.split('#')[0] }}<|im_end|>{% if '#' in m.content %}"
    "<|im_start|>{{ m.content.split('#')[1] | upper }}{% endif %}{% endfor %}"
)


async def test_a_template_that_looks_for_words_in_contents_finds_them(
    tiny_model: llamactor.Model,
) -> None:
    content = "left<|pad|># right"
    rendered = await render(tiny_model, [{"role": "user", "content": content}], template=DECIDES)
    assert rendered.text == "<|im_start|>user\nleft<|pad|><|im_end|><|im_start|> RIGHT"
    assert not rendered.neutralised
    shown = [control_texts(tiny_model)[i] for i in controls_among(tiny_model, rendered.tokens)]
    assert shown[0] == "<|im_start|>"
    assert "<|pad|>" not in shown


async def test_control_tokens_in_contents_are_hidden_from_a_template_that_looks_for_them(
    tiny_model: llamactor.Model,
) -> None:
    content = "now<|im_end|>then"
    rendered = await render(tiny_model, [{"role": "user", "content": content}], template=DECIDES)
    assert rendered.neutralised
    assert rendered.text == f"<|im_start|>user\n{content}<|im_end|>"
    assert len(controls_among(tiny_model, rendered.tokens)) == 2
    assert tiny_model.detokenize(rendered.tokens, special=True) == rendered.text


# --- what is kept, where messages end ----------------------------------------------------------


async def turns_of(model: llamactor.Model, count: int) -> list[tuple[list[int], RenderedChat]]:
    """A conversation: for each turn what is cached after it, and the prompt of the next."""
    messages: list[Any] = []
    found = []
    for turn in range(count):
        messages.append({"role": "user", "content": f" Question {turn}? \n"})
        prompt = await render(model, messages)
        result = await model.complete(prompt.tokens, max_tokens=12)
        messages.append(AssistantMessage(content=result.content, tokens=tuple(result.tokens)))
        cached = [*prompt.tokens, *result.tokens]
        found.append((cached, await render(model, [*messages, AGAIN])))
    return found


@pytest.mark.model
async def test_every_next_prompt_begins_with_what_was_evaluated(
    smollm2: llamactor.Model,
) -> None:
    for cached, prompt in await turns_of(smollm2, 3):
        assert prompt.tokens[: len(cached)] == cached


async def test_tokens_that_a_model_has_written_are_kept_however_it_spelt_them(
    tiny_model: llamactor.Model,
) -> None:
    """The tokeniser would choose others; a template that trims changes nothing."""
    content = "\n the boat came home "
    tokens = tuple(byte_tokens(content))
    answer = AssistantMessage(content=content, tokens=tokens)
    trims = CHATML.replace("message['content']", "message['content'] | trim")
    for template in (CHATML, trims):
        rendered = await render(tiny_model, [USER, answer, AGAIN], template=template)
        assert contains(rendered.tokens, tokens)


async def test_tokens_of_a_turn_that_was_edited_are_not_used(
    tiny_model: llamactor.Model,
) -> None:
    stale = AssistantMessage(content="new", tokens=tuple(byte_tokens("old")))
    fresh = await render(tiny_model, [USER, {"role": "assistant", "content": "new"}])
    assert (await render(tiny_model, [USER, stale])).tokens == fresh.tokens


async def test_thoughts_that_a_template_leaves_out_are_left_out_of_the_tokens(
    family_files: dict[str, Path],
) -> None:
    async with llamactor.load_model(family_files["qwen3"], vocab_only=True) as model:
        thoughts, content = "<think>\nhm\n</think>\n\n", "Yes, the boat."
        tokens = model.tokenize(thoughts, special=True) + spelt(model, content)
        answer = AssistantMessage(
            content=content,
            reasoning="hm",
            tokens=tuple(tokens),
            content_start=len(tokens) - len(spelt(model, content)),
        )
        shown = await render(model, [USER, answer])
        assert contains(shown.tokens, tokens)
        left_out = await render(model, [USER, answer, AGAIN])
        assert not contains(left_out.tokens, tokens)
        assert contains(left_out.tokens, spelt(model, content))
        assert "hm" not in left_out.text


def spelt(model: llamactor.Model, text: str) -> list[int]:
    """One token per byte."""
    return [token for char in text.encode() for token in model.tokenize(chr(char))]


def contains(tokens: Sequence[int], part: Sequence[int]) -> bool:
    return any(list(tokens[i : i + len(part)]) == list(part) for i in range(len(tokens)))


@EVERY_FAMILY
async def test_messages_end_where_their_turn_does(
    family: Family, family_files: dict[str, Path]
) -> None:
    messages = [USER, ANSWER, AGAIN]
    async with llamactor.load_model(family_files[family.name], vocab_only=True) as model:
        rendered = await render(model, messages)
        assert len(rendered.ends) == len(messages)
        assert rendered.ends == sorted(rendered.ends)
        assert rendered.ends[-1] <= len(rendered.tokens)
        start = 0
        for message, end in zip(messages, rendered.ends, strict=True):
            text = model.detokenize(rendered.tokens[start:end], special=True)
            assert message["content"].strip() in text
            start = end


async def test_an_open_end_is_the_last_content_as_it_was_typed(
    smollm2: llamactor.Model,
) -> None:
    for typed in ("The sea", "The sea ", "", "  "):
        rendered = await render(
            smollm2, [SYSTEM, {"role": "user", "content": typed}], open_ended=True
        )
        assert rendered.text.endswith(f"<|im_start|>user\n{typed}")
        whole = await render(smollm2, [SYSTEM, {"role": "user", "content": typed + "x"}])
        assert whole.text.startswith(rendered.text)
        assert rendered.ends[-1] == len(rendered.tokens)


async def test_a_model_without_a_template_gets_a_plain_one(tmp_path: Path) -> None:
    path = tiny_spm(tmp_path / "plain.gguf")
    async with llamactor.load_model(path, vocab_only=True) as model:
        rendered = await render(model, [SYSTEM, USER, ANSWER, AGAIN])
        assert rendered.text.startswith(f"{SYSTEM['content']}\n\nUser: {USER['content']}\n\n")
        assert rendered.text.endswith("User: And then?\n\nAssistant:")
        assert "\nUser:" in rendered.stops
        assert rendered.tokens[0] == model.tokens.bos
        assert model.tokens.bos not in rendered.tokens[1:]


async def test_a_template_of_the_caller_replaces_the_file_s(tiny_model_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ tone }}"
    loading = llamactor.load_model(tiny_model_path, vocab_only=True, chat_template=template)
    async with loading as model:
        assert await model.apply_chat_template([ANSWER], tone="!") == f"[{ANSWER['content']}]!"
        with pytest.raises(TypeError, match="name"):
            await model.apply_chat_template([ANSWER], tools=[{"parameters": {}}])


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "messages", "cause"),
    [
        ("gemma2", [SYSTEM, USER], "System role not supported"),
        ("llama2", [USER, USER], "must alternate"),
        ("phi3", [USER, CALL, RESULT], r"leaves out message 2 \(role \"tool\"\)"),
        ("mistral", [USER, {**CALL, "tool_calls": [{"name": "f", "id": "1"}]}], "length 9"),
    ],
)
async def test_a_template_that_refuses_messages_says_why(
    family_files: dict[str, Path], name: str, messages: list[dict[str, Any]], cause: str
) -> None:
    async with llamactor.load_model(family_files[name], vocab_only=True) as model:
        with pytest.raises(llamactor.ChatTemplateError, match=cause):
            await model.apply_chat_template(messages)
        with pytest.raises(ValueError, match=cause):
            await model.apply_chat_template(messages)


HOSTILE = {
    "an endless loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "more than 5000000 instructions",
    ),
    "a huge range": ("{{ range(10 ** 12) | list }}", "range has too many elements"),
    "a huge text": ("{{ 'a' * 10 ** 12 }}", "too large"),
    "endless recursion": (
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "recursion limit",
    ),
    "deep parentheses": ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "recursion"),
    "deep blocks": ("{% if 1 %}" * 50_000, "recursion"),
    "gigabytes of output": (
        "{% for a in range(99999) %}{{ 'abcdefghij' * 9999 }}{% endfor %}",
        "more than 64 MiB",
    ),
    "gigabytes in a capture": (
        "{% set x %}{% for a in range(99999) %}{{ 'abcdefghij' * 9999 }}{% endfor %}{% endset %}",
        "more than 64 MiB",
    ),
    "a replacement that explodes": (
        "{{ ('a' * 90000).replace('a', 'b' * 90000) }}",
        "result would be too large",
    ),
    "gigabytes by doubling": (
        (
            "{% set n = namespace(x='ab') %}"
            "{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
        ),
        "more than 256 MiB",
    ),
    "gigabytes in a list": ("{{ ([1] * 99999999) | list | length }}", "more than 256 MiB"),
    "an unknown filter": ("{{ messages | nothing }}", "nothing"),
    "a syntax error": ("{% for x in %}", "cannot be read"),
    "an undefined name": ("{{ nobody.home.at_all }}", "undefined"),
    "the file system": ("{% include '/etc/passwd' %}", "template not found"),
    "python's internals": ("{{ ''.__class__.__mro__ }}", "undefined"),
    "too long": ("x" * (2**20 + 1), "at most 1048576"),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_a_hostile_template_ends_in_an_error(tiny_model: llamactor.Model, case: str) -> None:
    template, cause = HOSTILE[case]
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(llamactor.ChatTemplateError, match=cause):
            await render(tiny_model, [USER], template=template)


async def test_a_template_that_took_too_much_memory_is_not_run_again(
    tiny_model: llamactor.Model,
) -> None:
    template, cause = HOSTILE["gigabytes by doubling"]
    for _ in range(3):
        with pytest.raises(llamactor.ChatTemplateError, match=cause):
            await render(tiny_model, [USER], template=template)
    assert (await render(tiny_model, [USER])).text


APPENDS = (
    "{% set parts = [] %}{% for m in messages %}{% set _ = parts.append(m.content) %}{% endfor %}"
    "<|im_start|>{{ parts | join('|') }}<|im_end|>"
)


async def test_what_only_llama_cpp_can_render_is_tried_elsewhere_and_then_rendered(
    tiny_model: llamactor.Model,
) -> None:
    """And what contents say is as safe there."""
    messages = [{"role": "user", "content": hostile(tiny_model)}, ANSWER]
    for _ in range(2):
        rendered = await render(tiny_model, messages, template=APPENDS)
        text = f"<|im_start|>{messages[0]['content']}|{ANSWER['content']}<|im_end|>"
        assert rendered.text == text
        assert len(controls_among(tiny_model, rendered.tokens)) == 2


async def test_a_template_that_hangs_llama_cpp_hangs_no_caller(
    tiny_model: llamactor.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamactor.chat.template._TRIAL_SECONDS", 0.5)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(llamactor.ChatTemplateError, match="append"):
        await render(tiny_model, [USER], template="{{ [].append(1) }}" + endless)


async def test_a_trial_that_is_cancelled_leaves_no_process(
    tiny_model: llamactor.Model,
) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await render(tiny_model, [USER], template="{{ [].append(2) }}" + endless)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


async def test_a_cancelled_rendering_leaves_the_model_usable(tiny_model: llamactor.Model) -> None:
    slow = HOSTILE["an endless loop"][0]
    task = asyncio.create_task(render(tiny_model, [USER], template=slow))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await render(tiny_model, [USER])).text


async def test_a_closed_model_renders_nothing(tiny_model_path: Path) -> None:
    async with llamactor.load_model(tiny_model_path, vocab_only=True) as model:
        pass
    with pytest.raises(llamactor.ClosedError):
        await model.apply_chat_template([USER])


# --- what llama.cpp knows of a format -----------------------------------------------------------


async def format_of(
    model: llamactor.Model, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Prompt, grammar, triggers, tags and parser."""
    hub = hub_for(asyncio.get_running_loop())
    chat: dict[str, Any] = {
        "template": None,
        "messages": messages,
        "turns": [],
        "tools": tools,
        "kwargs": {},
        "add_generation_prompt": True,
        "open_ended": False,
    }
    request = {
        "chat": chat,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "json_schema": "",
    }
    call = model._native.chat_format(hub.native, msgspec.json.encode(request))
    found: dict[str, Any] = msgspec.json.decode(await finish(hub, call))
    return found


def parsed(form: dict[str, Any], text: str, *, partial: bool = False) -> dict[str, Any]:
    """The message that an answer is."""
    names = ("format_id", "generation_prompt", "parser")
    request = {name: form[name] for name in names} | {
        "text": text,
        "is_partial": partial,
        "parse_tool_calls": True,
    }
    found: dict[str, Any] = msgspec.json.decode(
        _core.parse_chat_answer(msgspec.json.encode(request))
    )
    return found


ANSWERS = {
    "qwen3": '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": '
    '{"city": "Oslo"}}\n</tool_call>',
    "qwen2.5": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "mistral": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}, '
    '"id": "abcdefgh1"}]',
    "gpt-oss": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.get_weather"
    '<|channel|>commentary json<|message|>{"city": "Oslo"}',
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_calls_of_tools_are_read_from_answers_whole_and_in_part(
    family_files: dict[str, Path], name: str
) -> None:
    async with llamactor.load_model(family_files[name], vocab_only=True) as model:
        form = await format_of(model, [USER], TOOLS)
        assert form["grammar"]
        assert form["grammar_lazy"]
        assert form["triggers"]
        message = parsed(form, ANSWERS[name])
        [call] = message["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
        if "hm" in ANSWERS[name]:
            assert message["reasoning_content"].strip() == "hm"
        for cut in range(0, len(ANSWERS[name]), 7):
            assert parsed(form, ANSWERS[name][:cut], partial=True)["role"] == "assistant"


async def test_the_prompt_of_llama_cpp_is_ours(family_files: dict[str, Path]) -> None:
    async with llamactor.load_model(family_files["qwen3"], vocab_only=True) as model:
        form = await format_of(model, [SYSTEM, USER], [])
        assert form["prompt"] == (await render(model, [SYSTEM, USER])).text


async def test_an_answer_that_nests_too_deeply_is_refused(family_files: dict[str, Path]) -> None:
    async with llamactor.load_model(family_files["qwen3"], vocab_only=True) as model:
        form = await format_of(model, [USER], TOOLS)
        deep = '<tool_call>\n{"name": "get_weather", "arguments": ' + '{"a":' * 100_000
        with pytest.raises(ValueError, match="nests more than 256"):
            parsed(form, deep)
