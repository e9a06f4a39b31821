"""Models that other programs have put on this machine; nothing is copied, and nothing is changed.

Everything here blocks on the file system, and reads names only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from llamactor.errors import ModelNotFoundError
from llamactor.store.packages import package_file
from llamactor.store.refs import DEFAULT_MODEL, DEFAULT_PACKAGE, is_model_name

if TYPE_CHECKING:
    from collections.abc import Iterator

LM_STUDIO_FOLDERS = ("~/.lmstudio/models", "~/.cache/lm-studio/models")
"""Where LM Studio keeps models, unless it was told otherwise: now, and before 0.3."""
OLLAMA_FOLDERS = ("~/.ollama/models", "/usr/share/ollama/.ollama/models")
"""Where Ollama keeps models: a user's own, and those of the service on Linux."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_OLLAMA_MODEL = "application/vnd.ollama.image.model"
_OLLAMA_OWN = ("registry.ollama.ai", "library")
"""The registry and the owner that Ollama leaves out of a name."""


class Found(msgspec.Struct, frozen=True):
    """A file that may be a model."""

    path: Path
    """Where it is."""
    source: str
    """What its record says of it."""
    name: str | None = None
    """What to call it; None is the name of the file."""
    sha256: str | None = None
    """Checksum of the file, where its place says it."""


def discover() -> Iterator[Found]:
    """Yield what is in the default model's package and in the folders of other programs."""
    yield from _default_package()
    yield from _readable(_hugging_face(_hub_cache()))
    for folder in LM_STUDIO_FOLDERS:
        yield from _readable(_lm_studio(Path(folder).expanduser()))
    own = os.environ.get("OLLAMA_MODELS")
    for folder in (own,) if own else OLLAMA_FOLDERS:
        yield from _readable(_ollama(Path(folder).expanduser()))


def _readable(found: Iterator[Found]) -> Iterator[Found]:
    """Yield what can be read: a folder of another user is nothing that was found."""
    with contextlib.suppress(OSError):
        yield from found


def _default_package() -> Iterator[Found]:
    try:
        path = package_file(DEFAULT_PACKAGE)
    except ModelNotFoundError:
        return
    yield Found(path, f"pkg:{DEFAULT_PACKAGE}", DEFAULT_MODEL)


def _hub_cache() -> Path:
    """Return where huggingface_hub keeps its files, as its documentation has it."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME")
    if cache is None and home is None:
        home = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(cache or f"{home}/hub").expanduser()


def _hugging_face(cache: Path) -> Iterator[Found]:
    """``models--OWNER--REPO/snapshots/COMMIT/FILE``, a link to a blob that its checksum names."""
    for folder in _folders(cache, "models--*--*"):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        newest: dict[str, Path] = {}
        for snapshot in sorted((folder / "snapshots").glob("*"), key=_modified):
            for path in snapshot.rglob("*.gguf"):
                if is_model_name(path.name) and path.is_file():
                    newest[path.relative_to(snapshot).as_posix()] = path
        for inside, path in sorted(newest.items()):
            # One step only: the blob may lead on to one that several caches share, and that has
            # another kind of hash for a name.
            blob = path.readlink().name if path.is_symlink() else ""
            checksum = blob if _SHA256.fullmatch(blob) else None
            yield Found(path, f"hf:{repo}/{inside}", sha256=checksum)


def _lm_studio(folder: Path) -> Iterator[Found]:
    """``OWNER/REPO/FILE``."""
    for path in sorted(folder.glob("*/*/*.gguf")):
        if is_model_name(path.name):
            yield Found(path, "lmstudio")


def _ollama(folder: Path) -> Iterator[Found]:
    """``manifests/REGISTRY/OWNER/MODEL/TAG`` names a blob by its checksum."""
    for manifest in sorted((folder / "manifests").glob("*/*/*/*")):
        checksum = _ollama_checksum(manifest)
        path = folder / "blobs" / f"sha256-{checksum}"
        if checksum is not None and path.is_file():
            model = _ollama_name(manifest)
            yield Found(path, f"ollama:{model}", model, checksum)


def _ollama_name(manifest: Path) -> str:
    """Return what Ollama calls a model: with the registry and the owner unless they are its own."""
    *names, tag = manifest.parts[-4:]
    for own in _OLLAMA_OWN:
        if names[0] == own:
            del names[0]
    return f"{'/'.join(names)}:{tag}"


def _ollama_checksum(manifest: Path) -> str | None:
    """Return the checksum of the weights that a manifest names."""
    try:
        layers = json.loads(manifest.read_bytes())["layers"]
        digests = [layer["digest"] for layer in layers if layer["mediaType"] == _OLLAMA_MODEL]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    checksum = digests[0].removeprefix("sha256:") if digests else ""
    return checksum if _SHA256.fullmatch(checksum) else None


def _folders(parent: Path, pattern: str) -> list[Path]:
    return [path for path in sorted(parent.glob(pattern)) if path.is_dir()]


def _modified(path: Path) -> float:
    return path.stat().st_mtime
