"""Chat templates: rendered as Hugging Face renders them, and safe from what contents say."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest

import llamactor
from llamactor.chat.messages import to_messages
from llamactor.chat.template import RenderedChat, render_chat
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

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

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
    model: llamactor.Model, messages: Sequence[dict[str, Any]], **options: Any
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


async def test_a_template_without_thoughts_has_no_tags(family_files: dict[str, Path]) -> None:
    async with llamactor.load_model(family_files["llama2"], vocab_only=True) as model:
        assert (await render(model, [USER])).reasoning is None


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
    arguments = {"city": text, "days": 2, "exact": True, "unit": None}
    function = {"name": "get_weather", "arguments": arguments}
    call = {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "function": function}]}
    tool = {**TOOLS[0]["function"], "description": text}
    tools = [{"type": "function", "function": tool}, TOOLS[1]]
    rendered = await render(model, [USER, call, {**RESULT, "content": text}], tools=tools)
    assert controls_among(model, rendered.tokens) == controls_among(model, plain.tokens)
