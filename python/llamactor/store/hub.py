"""Models of a hub: what is there, what a reference means, and getting it.

`huggingface_hub` knows addresses, tokens, proxies, offline mode and what errors mean. Everything
here blocks, in a thread that `threads.off_loop` has made.
"""

from __future__ import annotations

import contextlib
import difflib
from typing import TYPE_CHECKING, Final

import msgspec

from llamactor import _core
from llamactor.errors import DownloadError, ModelNotFoundError, UnsupportedError
from llamactor.store.header import ModelHeader, header_of
from llamactor.store.refs import HubRef, is_model_name, part_names, quantization_in, rank
from llamactor.store.transfer import ASKING_RETRIES, Partial, Patience, Source, translated

if TYPE_CHECKING:
    from pathlib import Path

    from huggingface_hub.hf_api import ModelInfo

    from llamactor.store.files import Reporter
    from llamactor.store.records import ModelFile
    from llamactor.store.threads import Stop

PARTIAL: Final = ".part"
"""What the name of a file ends with until all of it has arrived and was checked."""
LARGEST: Final = 50_000_000_000
"""Bytes of a file that the hub sends over HTTP at most."""
HEADER_START: Final = 1 << 20
"""Bytes that are asked for first when only a header is wanted."""


class HubFile(msgspec.Struct, frozen=True):
    """A file of a repository."""

    name: str
    """Its path inside the repository."""
    size_bytes: int
    """Its length."""
    sha256: str | None
    """Checksum of a large file."""
    blob: str | None
    """What git calls the content of a small one."""

    @property
    def key(self) -> str:
        """Tells this content from others of the same name."""
        return self.sha256 or self.blob or str(self.size_bytes)


class HubModel(msgspec.Struct, frozen=True):
    """A model of a repository, at one commit."""

    ref: HubRef
    """What it is, with its file."""
    commit: str
    """The commit."""
    files: tuple[HubFile, ...]
    """The first part first."""
    license: str | None
    """What the repository says."""

    @property
    def source(self) -> str:
        """What its record calls it."""
        return str(msgspec.structs.replace(self.ref, file=self.files[0].name, quantization=None))

    @property
    def folder(self) -> str:
        """Where it lies in a store."""
        return self.ref.repo + (f"@{self.ref.revision}" if self.ref.revision else "")

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    def source_of(self, file: HubFile) -> Source:
        """Return where the bytes of a file come from."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.ref.repo, file.name, revision=self.commit)
        name = f"{file.name} of hf:{self.ref.repo}"
        return Source(name, url, file.size_bytes, file.sha256, file.blob)


def find(ref: HubRef, stop: Stop) -> HubModel:
    """Ask the hub what a reference means now.

    Raises:
        ModelNotFoundError: There is no such repository or file.
        DownloadError: The hub cannot be reached or refuses.
    """
    with translated(str(ref)):
        from huggingface_hub import HfApi, constants

        api, timeout = HfApi(library_name="llamactor"), constants.DEFAULT_REQUEST_TIMEOUT
        patience = Patience(str(ref), ASKING_RETRIES)
        while True:
            try:
                info = api.model_info(
                    ref.repo, revision=ref.revision, files_metadata=True, timeout=timeout
                )
            except Exception as error:
                stop.wait(patience.after(error))
            else:
                return _described(ref, info)


def _described(ref: HubRef, info: ModelInfo) -> HubModel:
    files = {
        file.rfilename: HubFile(
            file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id
        )
        for file in info.siblings or ()
    }
    name = _choose(ref, [name for name in files if _is_inside(name)])
    folder, slash, base = name.rpartition("/")
    parts = [folder + slash + part for part in part_names(base)]
    missing = [part for part in parts if part not in files]
    if missing:
        raise ModelNotFoundError(f"{ref}: the repository lacks {', '.join(missing[:3])}")
    said = info.card_data.get("license") if info.card_data else None
    return HubModel(
        msgspec.structs.replace(ref, file=name, quantization=None),
        info.sha or ref.revision or "main",
        tuple(files[part] for part in parts),
        said if isinstance(said, str) else None,
    )


def _is_inside(name: str) -> bool:
    """Whether a path in a repository stays inside the folder that it is put into."""
    return not name.startswith("/") and ".." not in name.split("/")


def _choose(ref: HubRef, names: list[str]) -> str:
    """Return the file that a reference means, of all files of a repository."""
    models = sorted(filter(is_model_name, names), key=lambda name: (len(name), name))
    if ref.file is not None:
        if ref.file in names:
            return ref.file
        raise _not_in_repository(ref, ref.file, models)
    if ref.quantization is None:
        if models:
            return min(models, key=lambda name: rank(quantization_in(name)))
        raise ModelNotFoundError(
            f"{ref} holds no .gguf file; look for a repository whose name ends with -GGUF"
        )
    wanted = ref.quantization.lower()
    for fits in (
        lambda name: (quantization_in(name) or "").lower() == wanted,
        lambda name: name.removesuffix(".gguf").lower().endswith(wanted),
    ):
        found = next(filter(fits, models), None)
        if found is not None:
            return found
    raise _not_in_repository(
        ref, ref.quantization, [quantization_in(name) or name for name in models]
    )


def _not_in_repository(ref: HubRef, wanted: str, there: list[str]) -> ModelNotFoundError:
    near = difflib.get_close_matches(wanted, there, n=3, cutoff=0.5) or there[:8]
    hint = f"there are {', '.join(near)}" if near else "it holds no .gguf file"
    return ModelNotFoundError(f"{ref}: the repository has no {wanted}; {hint}")


def header(model: HubModel, stop: Stop) -> ModelHeader:
    """Read the header of a model that is not here, in ranges of its files.

    Raises:
        DownloadError: The hub cannot be reached or refuses.
        ModelLoadError: It is no GGUF.
    """
    with translated(str(model.ref)):
        raw = [_header_of_file(model, file, stop) for file in model.files]
    return header_of(str(model.ref), raw)


def _header_of_file(model: HubModel, file: HubFile, stop: Stop) -> dict[str, object]:
    source, count = model.source_of(file), HEADER_START
    while True:
        start = source.start(min(count, file.size_bytes), stop)
        found = _core.parse_gguf_header(start, file.size_bytes, f"{model.ref} ({file.name})")
        if found is not None:
            return found
        if len(start) < min(count, file.size_bytes):
            raise DownloadError(f"{file.name} of {model.ref}: the hub sent {len(start)} bytes only")
        count *= 4


def fetch(model: HubModel, folder: Path, stop: Stop, reporter: Reporter) -> tuple[ModelFile, ...]:
    """Bring all files of a model into a folder, under their names once all were checked.

    What a former call has left is gone on with; what this one leaves ends with ``.part``.

    Raises:
        DownloadError: The hub cannot be reached, refuses or sends another length.
        ChecksumError: What came has another checksum than the hub says; nothing of it stays.
        ModelLoadError: What came is no model; nothing of it stays.
        UnsupportedError: The hub does not send files that large.
    """
    for file in model.files:
        if file.size_bytes > LARGEST:
            raise UnsupportedError(
                f"{file.name} of {model.ref} has {file.size_bytes} bytes, the hub sends up to "
                f"{LARGEST} over HTTP; get it with: hf download; discover() finds it then"
            )
    with translated(str(model.ref)), contextlib.ExitStack() as stack:
        partials = [stack.enter_context(_begun(model, file, folder, stop)) for file in model.files]
        for partial in partials:
            partial.fill(reporter)
        # Only now, so that of a split model there are all parts or none.
        return tuple(partial.finish() for partial in partials)


def _begun(model: HubModel, file: HubFile, folder: Path, stop: Stop) -> Partial:
    """Return the partial file of a file, which is named after the content that it is to have."""
    path = folder / f"{file.name}.{file.key[:12]}{PARTIAL}"
    return Partial(path, folder / file.name, model.source_of(file), stop)
