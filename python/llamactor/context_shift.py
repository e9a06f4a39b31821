"""Strategies for what stays when a chat outgrows its context, for the ``overflow`` option.

session = model.chat(overflow=llamactor.context_shift.last_messages(8))
"""

from __future__ import annotations

from llamactor.chat.shift import (
    CustomStrategy,
    ShiftRequest,
    ShiftResult,
    Strategy,
    erase_oldest,
    last_messages,
    rolling_window,
    stop_at_limit,
    truncate_middle,
)

__all__ = (
    "CustomStrategy",
    "ShiftRequest",
    "ShiftResult",
    "Strategy",
    "erase_oldest",
    "last_messages",
    "rolling_window",
    "stop_at_limit",
    "truncate_middle",
)
