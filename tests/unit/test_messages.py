"""Messages: what dicts they are made from, what is refused and how, and their way through JSON."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamactor import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
    dump_history,
    load_history,
    to_messages,
)

TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=10)
INTEGERS = st.integers(-(2**63), 2**64 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | INTEGERS | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.builds(ToolCall, st.none() | TEXTS, NAMES, st.dictionaries(NAMES, JSON_VALUES))
TOKENS = st.lists(st.integers(0, 2**31 - 2), max_size=5).map(tuple)


@st.composite
def assistants(draw: st.DrawFn) -> AssistantMessage:
    tokens = draw(st.none() | TOKENS)
    return AssistantMessage(
        draw(TEXTS),
        draw(st.none() | TEXTS),
        tuple(draw(st.lists(CALLS, max_size=2))),
        tokens,
        draw(st.integers(0, len(tokens or ()))),
    )


MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(SystemMessage, TEXTS),
    st.builds(UserMessage, TEXTS),
    assistants(),
    st.builds(ToolMessage, TEXTS, st.none() | TEXTS, st.none() | TEXTS),
)
HISTORIES = st.lists(MESSAGES, max_size=6).map(tuple)


# --- JSON ---------------------------------------------------------------------------------------


@given(HISTORIES)
def test_a_history_comes_back_from_json_as_it_was(history: tuple[Message, ...]) -> None:
    assert load_history(dump_history(history)) == history


@given(HISTORIES)
def test_the_json_is_plain_for_other_readers(history: tuple[Message, ...]) -> None:
    value = json.loads(dump_history(history))
    assert value["version"] == 1
    assert [item["content"] for item in value["messages"] if "content" in item] == [
        message.content
        for message, item in zip(history, value["messages"], strict=True)
        if "content" in item
    ]


@given(HISTORIES)
def test_the_dict_of_a_message_makes_the_same_message(history: tuple[Message, ...]) -> None:
    assert to_messages([msgspec.to_builtins(message) for message in history]) == history


@given(st.binary(max_size=40))
def test_bytes_that_are_no_history_are_refused_as_such(data: bytes) -> None:
    with pytest.raises(ValueError, match="history"):
        load_history(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no history"),
        (b"[]", "version 1, this has None"),
        (b"{}", "version 1, this has None"),
        (b'{"version": 2, "messages": []}', "this has 2"),
        (b'{"version": true, "messages": []}', "this has True"),
        (b'{"version": 1}', 'a list "messages"'),
        (b'{"version": 1, "messages": {}}', 'a list "messages"'),
        (b'{"version": 1, "messages": [{"role": "user"}]}', r"messages\[0\].*content"),
        (b"[" * 100_000, "no history"),
        (b'"\xff"', "no history"),
    ],
)
def test_what_is_wrong_with_a_history_is_said(data: bytes, reason: str) -> None:
    with pytest.raises((ValueError, TypeError), match=reason):
        load_history(data)


def test_a_history_is_bytes_or_text() -> None:
    assert load_history('{"version": 1, "messages": []}') == ()
    with pytest.raises(TypeError, match="bytes or a str, not 3"):
        load_history(3)  # type: ignore[arg-type]


@given(HISTORIES, st.data())
def test_a_history_cut_short_is_refused(history: tuple[Message, ...], data: st.DataObject) -> None:
    whole = dump_history(history)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ValueError, match="history"):
        load_history(whole[:cut])


# --- dicts --------------------------------------------------------------------------------------


def test_messages_and_dicts_may_be_mixed() -> None:
    assert to_messages([SystemMessage("Be brief."), {"role": "user", "content": "Hi"}]) == (
        SystemMessage("Be brief."),
        UserMessage("Hi"),
    )


def test_a_generator_of_messages_is_read_once() -> None:
    assert to_messages(UserMessage(text) for text in "ab") == (UserMessage("a"), UserMessage("b"))


def test_an_answer_of_openai_s_interface_is_understood() -> None:
    answer = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "price", "arguments": '{"fruit": "apple", "n": [1, 2]}'},
            }
        ],
    }
    result = {"role": "tool", "content": "3 €", "tool_call_id": "call_1"}
    assert to_messages([answer, result]) == (
        AssistantMessage(
            tool_calls=(ToolCall("call_1", "price", {"fruit": "apple", "n": [1, 2]}),)
        ),
        ToolMessage("3 €", "call_1"),
    )


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert to_messages([{"role": "user", "content": parts}]) == (UserMessage("one two"),)


def test_a_developer_message_is_a_system_message() -> None:
    assert to_messages([{"role": "developer", "content": "x"}]) == (SystemMessage("x"),)


def test_reasoning_content_is_reasoning() -> None:
    given = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
    assert to_messages([given]) == (AssistantMessage("4", "2 + 2"),)


def test_a_tool_call_without_arguments_has_none() -> None:
    for call in ({"name": "now"}, {"name": "now", "arguments": ""}, {"name": "now", "id": None}):
        assert AssistantMessage(tool_calls=(call,)).tool_calls == (  # type: ignore[arg-type]
            ToolCall(None, "now", {}),
        )


@pytest.mark.parametrize(
    ("item", "error", "reason"),
    [
        (3, TypeError, "a message or a dict, not 3"),
        ("Hi", TypeError, "a message or a dict, not 'Hi'"),
        ({}, TypeError, "role must be one of 'system'.*not None"),
        ({"role": "usr", "content": ""}, ValueError, "role must be one of .*'user'.*not 'usr'"),
        ({"role": "user"}, TypeError, 'a user message needs "content"'),
        ({"role": "user", "content": None}, TypeError, 'needs "content"'),
        ({"role": "user", "content": 5}, TypeError, "content must be a str, not 5"),
        ({"role": "user", "content": "\ud800"}, ValueError, "lone surrogate"),
        ({"role": "user", "content": ["Hi"]}, TypeError, r"content\[0\] must be a text part"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            TypeError,
            r"content\[0\] must be a text part, not 'image_url'",
        ),
        ({"role": "user", "content": "", "tokns": [1]}, TypeError, "unknown field.*'tokns'"),
        ({"role": "user", "content": "", "tokens": [1]}, TypeError, "unknown field.*'tokens'"),
        ({"role": "assistant", "tokens": [-1]}, ValueError, r"tokens\[0\] .* not -1"),
        ({"role": "assistant", "tokens": "ab"}, TypeError, "tokens must be a list"),
        (
            {"role": "assistant", "tokens": [1], "content_start": 2},
            ValueError,
            "content_start must be between 0 and 1, not 2",
        ),
        ({"role": "assistant", "content_start": 1}, ValueError, "between 0 and 0, not 1"),
        ({"role": "assistant", "reasoning": 1}, TypeError, "reasoning must be a str"),
        ({"role": "assistant", "tool_calls": "f"}, TypeError, "tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": ["f"]}, TypeError, r"tool_calls\[0\] .* a dict"),
        ({"role": "assistant", "tool_calls": [{}]}, TypeError, r'tool_calls\[0\] needs the "name"'),
        ({"role": "tool", "content": "", "name": 1}, TypeError, "name must be a str"),
    ],
)
def test_what_is_wrong_with_a_message_is_said_with_its_index(
    item: Any, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=rf"(?s)^messages\[1\].*{reason}"):
        to_messages([UserMessage("fine"), item])


@pytest.mark.parametrize("items", ["Hi", b"Hi", {"role": "user", "content": "Hi"}, 3, None])
def test_messages_are_a_list(items: Any) -> None:
    with pytest.raises(TypeError, match="must be a list of messages or dicts"):
        to_messages(items)


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ("{", ValueError, "is no JSON"),
        ("[1]", TypeError, "a dict or a JSON object, not a list"),
        (3, TypeError, "not 3"),
        ({"x": {1}}, TypeError, r"arguments\['x'\] .* not a set"),
        ({"x": [1, float("nan")]}, ValueError, r"arguments\['x'\]\[1\] .* not nan"),
        ({"x": 2**64}, ValueError, r"arguments\['x'\]"),
        ({"x": "\udfff"}, ValueError, r"arguments\['x'\] has a lone surrogate"),
        ({1: 2}, TypeError, "arguments key must be a str"),
        ({"x": nested(100_000)}, ValueError, "nested too deeply"),
    ],
)
def test_arguments_that_json_cannot_say_are_refused(
    arguments: Any, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        ToolCall("1", "f", arguments)


# --- values -------------------------------------------------------------------------------------


def test_a_message_cannot_be_changed() -> None:
    message = UserMessage("Hi")
    with pytest.raises(AttributeError):
        message.content = "Ho"  # type: ignore[misc]


def test_arguments_are_a_copy() -> None:
    given: dict[str, Any] = {"list": [1]}
    call = ToolCall("1", "f", given)
    given["list"].append(2)
    assert call.arguments == {"list": [1]}


def test_messages_made_by_hand_are_checked_too() -> None:
    with pytest.raises(TypeError, match="content must be a str, not 5"):
        UserMessage(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name must not be empty"):
        ToolCall("1", "")
    assert AssistantMessage("x", tokens=[1, 2]).tokens == (1, 2)  # type: ignore[arg-type]
