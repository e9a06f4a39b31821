"""Reading, copying and checking files; everything here blocks, and can be told to stop."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from llamactor.errors import ModelLoadError, ModelNotFoundError
from llamactor.store.header import read_header
from llamactor.store.records import DownloadProgress, ModelFile

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from llamactor.store.records import ReportProgress, StoredModel
    from llamactor.store.threads import Stop

CHUNK: Final = 1 << 20
"""Bytes that are read at once."""
GIVEN_UP: Final = 3600.0
"""Seconds without a byte after which a copy counts as given up."""
PARTIAL_IMPORT: Final = ".import-"
"""What the name of a folder begins with while it is copied into."""


class Reporter:
    """Tells the event loop how far a thread is, no faster than the loop can hear it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, progress: ReportProgress | None, total: int
    ) -> None:
        """Report what is done of `total` bytes to `progress`, if there is one."""
        self._loop = loop
        self._progress = progress
        self._total = total
        self.done = 0
        """Bytes that are done."""
        self._file = ""
        self._scheduled = False

    def begin(self, file: str) -> None:
        """Say which file is at work."""
        self._file = file
        self.advance(0)

    def advance(self, count: int) -> None:
        """Add bytes to what is done; a negative count takes some back."""
        self.done += count
        if self._progress is not None and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._tell)

    def go_back(self, done: int) -> None:
        """Begin again where no more than `done` bytes were done."""
        if self.done > done:
            self.advance(done - self.done)

    def _tell(self) -> None:
        self._scheduled = False  # first, so that nothing that comes now is lost
        assert self._progress is not None
        self._progress(DownloadProgress(self._file, self.done, self._total))


def total_size(paths: Sequence[Path]) -> int:
    """Return the bytes of all files."""
    return sum(path.stat().st_size for path in paths)


def checksums(paths: Sequence[Path], stop: Stop, reporter: Reporter) -> tuple[ModelFile, ...]:
    """Return the files with their sizes and SHA-256."""
    return tuple(_checksum(path, stop, reporter) for path in paths)


def _checksum(
    path: Path, stop: Stop, reporter: Reporter, copy: BinaryIO | None = None
) -> ModelFile:
    digest = hashlib.sha256()
    size = 0
    reporter.begin(path.name)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            stop.check()
            digest.update(chunk)
            if copy is not None:
                copy.write(chunk)
            size += len(chunk)
            reporter.advance(len(chunk))
    return ModelFile(path, size, digest.hexdigest())


def copy_in(
    paths: Sequence[Path], folder: Path, stop: Stop, reporter: Reporter
) -> tuple[ModelFile, ...]:
    """Copy files into a folder named by their content, and return the copies.

    Another process may remove them before they are recorded.
    """
    with _temporary(folder) as name:
        copies = [_copy(path, Path(name), stop, reporter) for path in paths]
        stop.check()
        content = "".join(str(copy.sha256) for copy in copies)
        place = folder / hashlib.sha256(content.encode()).hexdigest()[:16]
        _put(Path(name), place)
    return tuple(ModelFile(place / copy.path.name, copy.size_bytes, copy.sha256) for copy in copies)


def _put(folder: Path, place: Path) -> None:
    """Give a folder its name; what has that already may be damaged, or lack some of its files."""
    try:
        folder.rename(place)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        with contextlib.suppress(FileNotFoundError):  # it was removed just now
            for path in folder.iterdir():
                path.replace(place / path.name)


def _temporary(folder: Path) -> tempfile.TemporaryDirectory[str]:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # it was empty, and another process removed it
            return tempfile.TemporaryDirectory(prefix=PARTIAL_IMPORT, dir=folder)


def _copy(source: Path, folder: Path, stop: Stop, reporter: Reporter) -> ModelFile:
    with (folder / source.name).open("xb") as copy:
        copied = _checksum(source, stop, reporter, copy)
        copy.flush()
        os.fsync(copy.fileno())
    return copied


def examine(
    model: StoredModel, stop: Stop, reporter: Reporter
) -> tuple[str | None, tuple[ModelFile, ...]]:
    """Compare a model's files with its record: sizes, header and checksums, cheapest first.

    Returns:
        What is wrong, if anything, and the files with the checksums that are known now.
    """
    for file in model.files:
        if problem := _size_problem(file):
            return problem, model.files
    try:
        header = read_header(model.path)
    except (ModelLoadError, ModelNotFoundError) as error:
        return str(error), model.files
    for field in ("architecture", "quantization", "train_context_size", "parameters"):
        found, recorded = getattr(header, field), getattr(model, field)
        if found != recorded:
            return f"{model.path} has {field} {found!r}, {recorded!r} is recorded", model.files
    try:
        found_files = checksums([file.path for file in model.files], stop, reporter)
    except FileNotFoundError as error:  # removed just now
        return f"{error.filename} is missing", model.files
    for file, known in zip(found_files, model.files, strict=True):
        if known.sha256 is not None and file.sha256 != known.sha256:
            return f"{file.path} has SHA-256 {file.sha256}, not {known.sha256}", model.files
    return None, found_files


def stamps(model: StoredModel) -> list[tuple[int, int, int] | None]:
    """Return what tells whether a model's files were written or replaced; None is a missing one."""
    return [_stamp(file.path) for file in model.files]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _size_problem(file: ModelFile) -> str | None:
    try:
        found = file.path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"{file.path} is missing"
    if not stat.S_ISREG(found.st_mode):
        return f"{file.path} is no file"
    if found.st_size != file.size_bytes:
        return f"{file.path} has {found.st_size} bytes, {file.size_bytes} are recorded"
    return None


def prune(folder: Path, partial: str, stop: Stop) -> int:
    """Delete partial downloads that nobody is writing, and copies that were given up.

    Returns:
        The bytes that they had.
    """
    freed = 0
    for place, folders, names in os.walk(folder):
        stop.check()
        partials = [Path(place, name) for name in names if name.endswith(partial)]
        copies = [Path(place, name) for name in folders if name.startswith(PARTIAL_IMPORT)]
        freed += sum(map(_delete_unlocked, partials)) + sum(map(_delete_given_up, copies))
    return freed


def _delete_unlocked(path: Path) -> int:
    # Whoever was writing it may finish at any moment, and another may begin anew.
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(file.fileno())
        if os.path.samestat(found, path.stat()):
            path.unlink()
            return found.st_size
    return 0


def _delete_given_up(copy: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # it was put in place just now
        own, *inside = [path.stat() for path in (copy, *copy.iterdir())]
        if max(found.st_mtime for found in (own, *inside)) < time.time() - GIVEN_UP:
            shutil.rmtree(copy, ignore_errors=True)
            return sum(found.st_size for found in inside)
    return 0
