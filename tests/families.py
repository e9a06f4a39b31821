"""Chat templates of real model families, and vocabularies with the control tokens they name.

The templates in ``tests/templates/`` follow the documented formats of their families. A family's
vocabulary is a generated one whose control tokens are those of the real one, so that a prompt cuts
at the same places.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.models import vocabulary_only

TEMPLATES = Path(__file__).parent / "templates"

_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
_MISTRAL = (
    *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
_GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_PHI3 = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_PHI4 = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")
_DEEPSEEK = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁calls▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>"),
    *("<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>"),
)
_COMMAND = (
    *("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    *("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_THINKING|>", "<|END_THINKING|>"),
    *("<|START_ACTION|>", "<|END_ACTION|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    *("<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
)
_GRANITE = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")
_GLM = (
    *("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    "<|observation|>",
)
_HARMONY = (
    *("<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
    *("<|constrain|>", "<|call|>"),
)


@dataclass(frozen=True, slots=True)
class Family:
    """A template and what its models are like."""

    name: str
    controls: tuple[str, ...]
    """Control tokens, the beginning of a text first."""
    eos: str
    """What ends a turn."""
    adds_bos: bool = False
    """Whether the vocabulary asks for the beginning-of-text token."""
    system: bool = True
    """Whether system messages are allowed."""
    tools: bool = False
    """Whether calls and results of tools are."""
    reasoning: str | None = None
    """What opens a thought."""

    @property
    def template(self) -> str:
        """The template's text, without the line break at the end of its file."""
        path = TEMPLATES / f"{self.name}.jinja"
        return path.read_text(encoding="utf-8").removesuffix("\n")

    @property
    def bos(self) -> str:
        """The beginning of a text."""
        return self.controls[0]

    def write(self, directory: Path) -> Path:
        """Write a file with the vocabulary and the template."""
        return vocabulary_only(
            directory / f"{self.name}.gguf",
            self.controls,
            bos=self.bos,
            eos=self.eos,
            adds_bos=self.adds_bos,
            template=self.template,
        )


FAMILIES = (
    Family("chatml", _CHATML, "<|im_end|>", tools=True),
    Family("llama2", ("<s>", "</s>"), "</s>", adds_bos=True),
    Family("llama3", _LLAMA3, "<|eot_id|>", adds_bos=True, tools=True),
    Family("mistral", _MISTRAL, "</s>", adds_bos=True, tools=True),
    Family("gemma2", _GEMMA, "<end_of_turn>", adds_bos=True, system=False),
    Family("gemma3", _GEMMA, "<end_of_turn>", adds_bos=True),
    Family("phi3", _PHI3, "<|end|>"),
    Family("phi4", _PHI4, "<|im_end|>"),
    Family("qwen2.5", _CHATML, "<|im_end|>", tools=True),
    Family("qwen3", _CHATML, "<|im_end|>", tools=True, reasoning="<think>"),
    Family("qwen3-coder", _CHATML, "<|im_end|>", tools=True),
    Family("hermes", _CHATML, "<|im_end|>", tools=True),
    Family("deepseek-r1", _DEEPSEEK, _DEEPSEEK[1], adds_bos=True, tools=True, reasoning="<think>"),
    Family("deepseek-v3.1", _DEEPSEEK, _DEEPSEEK[1], adds_bos=True, tools=True),
    Family("gpt-oss", _HARMONY, "<|return|>", tools=True, reasoning="<|channel|>analysis"),
    Family("command-r", _COMMAND, "<|END_OF_TURN_TOKEN|>", adds_bos=True),
    Family(
        "command-r7b",
        _COMMAND,
        "<|END_OF_TURN_TOKEN|>",
        adds_bos=True,
        tools=True,
        reasoning="<|START_THINKING|>",
    ),
    Family("granite", _GRANITE, "<|end_of_text|>", tools=True),
    Family("glm4", _GLM, "<|user|>", tools=True, reasoning="<think>"),
    Family("smollm3", _CHATML, "<|im_end|>", tools=True, reasoning="<think>"),
    Family("zephyr", ("<s>", "</s>"), "</s>", adds_bos=True),
    Family("olmo2", ("<|endoftext|>", "<|pad|>"), "<|endoftext|>"),
    Family("vicuna", ("<s>", "</s>"), "</s>", adds_bos=True),
)

SYSTEM = {"role": "system", "content": "You are brief. 🦙"}
USER = {"role": "user", "content": "What is 2 < 3 && \"x\"?\n\n\tΚαλημέρα, 世界 & '👩‍👩‍👧'"}
ANSWER = {"role": "assistant", "content": "It is true — «да»."}
AGAIN = {"role": "user", "content": "And then?"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "arguments": {"city": 'São "Paulo"\n', "days": 2, "exact": True, "unit": None},
            },
            "id": "abcdefgh1",
        }
    ],
}
RESULT = {
    "role": "tool",
    "content": '{"temperature": 21.5, "sky": "вётер"}',
    "name": "get_weather",
    "tool_call_id": "abcdefgh1",
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <now>, in a place & time.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name."},
                    "days": {"type": "integer", "default": 1},
                    "unit": {"type": "string", "enum": ["°C", "°F"]},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "The time.", "parameters": {}},
    },
]
