"""Every exception llamactor raises.

The tree, with the built-in class each one also derives from in parentheses::

    LlamactorError (Exception)
    ├── ModelLoadError                  the file is not a model, or cannot be loaded
    │   └── LoadCancelledError          the load was cancelled, nothing stays loaded
    ├── ModelNotFoundError (FileNotFoundError)
    ├── ModelNotLoadedError             a handle whose model is not loaded now
    ├── DownloadError (OSError)         a hub cannot be reached, refuses, or sends something else
    ├── ChecksumError (ValueError)      a file is not what its record or the hub says
    ├── StoreError (OSError)            the database of the store cannot be used
    ├── PresetNotFoundError (LookupError)
    ├── InsufficientMemoryError (MemoryError)
    ├── ContextOverflowError (ValueError)
    ├── ChatTemplateError (ValueError)  the chat template failed, or refuses the messages
    ├── ToolCallError                   a model's call was wrong, or denied; it is told so
    ├── ToolExecutionError              the handler of a tool failed, or took too long
    ├── SchemaValidationError (ValueError)   a text or value does not fit its schema
    ├── GrammarError (ValueError)       a grammar or schema is malformed, or cannot be kept to
    ├── DecodeError                     the evaluation itself failed
    ├── StateMismatchError (ValueError) a saved state of another model or layout
    ├── ClosedError                     the object, or what it lives in, was closed
    ├── BusyError                       nothing was free in time
    ├── QueueFullError                  too much is waiting already
    ├── DeadlineExceededError (TimeoutError)
    ├── UnsupportedError (NotImplementedError)   this model or device cannot
    └── WorkerCrashedError              a native thread ended unexpectedly

Messages say what was wrong, the value, the limit, and what would work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamactor.calls import ToolCall
    from llamactor.prediction import PredictionResult
    from llamactor.runtime.memory import MemoryPlan

__all__ = (
    "BusyError",
    "ChatTemplateError",
    "ChecksumError",
    "ClosedError",
    "ContextOverflowError",
    "DeadlineExceededError",
    "DecodeError",
    "DownloadError",
    "GrammarError",
    "InsufficientMemoryError",
    "LlamactorError",
    "LoadCancelledError",
    "ModelLoadError",
    "ModelNotFoundError",
    "ModelNotLoadedError",
    "PresetNotFoundError",
    "QueueFullError",
    "SchemaValidationError",
    "StateMismatchError",
    "StoreError",
    "ToolCallError",
    "ToolExecutionError",
    "UnsupportedError",
    "WorkerCrashedError",
)


class LlamactorError(Exception):
    """Base of all exceptions of this package."""

    partial: PredictionResult | None = None
    """What a failed prediction had produced, when the error came from one."""


class ModelLoadError(LlamactorError):
    """A file could not be loaded as a model."""


class LoadCancelledError(ModelLoadError):
    """A load was cancelled before its model was delivered; nothing stays loaded."""


class ModelNotFoundError(LlamactorError, FileNotFoundError):
    """A model reference leads to no file."""


class ModelNotLoadedError(LlamactorError):
    """A handle was used while no model is loaded under its name."""


class DownloadError(LlamactorError, OSError):
    """A hub cannot be reached, refuses, or does not send what it announced."""


class ChecksumError(LlamactorError, ValueError):
    """A file is not what its record or the hub says it is."""


class StoreError(LlamactorError, OSError):
    """The database of the store is damaged, of a newer version, or cannot be opened."""


class PresetNotFoundError(LlamactorError, LookupError):
    """There is no preset of this name."""


class InsufficientMemoryError(LlamactorError, MemoryError):
    """Memory for weights, cells or compute buffers could not be had."""

    plan: MemoryPlan | None = None
    """What a `Runtime` found that it would take, and what would fit instead."""


class ContextOverflowError(LlamactorError, ValueError):
    """A prompt cannot fit into the context even alone."""


class ChatTemplateError(LlamactorError, ValueError):
    """A chat template cannot be read, failed, or refuses these messages."""


class _CallError(LlamactorError):
    """Something went wrong with a call of a tool."""

    def __init__(self, message: str, call: ToolCall) -> None:
        """Say what is wrong with which call."""
        super().__init__(message, call)
        self.call = call
        """The call."""

    def __str__(self) -> str:
        """Return the message."""
        return str(self.args[0])


class ToolCallError(_CallError):
    """A model called a tool that is not there, with wrong arguments, or against the guard."""


class ToolExecutionError(_CallError):
    """The handler of a tool failed or took too long; `__cause__` is what it raised."""


class SchemaValidationError(LlamactorError, ValueError):
    """A text is no JSON, or what it says does not fit the schema or type that was asked for."""

    def __init__(
        self, message: str, path: tuple[str | int, ...] = (), value: object = None
    ) -> None:
        """Say what is wrong, where and with what."""
        super().__init__(message, path, value)
        self.message = message
        """What is wrong, without the place."""
        self.path = path
        """Where: keys and indices from the root; () is the root itself."""
        self.value = value
        """What is there; the text itself where that is no JSON."""

    def __str__(self) -> str:
        """Return place and message."""
        return f"{show_path(self.path)}: {self.message}" if self.path else self.message


def show_path(path: tuple[str | int, ...]) -> str:
    """Return a place in a document as ``$.items[3].name``."""
    parts = (f".{key}" if isinstance(key, str) else f"[{key}]" for key in path)
    return "$" + "".join(parts)


class GrammarError(LlamactorError, ValueError):
    """A grammar or a schema is malformed or too large, or no answer can keep to it."""


class DecodeError(LlamactorError):
    """llama.cpp failed to evaluate a batch."""


class StateMismatchError(LlamactorError, ValueError):
    """A saved state belongs to another model, layout or adapter."""


class ClosedError(LlamactorError):
    """The object, or the model or context it lives in, has been closed."""


class BusyError(LlamactorError):
    """Nothing was free within the time allowed."""


class QueueFullError(LlamactorError):
    """Too much work is waiting already."""


class DeadlineExceededError(LlamactorError, TimeoutError):
    """A prediction's deadline passed before it finished."""


class UnsupportedError(LlamactorError, NotImplementedError):
    """This model, kind of memory or device cannot do what was asked."""


class WorkerCrashedError(LlamactorError):
    """A native thread ended unexpectedly; the object it served is unusable."""
