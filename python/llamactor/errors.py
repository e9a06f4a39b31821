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
    "InsufficientMemoryError",
    "LlamactorError",
    "LoadCancelledError",
    "ModelLoadError",
    "ModelNotFoundError",
    "ModelNotLoadedError",
    "PresetNotFoundError",
    "QueueFullError",
    "StateMismatchError",
    "StoreError",
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
