"""Temporary: ChatML only, until the templates are there."""

from __future__ import annotations
import asyncio
import msgspec


class RenderedChat(msgspec.Struct, frozen=True):
    text: str
    tokens: list[int]
    ends: list[int]
    reasoning: object = None
    stops: list[str] = []
    neutralised: bool = False


async def render_chat(
    model,
    template,
    messages,
    *,
    tools=(),
    add_generation_prompt=True,
    open_ended=False,
    kwargs=None,
):
    await asyncio.sleep(0)
    toks = []
    ends = []
    text = ""

    def t(s, special=True):
        return model.tokenize(s, False, special)

    for i, m in enumerate(messages):
        role = {
            "SystemMessage": "system",
            "UserMessage": "user",
            "AssistantMessage": "assistant",
            "ToolMessage": "tool",
        }[type(m).__name__]
        last = i == len(messages) - 1
        body = list(m.tokens) if getattr(m, "tokens", None) is not None else t(m.content, False)
        toks += t(f"<|im_start|>{role}\n") + body
        if not (last and open_ended):
            toks += t("<|im_end|>\n")
        ends.append(len(toks))
    if add_generation_prompt and not open_ended:
        toks += t("<|im_start|>assistant\n")
    return RenderedChat(text, toks, ends)
