"""A hub on this machine: the endpoints that downloads use, and failures when they are asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from tests.conftest import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubFile:
    """A file of a repository, and how the hub fails with it."""

    def __init__(self, content: bytes, *, large: bool = True) -> None:
        self.content = content
        self.large = large
        """Kept by its SHA-256, as large files are; others by what git calls them."""
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.announced = len(content)
        """Length that the repository's listing says."""
        self.drops: list[int] = []
        """Bytes after which the next answers break off; -1 is none at all."""
        self.statuses: list[int] = []
        """Statuses of the next answers."""
        self.ranges = True
        """Whether parts of it can be asked for."""
        self.stalls: list[int] = []
        """Bytes after which the next answers wait for `Hub.release`."""
        self.requests: list[str] = []
        """The range of each request, "" where there was none."""
        self.sent = 0
        """Bytes that were sent of it."""


class Hub:
    """Repositories, by name, and the server that shows them."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, HubFile]] = {}
        self.license: str | None = None
        self.token: str | None = None
        """What a request must carry, if anything."""
        self.statuses: list[int] = []
        """Statuses of the next answers about repositories."""
        self.asked = 0
        """Answers about repositories."""
        self.stalled = threading.Event()
        """Set when an answer waits."""
        self.release = threading.Event()
        """Set to let it go on."""
        self.is_silent = False
        """Whether what is asked about repositories gets no answer until then."""
        self.storage: str | None = None
        """Address of another server that the files are on, if they are not here."""
        self.authorized: list[str | None] = []
        """What each request for a file carried."""

    def add(self, repo: str, name: str, content: bytes, *, large: bool = True) -> HubFile:
        file = HubFile(content, large=large)
        self.repositories.setdefault(repo, {})[name] = file
        return file

    def described(self, repo: str) -> dict[str, Any]:
        files = self.repositories[repo]
        siblings = [
            {
                "rfilename": name,
                "size": file.announced,
                "blobId": file.blob,
                **({"lfs": self._pointer(file)} if file.large else {}),
            }
            for name, file in files.items()
        ]
        card = {"license": self.license} if self.license else {}
        return {"id": repo, "sha": COMMIT, "siblings": siblings, "cardData": card, "tags": []}

    @staticmethod
    def _pointer(file: HubFile) -> dict[str, Any]:
        return {"sha256": file.sha256, "size": file.announced, "pointerSize": 134}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._refuse(401, "RepoNotFound")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._describe(found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send(found[1], found[3])
        else:
            self._refuse(404)

    def _refuse(self, status: int, code: str = "") -> None:
        body = b"{}"
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _redirect(self, address: str) -> None:
        self.send_response(302)
        self.send_header("Location", address)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _describe(self, repo: str, revision: str | None) -> None:
        self.hub.asked += 1
        if self.hub.is_silent:
            self.hub.stalled.set()
            self.hub.release.wait(PATIENCE)
        if self.hub.statuses:
            self._refuse(self.hub.statuses.pop(0))
        elif repo not in self.hub.repositories:
            self._refuse(404, "RepoNotFound")
        elif revision not in {None, "main", COMMIT}:
            self._refuse(404, "RevisionNotFound")
        else:
            body = json.dumps(self.hub.described(repo)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def _send(self, repo: str, name: str) -> None:
        self.hub.authorized.append(self.headers.get("Authorization"))
        if self.hub.storage is not None:
            return self._redirect(self.hub.storage + self.path)
        file = self.hub.repositories[repo][name]
        wanted = self.headers.get("Range", "")
        file.requests.append(wanted)
        if file.statuses:
            return self._refuse(file.statuses.pop(0))
        drop = file.drops.pop(0) if file.drops else None
        if drop == -1:
            self.close_connection = True
            return None
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted) if file.ranges else None
        first = int(found[1]) if found else 0
        last = int(found[2]) + 1 if found and found[2] else len(file.content)
        content = file.content[first:last]
        self.send_response(206 if found else 200)
        if found:
            end = first + len(content) - 1
            self.send_header("Content-Range", f"bytes {first}-{end}/{len(file.content)}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self._body(file, content, first, drop)
        return None

    def _body(self, file: HubFile, content: bytes, first: int, drop: int | None) -> None:
        if drop is not None:
            content, self.close_connection = content[: max(drop - first, 0)], True
        stop = max(file.stalls.pop(0) - first, 0) if file.stalls else len(content)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[:stop])
            self.wfile.flush()
            file.sent += len(content[:stop])
            if stop < len(content):
                self.hub.stalled.set()
                self.hub.release.wait(PATIENCE)
                self.wfile.write(content[stop:])
                file.sent += len(content[stop:])


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has hung up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def running(hub: Hub) -> Iterator[str]:
    """Serve a hub, and give its address."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
