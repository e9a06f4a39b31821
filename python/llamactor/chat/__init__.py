"""Chat sessions: messages, templates, context shifts, and the session that owns them."""

from __future__ import annotations

from llamactor.chat.messages import (
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

__all__ = (
    "AssistantMessage",
    "Message",
    "SystemMessage",
    "ToolCall",
    "ToolMessage",
    "UserMessage",
    "dump_history",
    "load_history",
    "to_messages",
)
