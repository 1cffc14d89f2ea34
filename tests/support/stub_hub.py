"""A stand-in for the Hugging Face hub on the loopback interface, as far as a snapshot download needs one."""

import hashlib
import json
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

MAIN = "main"


@dataclass
class StubRepo:
    """A repository with one commit; every revision in `revisions` names that commit."""

    name: str
    files: dict[str, bytes]
    gated: bool = False
    revisions: set[str] = field(default_factory=lambda: {MAIN})

    @property
    def commit(self) -> str:
        """Return the commit id, which follows from the content as in git."""
        listing = sorted((path, _sha256(data)) for path, data in self.files.items())
        return hashlib.sha1(repr(listing).encode()).hexdigest()


class StubHub:
    """Serves repositories from memory, counts what was asked for, and can break a connection on request."""

    def __init__(self) -> None:
        self.repos: dict[str, StubRepo] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.linked_sizes: dict[str, int] = {}
        """What the hub claims of the size of some files, instead of the truth."""
        self.held = threading.Event()
        """Set once a download waits, where `hold` said."""
        self._holds: dict[str, int] = {}
        self._release = threading.Event()
        self._drops: dict[str, tuple[int, bool]] = {}
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        """Return what HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "StubHub":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Go off line: connections are refused from here on."""
        self.release()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def add(self, name: str, files: dict[str, bytes], *, gated: bool = False) -> StubRepo:
        """Publish a repository."""
        self.repos[name] = StubRepo(name, files, gated)
        return self.repos[name]

    def drop_once(self, path: str, after: int, *, reset: bool = False) -> None:
        """Break the next download of `path` after so many bytes: an early end, or a TCP reset."""
        self._drops[path] = (after, reset)

    def hold(self, path: str, after: int) -> None:
        """Let downloads of `path` wait after so many bytes, until `release`."""
        self._holds[path] = after
        self.held.clear()
        self._release.clear()

    def release(self) -> None:
        """Let what waits go on, and hold nothing any more."""
        self._holds.clear()
        self._release.set()

    def bytes_before_hold(self, path: str, start: int) -> int | None:
        """Return how many bytes a download that begins at `start` may send before it waits; None is all."""
        hold = self._holds.get(path)
        return None if hold is None else max(hold - start, 0)

    def wait(self) -> None:
        """Wait until whoever holds downloads lets them go on."""
        self.held.set()
        assert self._release.wait(60)

    def downloads(self) -> list[str]:
        """Return the paths whose content was sent, in whole or in part."""
        return [path.partition("/resolve/")[2].partition("/")[2] for path in self.resolved("GET")]

    def resolved(self, method: str) -> list[str]:
        """Return the file addresses that were asked for with this method."""
        return [path for verb, path in self.requests if verb == method and "/resolve/" in path]

    def note(self, method: str, path: str, span: str | None) -> None:
        """Remember a request."""
        with self._lock:
            self.requests.append((method, path))
            if span is not None:
                self.ranges.append(span)

    def take_drop(self, path: str) -> tuple[int, bool] | None:
        """Return where this download breaks, the first time that it is asked."""
        with self._lock:
            return self._drops.pop(path, None)


class _Handler(BaseHTTPRequestHandler):
    hub: StubHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ARG002
        return

    def _answer(self, *, with_body: bool) -> None:
        """Serve api/models/OWNER/NAME[/ACTION/REVISION...] and OWNER/NAME/resolve/REVISION/FILE."""
        path = unquote(urlsplit(self.path).path)
        self.hub.note(self.command, path, self.headers.get("Range"))
        api = path.startswith("/api/models/")
        owner, name, action, revision, *rest = [*path.removeprefix("/api/models").split("/")[1:], *[""] * 4]
        repo, file = self.hub.repos.get(f"{owner}/{name}"), "/".join(part for part in rest if part)
        if (refusal := self._refusal(repo, action, revision or MAIN)) is not None:
            self._send(refusal[0], {"X-Error-Code": refusal[1], "X-Error-Message": "so says the hub"}, 0)
            return
        assert repo is not None
        if action == "resolve" and file in repo.files:
            self._send_file(repo, file, with_body=with_body)
        elif api and action == "tree":
            self._send_json([_tree_entry(name, data) for name, data in repo.files.items()])
        elif api and action in ("", "revision"):
            siblings = [{"rfilename": name} for name in repo.files]
            self._send_json({"id": repo.name, "sha": repo.commit, "siblings": siblings, "tags": []})
        else:
            self._send(404, {"X-Error-Code": "EntryNotFound"}, 0)

    def _refusal(self, repo: StubRepo | None, action: str, revision: str) -> tuple[int, str] | None:
        """Return status and code. The hub tells no stranger whether a repository is missing or private."""
        known = "Authorization" in self.headers
        if repo is None:
            return (404 if known else 401), "RepoNotFound"
        if revision not in {*repo.revisions, repo.commit}:
            return 404, "RevisionNotFound"
        if action == "resolve" and repo.gated:
            return (403 if known else 401), "GatedRepo"
        return None

    def _send_file(self, repo: StubRepo, path: str, *, with_body: bool) -> None:
        data = repo.files[path]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{_sha256(data)}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if path in self.hub.linked_sizes:
            headers["X-Linked-Size"] = str(self.hub.linked_sizes[path])
        self._send(206 if "Range" in self.headers else 200, headers, len(data) - start)
        drop = self.hub.take_drop(path) if with_body else None
        if drop is not None:
            self._drop(data[start : drop[0]], reset=drop[1])
        elif with_body:
            self._write(path, data, start)

    def _write(self, path: str, data: bytes, start: int) -> None:
        # A client that is stopped meanwhile has gone away.
        with suppress(OSError):
            if (first := self.hub.bytes_before_hold(path, start)) is not None:
                self.wfile.write(data[start : start + first])
                self.wfile.flush()
                start += first
                self.hub.wait()
            self.wfile.write(data[start:])

    def _drop(self, data: bytes, *, reset: bool) -> None:
        self.wfile.write(data)
        self.wfile.flush()
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _send_json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self._send(200, {"Content-Type": "application/json"}, len(body))
        self.wfile.write(body)

    def _send(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _tree_entry(path: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
