"""Bytes over HTTP, into a file that a later call goes on with.

The downloader of `huggingface_hub` starts over whenever it is called again, and cannot be cancelled
while nothing arrives; so the bytes are streamed here, with its client, headers and errors. That
takes an event loop, which runs in the thread of the caller: everything here blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
from typing import TYPE_CHECKING, BinaryIO, Final, TypeVar

import msgspec

from llamactor import _core
from llamactor.errors import ChecksumError, DownloadError, ModelLoadError, ModelNotFoundError
from llamactor.store.files import CHUNK
from llamactor.store.records import ModelFile
from llamactor.store.threads import Stop, StoppedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Any, Self

    import httpx2

    from llamactor.store.files import Reporter

T = TypeVar("T")

RETRIES: Final = 5
"""Times that a request for bytes is made again while nothing arrives."""
ASKING_RETRIES: Final = 2
"""The same of a question; without a network the answer should not take long."""
FIRST_WAIT = 0.5
"""Seconds before the first of them; each further wait is twice as long."""
_PASSING: Final = frozenset((408, 425, 429, 500, 502, 503, 504))
"""Statuses that may be others in a moment."""
_LOCK_INTERVAL: Final = 0.1
"""Seconds between looks at a partial file that another process is writing."""


class Patience:
    """Counts failures in a row, and says how long to wait after one."""

    def __init__(self, what: str, retries: int = RETRIES) -> None:
        """Begin with none; `what` is named when there were too many."""
        self._what = what
        self._retries = retries
        self._failures = 0

    def progressed(self) -> None:
        """Something has arrived."""
        self._failures = 0

    def after(self, error: Exception) -> float:
        """Return the seconds to wait; raises the error if it will not pass, or came too often."""
        if not _is_passing(error):
            raise error
        self._failures += 1
        if self._failures > self._retries:
            raise DownloadError(
                f"{self._what}: gave up after {self._failures} attempts: {_said(error)}"
            ) from error
        wait: float = FIRST_WAIT * 2 ** (self._failures - 1)
        return wait


def _is_passing(error: Exception) -> bool:
    """Whether the next attempt may succeed."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING
    if isinstance(error, (httpx2.UnsupportedProtocol, httpx2.ProxyError)):
        return False
    return isinstance(error, (httpx2.TransportError, _ShortError))


class _ShortError(Exception):
    """A connection was ended in order, but before all had come."""


def _said(error: BaseException) -> str:
    return str(error).split("\n")[0].strip() or type(error).__name__


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise what `huggingface_hub` raises as errors of this package."""
    try:
        import httpx2
        from huggingface_hub import errors as hub
    except ImportError as error:
        raise DownloadError(
            f"{what}: downloads need huggingface_hub; pip install 'llamactor[hub]'"
        ) from error
    try:
        yield
    except hub.GatedRepoError as error:
        raise DownloadError(
            f"{what}: the repository is gated; accept its terms in a browser, then set HF_TOKEN "
            f"or run: hf auth login ({_said(error)})"
        ) from error
    except (
        hub.RepositoryNotFoundError,
        hub.RevisionNotFoundError,
        hub.EntryNotFoundError,
    ) as error:
        raise ModelNotFoundError(
            f"{what}: the hub has no such repository, revision or file; for a private one set "
            f"HF_TOKEN or run: hf auth login ({_said(error)})"
        ) from error
    except hub.HFValidationError as error:
        raise ModelNotFoundError(f"{what} names no repository: {_said(error)}") from error
    except hub.OfflineModeIsEnabled as error:
        raise DownloadError(f"{what}: HF_HUB_OFFLINE is set, and it is not here") from error
    except hub.HfHubHTTPError as error:
        raise DownloadError(f"{what}: the hub refuses: {_said(error)}") from error
    except httpx2.HTTPError as error:
        raise DownloadError(f"{what}: the hub cannot be reached: {_said(error)}") from error


class Source(msgspec.Struct, frozen=True):
    """Where the bytes of a file come from, and what they must be."""

    name: str
    """What messages call it."""
    url: str
    """Its address."""
    size_bytes: int
    """Its length."""
    sha256: str | None
    """Its checksum, if the hub has one."""
    blob: str | None
    """What git calls its content."""

    def start(self, count: int, stop: Stop) -> bytes:
        """Return the first `count` bytes, or all if there are fewer."""
        return _run(lambda: self._start(count), stop)

    async def _start(self, count: int) -> bytes:
        start = bytearray()
        patience = Patience(self.name)
        async with _client() as client:
            while True:
                try:
                    async with self._request(client, 0, count - 1) as response:
                        async for chunk in response.aiter_raw():
                            start += chunk
                            if len(start) >= count:
                                break
                except Exception as error:
                    await asyncio.sleep(patience.after(error))
                    start.clear()
                else:
                    return bytes(start[:count])

    async def pour(self, content: Content) -> None:
        """Add what is missing to a content."""
        patience = Patience(self.name)
        async with _client() as client:
            while content.size < self.size_bytes:
                before = content.size
                try:
                    await self._pour_once(client, content)
                except Exception as error:
                    if content.size > before:
                        patience.progressed()
                    await asyncio.sleep(patience.after(error))

    async def _pour_once(self, client: httpx2.AsyncClient, content: Content) -> None:
        async with self._request(client, content.size) as response:
            if response.status_code == 200:  # all of it, whatever was asked for
                content.restart()
            self._check_length(response, content.size)
            async for chunk in response.aiter_raw():
                content.write(chunk)
                if content.size > self.size_bytes:
                    raise self._wrong_length(content.size)
        if content.size < self.size_bytes:
            raise _ShortError(f"{content.size} of {self.size_bytes} bytes came")

    @contextlib.asynccontextmanager
    async def _request(
        self, client: httpx2.AsyncClient, first: int, last: int | None = None
    ) -> AsyncIterator[httpx2.Response]:
        from huggingface_hub import constants, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers = build_hf_headers(library_name="llamactor") | {"Accept-Encoding": "identity"}
        if first or last is not None:
            headers["Range"] = f"bytes={first}-{'' if last is None else last}"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # without a byte, a connection counts as lost
        async with client.stream("GET", self.url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield response

    def _check_length(self, response: httpx2.Response, done: int) -> None:
        """Refuse another file than the one that was announced before it is written."""
        length = response.headers.get("Content-Length")
        if length is not None and int(length) + done != self.size_bytes:
            raise self._wrong_length(int(length) + done)

    def _wrong_length(self, length: int) -> _WrongLengthError:
        return _WrongLengthError(
            f"{self.name} has {length} bytes, the hub announced {self.size_bytes}; "
            "try again later: the file may just have been replaced"
        )


class _WrongLengthError(DownloadError):
    """What comes is not what was announced."""


class Content:
    """What has arrived of a file, and its checksums."""

    def __init__(self, file: BinaryIO, source: Source, stop: Stop, reporter: Reporter) -> None:
        """Take what is in `file` already for the beginning; blocks while that is read."""
        self._file = file
        self._source = source
        self._reporter = reporter
        self._begin()
        file.seek(0)
        while chunk := file.read(CHUNK):
            stop.check()
            self._count(chunk)
        if self.size > source.size_bytes:
            self.restart()

    def _begin(self) -> None:
        self.size = 0
        self.sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % self._source.size_bytes, usedforsecurity=False)

    def _count(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.sha256.update(chunk)
        if self._source.sha256 is None:
            self._git.update(chunk)
        self._reporter.advance(len(chunk))

    def write(self, chunk: bytes) -> None:
        """Add what has come."""
        self._file.write(chunk)
        self._count(chunk)

    def restart(self) -> None:
        """Forget everything."""
        self._reporter.advance(-self.size)
        self._file.seek(0)
        self._file.truncate()
        self._begin()

    def check(self) -> None:
        """Raise `ChecksumError` if this is not what the hub has."""
        wanted = self._source.sha256 or self._source.blob
        found = (self.sha256 if self._source.sha256 else self._git).hexdigest()
        if wanted is not None and found != wanted:
            raise ChecksumError(
                f"{self._source.name} has come with the checksum {found}, the hub says {wanted}; "
                "nothing of it was kept; try again, and if it stays so, the hub's file is damaged"
            )


class Partial:
    """A file while it arrives: no other process writes it, and a later call goes on with it."""

    def __init__(self, path: Path, target: Path, source: Source, stop: Stop) -> None:
        """Open it with ``with``, which waits while another process writes it.

        Args:
            path: Where it is until all of it is here.
            target: What it becomes then.
            source: Where it comes from.
            stop: Ends the waiting.
        """
        self._path = path
        self._target = target
        self._source = source
        self._stop = stop
        self._sha256 = ""
        self._there = False

    def __enter__(self) -> Self:
        """Open and lock it; the lock goes with the process."""
        while True:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = self._path.open("a+b")
            except FileNotFoundError:  # another process has just removed the empty folder
                continue
            try:
                self._lock(file)
                if self._is(file):
                    self._file = file
                    return self
            except BaseException:
                file.close()
                raise
            file.close()  # another process was first, and has put it in place

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it, and with that let others write it."""
        self._file.close()

    def fill(self, reporter: Reporter) -> None:
        """Bring what is missing, and check all of it; what can never become right is removed."""
        try:
            self._fill(reporter)
        except (ChecksumError, ModelLoadError, _WrongLengthError):
            self._path.unlink()
            raise

    def _fill(self, reporter: Reporter) -> None:
        reporter.begin(self._target.name)
        self._there = self._is_there(reporter)
        if self._there:
            return
        content = Content(self._file, self._source, self._stop, reporter)
        self._check_space(self._source.size_bytes - content.size)
        _run(lambda: self._source.pour(content), self._stop)
        content.check()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._sha256 = content.sha256.hexdigest()
        _core.read_gguf_header(str(self._path))  # under this name, before it gets another

    def finish(self) -> ModelFile:
        """Give it its name, unless what has the name is the same."""
        if self._there:
            self._path.unlink()
        else:
            self._path.replace(self._target)
        return ModelFile(self._target, self._source.size_bytes, self._sha256)

    def _is_there(self, reporter: Reporter) -> bool:
        """Whether the target is what is wanted already, as after a kill or the loss of records."""
        try:
            file = self._target.open("rb")
        except FileNotFoundError:
            return False
        with file:
            if os.fstat(file.fileno()).st_size != self._source.size_bytes:
                return False
            content = Content(file, self._source, self._stop, reporter)
        try:
            content.check()
        except ChecksumError:
            reporter.advance(-content.size)
            return False
        self._sha256 = content.sha256.hexdigest()
        return True

    def _lock(self, file: BinaryIO) -> None:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._stop.wait(_LOCK_INTERVAL)
            else:
                return

    def _is(self, file: BinaryIO) -> bool:
        """Whether the path still leads to this file."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._path.parent).free
        if needed > free:
            raise DownloadError(
                f"{self._source.name} needs {needed} more bytes, {free} are free in "
                f"{self._path.parent}; make room, or set LLAMACTOR_MODELS_DIR to another disk"
            )


def _client() -> httpx2.AsyncClient:
    from huggingface_hub import get_async_session

    return get_async_session()


def _run(work: Callable[[], Coroutine[Any, Any, T]], stop: Stop) -> T:
    """Run a coroutine in this thread, and cancel it when the thread is to stop."""

    async def main() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        with stop.calling(lambda: loop.call_soon_threadsafe(task.cancel)):
            return await work()

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        raise StoppedError from None
