"""An asyncio actor runtime for local language models over llama.cpp.

async with llamactor.load_model("smollm2") as model:
    async for text in model.complete("Once upon a time", max_tokens=32):
        print(text, end="", flush=True)
"""

from __future__ import annotations

import atexit

from llamactor import _core
from llamactor import context_shift as context_shift
from llamactor.chat import (
    AssistantMessage,
    ChatSession,
    ChatUsage,
    CompletionEngine,
    Message,
    ShiftRequest,
    ShiftResult,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
    dump_history,
    load_history,
    to_messages,
)
from llamactor.context import Context, ContextStats
from llamactor.errors import (
    BusyError,
    ChatTemplateError,
    ClosedError,
    ContextOverflowError,
    DeadlineExceededError,
    DecodeError,
    InsufficientMemoryError,
    LlamactorError,
    LoadCancelledError,
    ModelLoadError,
    ModelNotFoundError,
    ModelNotLoadedError,
    QueueFullError,
    StateMismatchError,
    UnsupportedError,
    WorkerCrashedError,
)
from llamactor.loading import Loading, LoadProgress, load_model
from llamactor.model import Model, ModelInfo, SpecialTokens
from llamactor.options import (
    ContextOptions,
    Dry,
    DynamicTemperature,
    GenerationOptions,
    LoadOptions,
    Mirostat,
    RepeatPenalty,
    TokenBatching,
    Xtc,
)
from llamactor.prediction import (
    ContextShift,
    ContextShifted,
    Event,
    Finished,
    Prediction,
    PredictionResult,
    PredictionStats,
    PromptProgress,
    Segment,
    SegmentEnd,
    SegmentStart,
    StopReason,
    TextDelta,
    TokenLogprob,
)
from llamactor.runtime import (
    DeviceUsage,
    LoadedModel,
    LoadingModel,
    Memory,
    MemoryPlan,
    ModelHandle,
    Runtime,
    RuntimeStatus,
    StatusIterator,
)
from llamactor.sequence import ContextSequence, Sequence, SequenceUsage
from llamactor.system import Device, LogLevel, devices, set_log_level, system_info

__all__ = (
    "AssistantMessage",
    "BusyError",
    "ChatSession",
    "ChatTemplateError",
    "ChatUsage",
    "ClosedError",
    "CompletionEngine",
    "Context",
    "ContextOptions",
    "ContextOverflowError",
    "ContextSequence",
    "ContextShift",
    "ContextShifted",
    "ContextStats",
    "DeadlineExceededError",
    "DecodeError",
    "Device",
    "DeviceUsage",
    "Dry",
    "DynamicTemperature",
    "Event",
    "Finished",
    "GenerationOptions",
    "InsufficientMemoryError",
    "LlamactorError",
    "LoadCancelledError",
    "LoadOptions",
    "LoadProgress",
    "LoadedModel",
    "Loading",
    "LoadingModel",
    "LogLevel",
    "Memory",
    "MemoryPlan",
    "Message",
    "Mirostat",
    "Model",
    "ModelHandle",
    "ModelInfo",
    "ModelLoadError",
    "ModelNotFoundError",
    "ModelNotLoadedError",
    "Prediction",
    "PredictionResult",
    "PredictionStats",
    "PromptProgress",
    "QueueFullError",
    "RepeatPenalty",
    "Runtime",
    "RuntimeStatus",
    "Segment",
    "SegmentEnd",
    "SegmentStart",
    "Sequence",
    "SequenceUsage",
    "ShiftRequest",
    "ShiftResult",
    "SpecialTokens",
    "StateMismatchError",
    "StatusIterator",
    "StopReason",
    "SystemMessage",
    "TextDelta",
    "TokenBatching",
    "TokenLogprob",
    "ToolCall",
    "ToolMessage",
    "UnsupportedError",
    "UserMessage",
    "WorkerCrashedError",
    "Xtc",
    "devices",
    "dump_history",
    "load_history",
    "load_model",
    "set_log_level",
    "system_info",
    "to_messages",
)

_SHUTDOWN_TIMEOUT = 5.0
"""Seconds the native threads get at interpreter exit before they are left behind."""

atexit.register(_core.shutdown, _SHUTDOWN_TIMEOUT)
