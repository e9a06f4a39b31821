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
    ChecksumError,
    ClosedError,
    ContextOverflowError,
    DeadlineExceededError,
    DecodeError,
    DownloadError,
    GrammarError,
    InsufficientMemoryError,
    LlamactorError,
    LoadCancelledError,
    ModelLoadError,
    ModelNotFoundError,
    ModelNotLoadedError,
    PresetNotFoundError,
    QueueFullError,
    SchemaValidationError,
    StateMismatchError,
    StoreError,
    UnsupportedError,
    WorkerCrashedError,
)
from llamactor.grammar import Grammar
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
from llamactor.presets import Preset, Presets
from llamactor.schema import (
    FunctionSchema,
    Schema,
    describe_schema,
    repair,
    schema_of,
    schema_of_function,
)
from llamactor.sequence import ContextSequence, Sequence, SequenceUsage
from llamactor.store import (
    DownloadProgress,
    ModelFile,
    ModelHeader,
    ModelStore,
    StoredModel,
    TensorInfo,
    Verification,
)
from llamactor.system import Device, LogLevel, devices, set_log_level, system_info

__all__ = (
    "AssistantMessage",
    "BusyError",
    "ChatSession",
    "ChatTemplateError",
    "ChatUsage",
    "ChecksumError",
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
    "DownloadError",
    "DownloadProgress",
    "Dry",
    "DynamicTemperature",
    "Event",
    "Finished",
    "FunctionSchema",
    "GenerationOptions",
    "Grammar",
    "GrammarError",
    "InsufficientMemoryError",
    "LlamactorError",
    "LoadCancelledError",
    "LoadOptions",
    "LoadProgress",
    "Loading",
    "LogLevel",
    "Message",
    "Mirostat",
    "Model",
    "ModelFile",
    "ModelHeader",
    "ModelInfo",
    "ModelLoadError",
    "ModelNotFoundError",
    "ModelNotLoadedError",
    "ModelStore",
    "Prediction",
    "PredictionResult",
    "PredictionStats",
    "Preset",
    "PresetNotFoundError",
    "Presets",
    "PromptProgress",
    "QueueFullError",
    "RepeatPenalty",
    "Schema",
    "SchemaValidationError",
    "Segment",
    "SegmentEnd",
    "SegmentStart",
    "Sequence",
    "SequenceUsage",
    "ShiftRequest",
    "ShiftResult",
    "SpecialTokens",
    "StateMismatchError",
    "StopReason",
    "StoreError",
    "StoredModel",
    "SystemMessage",
    "TensorInfo",
    "TextDelta",
    "TokenBatching",
    "TokenLogprob",
    "ToolCall",
    "ToolMessage",
    "UnsupportedError",
    "UserMessage",
    "Verification",
    "WorkerCrashedError",
    "Xtc",
    "describe_schema",
    "devices",
    "dump_history",
    "load_history",
    "load_model",
    "repair",
    "schema_of",
    "schema_of_function",
    "set_log_level",
    "system_info",
    "to_messages",
)

_SHUTDOWN_TIMEOUT = 5.0
"""Seconds the native threads get at interpreter exit before they are left behind."""

atexit.register(_core.shutdown, _SHUTDOWN_TIMEOUT)
