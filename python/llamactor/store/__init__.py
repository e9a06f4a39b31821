"""Models on this machine: records, downloads, what other programs have, and checks."""

from __future__ import annotations

from llamactor.store.header import Capability, ModelHeader, TensorInfo
from llamactor.store.records import DownloadProgress, ModelFile, StoredModel, Verification
from llamactor.store.refs import DEFAULT_MODEL
from llamactor.store.store import ModelStore

__all__ = (
    "DEFAULT_MODEL",
    "Capability",
    "DownloadProgress",
    "ModelFile",
    "ModelHeader",
    "ModelStore",
    "StoredModel",
    "TensorInfo",
    "Verification",
)
