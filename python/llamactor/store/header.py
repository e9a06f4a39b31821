"""What the header of a model's file says, without loading it."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import msgspec

from llamactor import _core
from llamactor.store.refs import part_names

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Capability: TypeAlias = Literal["chat", "completion", "embedding", "rerank", "vision", "tools"]

CAPABILITIES: Final[tuple[Capability, ...]] = (
    *("chat", "completion", "embedding"),
    *("rerank", "vision", "tools"),
)
"""All of them, in the order in which they are named."""

_FILE_TYPES: Final = (
    *("F32", "F16", "Q4_0", "Q4_1", "", "", "", "Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S"),
    *("Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS"),
    *("Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ3_M", "IQ2_S", "IQ2_M"),
    *("IQ4_XS", "IQ1_M", "BF16", "", "", "", "TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0"),
    "Q2_0",
)
"""`general.file_type` as numbered by `llama_ftype`, under the names that files carry."""

_RANK_POOLING: Final = 4
"""`LLAMA_POOLING_TYPE_RANK`"""
_TOOLS = re.compile(r"\btool(?:s|_calls?)\b")
_IMAGES = re.compile(r"""['"](?:image|image_url)['"]|<\|?(?:image|vision)""")


class TensorInfo(msgspec.Struct, frozen=True):
    """What a header says of one tensor."""

    name: str
    """Its name."""
    dimensions: tuple[int, ...]
    """Elements along each dimension, innermost first."""
    type: str
    """How its elements are stored, in ggml's words, such as ``q4_K``."""
    offset: int
    """Bytes from the start of the file's tensor data."""
    size_bytes: int
    """Bytes of its data."""
    part: int = 0
    """Which file of a split model it lies in, counted from 0."""


class ModelHeader(msgspec.Struct, frozen=True):
    """The checked header of a model's file, or of all files of a split model."""

    source: str
    """The path, or the reference to a file elsewhere."""
    version: int
    """Version of GGUF, 2 or 3."""
    metadata: dict[str, Any]
    """Keys and values of the first file.

    Arrays of up to 1,024 integers or truth values are lists; of all others there is a dict with
    their ``type`` and ``length``.
    """
    tensors: tuple[TensorInfo, ...]
    """In the order of the files."""
    sizes: tuple[int, ...]
    """Bytes of each file; one, unless the model is split."""
    has_projector: bool = False
    """Whether a vision projector lies beside it."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes)

    @property
    def architecture(self) -> str:
        """Such as ``llama``; empty where the file does not say."""
        return self._text("general.architecture") or ""

    @property
    def name(self) -> str | None:
        """What the file calls the model."""
        return self._text("general.name")

    @property
    def license(self) -> str | None:
        """Such as ``apache-2.0``."""
        return self._text("general.license")

    @property
    def chat_template(self) -> str | None:
        """Jinja text of the default chat template."""
        return self._text("tokenizer.chat_template")

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(tensor.dimensions) for tensor in self.tensors)

    @property
    def quantization(self) -> str:
        """As file names have it, such as ``Q4_K_M``; the commonest type where none is said."""
        number = self._number("general.file_type")
        if 0 <= number < len(_FILE_TYPES) and _FILE_TYPES[number]:
            return _FILE_TYPES[number]
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.type] += tensor.size_bytes
        return sizes.most_common(1)[0][0].upper() if sizes else ""

    @property
    def train_context_size(self) -> int:
        """Tokens that the model was trained with; 0 where the file does not say."""
        return max(self._number(f"{self.architecture}.context_length"), 0)

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the model is for, by its header, its template and what lies beside it."""
        found = self._tasks()
        if "completion" in found:
            template = self.chat_template or ""
            found |= {"chat"} if template else set()
            found |= {"tools"} if _TOOLS.search(template) else set()
            found |= {"vision"} if self.has_projector or _IMAGES.search(template) else set()
        return tuple(name for name in CAPABILITIES if name in found)

    def _tasks(self) -> set[Capability]:
        pooling = self._number(f"{self.architecture}.pooling_type")
        if pooling == _RANK_POOLING:
            return {"rerank"}
        causal = self.metadata.get(f"{self.architecture}.attention.causal", True)
        return {"embedding"} if pooling > 0 or not causal else {"completion"}

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) and value else None

    def _number(self, key: str) -> int:
        value = self.metadata.get(key)
        return value if isinstance(value, int) else -1


def read_header(path: Path) -> ModelHeader:
    """Return the header of a model's file, and of its other parts; blocks on the files.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelLoadError: It is no GGUF; the message says what is wrong.
    """
    files = [path.with_name(name) for name in part_names(path.name)]
    raw = [_core.read_gguf_header(str(file)) for file in files]
    return header_of(str(path), raw, has_projector=any(path.parent.glob("*mmproj*.gguf")))


def header_of(
    source: str, parts: Sequence[dict[str, Any]], *, has_projector: bool = False
) -> ModelHeader:
    """Return the header that the core has read of each part of a model."""
    first = parts[0]
    return ModelHeader(
        source=source,
        version=first["version"],
        metadata=first["metadata"],
        tensors=tuple(
            TensorInfo(name, dimensions, kind, offset, size, index)
            for index, part in enumerate(parts)
            for name, dimensions, kind, offset, size in part["tensors"]
        ),
        sizes=tuple(part["file_size"] for part in parts),
        has_projector=has_projector,
    )
