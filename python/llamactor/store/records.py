"""What the store remembers of a model, and what it says of its work."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime  # noqa: TC003 -- msgspec reads it
from pathlib import Path  # noqa: TC003 -- msgspec reads it
from typing import Any, TypeAlias

import msgspec

from llamactor.store.header import Capability  # noqa: TC001 -- msgspec reads it


class ModelFile(msgspec.Struct, frozen=True):
    """One file of a model."""

    path: Path
    """Where it is."""
    size_bytes: int
    """Its length when it was recorded."""
    sha256: str | None = None
    """Checksum in hexadecimal; None until it was computed."""


class StoredModel(msgspec.Struct, frozen=True, kw_only=True):
    """What the store remembers of a model."""

    name: str
    """What `load_model`, `ModelStore.get` and `Runtime.load` call it; case does not matter."""
    path: Path
    """The file to load: the first part of a split model."""
    files: tuple[ModelFile, ...]
    """All its files, `path` first."""
    size_bytes: int
    """Bytes of all files."""
    architecture: str
    """Such as ``llama``."""
    quantization: str
    """Such as ``Q4_K_M``."""
    train_context_size: int
    """Tokens that it was trained with."""
    parameters: int
    """Elements of all tensors."""
    capabilities: tuple[Capability, ...]
    """What it is for, by header and template."""
    chat_template: str | None
    """Jinja text."""
    license: str | None
    """Such as ``apache-2.0``, where the file or the hub says it."""
    source: str
    """Where it came from.

    ``import``, ``hf:owner/repo/file.gguf``, ``pkg:name``, ``lmstudio`` or ``ollama:name:tag``, with
    the name that Ollama shows: ``tiny``, ``owner/tiny`` or ``hf.co/owner/repo``.
    """
    pulled_as: tuple[str, ...] = ()
    """Further ``hf:owner/repo/file.gguf`` that it was found to be when they were pulled."""
    owned: bool
    """Whether the files lie in the store, so that `ModelStore.remove` deletes them."""
    created: datetime
    """When it was recorded."""
    last_used: datetime | None = None
    """When it was last loaded or has last predicted."""
    usage_count: int = 0
    """How often it was loaded."""
    tokens_generated: int = 0
    """Tokens that it has generated, as far as `ModelStore.note_use` was told."""
    default_options: dict[str, dict[str, Any]] = {}
    """Options for ``load`` and for ``generation``, used where a call and its preset say nothing."""
    notes: str = ""
    """Anything."""
    quarantined: str | None = None
    """Why it is not loaded: what `ModelStore.verify` found."""

    @property
    def sha256(self) -> str | None:
        """Checksum of the first file; those of all are in `files`."""
        return self.files[0].sha256


class DownloadProgress(msgspec.Struct, frozen=True):
    """How far a download or a copy is."""

    file: str
    """Name of the file at work."""
    done_bytes: int
    """Bytes of all files that are here."""
    total_bytes: int
    """Bytes of all files."""

    @property
    def fraction(self) -> float:
        """Share that is done, 0 to 1; falls only if a file has to be sent or read again."""
        return self.done_bytes / self.total_bytes if self.total_bytes else 1.0


class Verification(msgspec.Struct, frozen=True):
    """What `ModelStore.verify` found."""

    name: str
    """The model."""
    problem: str | None
    """What is wrong with it; None if all is as recorded."""

    @property
    def ok(self) -> bool:
        """Whether all is as recorded."""
        return self.problem is None


ReportProgress: TypeAlias = Callable[[DownloadProgress], object]
"""Called in the event loop."""
