"""Chat sessions: messages, templates, context shifts, and the session that owns them."""

from __future__ import annotations

from llamactor.calls import ToolCall
from llamactor.chat.completion import CompletionEngine
from llamactor.chat.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolMessage,
    UserMessage,
    dump_history,
    load_history,
    to_messages,
)
from llamactor.chat.session import ChatSession
from llamactor.chat.shift import ShiftRequest, ShiftResult
from llamactor.chat.tools import Tool, tool
from llamactor.chat.turn import ChatUsage

__all__ = (
    "AssistantMessage",
    "ChatSession",
    "ChatUsage",
    "CompletionEngine",
    "Message",
    "ShiftRequest",
    "ShiftResult",
    "SystemMessage",
    "Tool",
    "ToolCall",
    "ToolMessage",
    "UserMessage",
    "dump_history",
    "load_history",
    "to_messages",
    "tool",
)
