"""A real sidecar process and a plain, synchronous way to talk to it, message by message."""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from support.schema import Conversation

from mlx_sidecar.protocol.framing import Framing

COMMAND = str(Path(sys.executable).parent / "mlx-sidecar")
PATIENCE_SECONDS = 60.0

Json = dict[str, Any]


class Talk:
    """A client's side of one connection. Whatever is not asked for yet is kept for later.

    It says and hears lines; `framing` is what keeps them apart on the wire.
    """

    framing = Framing.NDJSON

    def __init__(self) -> None:
        self._aside: list[Json] = []
        self._last_id = 0
        self._conversation = Conversation()

    def write(self, data: bytes) -> None:
        """Write raw bytes; with headers, a message for each line."""
        self._conversation.said(data)
        if self.framing is Framing.LSP:
            data = b"".join(map(Framing.LSP.wrap, data.splitlines()))
        self._write(data)

    def _write(self, data: bytes) -> None:
        raise NotImplementedError

    def line(self) -> bytes | None:
        """Return the next line, waiting for it, or None at the end of what the server says."""
        raise NotImplementedError

    def _line_of(self, file: IO[bytes]) -> bytes | None:
        line = file.readline()
        if self.framing is Framing.LSP and line:
            assert file.readline() == b"\r\n"
            return file.read(int(line.removeprefix(b"Content-Length: ")))
        return line or None

    def initialize(self, **params: Any) -> Json:
        """Open the connection and return the result."""
        return self.result("initialize", protocolVersion=1, **params)

    def send(self, method: str, **params: Any) -> int:
        """Send a request and return its id."""
        self._last_id += 1
        self.write(lines({"id": self._last_id, "method": method, "params": params}))
        return self._last_id

    def notify(self, method: str, **params: Any) -> None:
        """Send a notification."""
        self.write(lines({"method": method, "params": params}))

    def read(self) -> Any:
        """Return the next frame; fail if the server says nothing for a minute, or nothing more."""
        line = self.line()
        assert line is not None, f"the server has ended: {self._last_words()}"
        return self._received(line)

    def response(self, request_id: int | str | None) -> Json:
        """Return the response to a request; other frames are kept for later."""
        for message in self._aside:
            if "method" not in message and message["id"] == request_id:
                self._aside.remove(message)
                return message
        while True:
            message = self.read()
            if "method" not in message and message["id"] == request_id:
                return message
            self._aside.append(message)

    def batch(self, *members: Any) -> list[Json]:
        """Send a batch and return the array that answers it; other frames are kept for later."""
        self.write(json.dumps(members).encode() + b"\n")
        while not isinstance(message := self.read(), list):
            self._aside.append(message)
        return cast(list[Json], message)

    def progress(self, token: int | str) -> list[Json]:
        """Return the progress values received so far for a token."""
        return [
            message["params"]["value"]
            for message in self._aside
            if message.get("method") == "$/progress" and message["params"]["token"] == token
        ]

    def call(self, method: str, **params: Any) -> Json:
        """Send a request and return its whole response."""
        return self.response(self.send(method, **params))

    def result(self, method: str, **params: Any) -> Any:
        """Send a request and return its result."""
        response = self.call(method, **params)
        assert "error" not in response, response
        return response["result"]

    def error(self, method: str, **params: Any) -> Json:
        """Send a request that must fail and return its error."""
        response = self.call(method, **params)
        assert "result" not in response, response
        return response["error"]

    def stats_when(self, condition: Callable[[Json], bool]) -> Json:
        """Ask for `stats` until they fulfil a condition, and return them."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition(stats := self.result("stats")):
            assert time.monotonic() < deadline, stats
        return stats

    def rest(self) -> list[Json]:
        """Return what had been put aside and everything else that comes, up to the end."""
        messages, self._aside = self._aside, []
        while (line := self.line()) is not None:
            messages.append(self._received(line))
        return messages

    def _received(self, line: bytes) -> Any:
        """Return what a line holds. Everything that a server says in any test passes here, and is checked."""
        message: Any = json.loads(line)
        self._conversation.heard(message)
        return message

    def _last_words(self) -> str:
        return "no more can be said"


class Sidecar:
    """A `mlx-sidecar serve` process. It is killed at the end of the block, if it still runs then."""

    def __init__(
        self,
        *arguments: str | Path,
        command: Sequence[str] = (COMMAND,),
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.process = subprocess.Popen(
            [*command, "serve", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | dict(env or {}),
        )
        self.stderr = bytearray()
        self.threads = [threading.Thread(target=self._read_log)]
        self.threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()

    def wait(self) -> int:
        """Wait for the end of the process and return its exit code."""
        code = self.process.wait(PATIENCE_SECONDS)
        for thread in self.threads:
            thread.join(PATIENCE_SECONDS)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
        return code

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        while chunk := os.read(self.process.stderr.fileno(), 65536):
            self.stderr += chunk


class Wire(Sidecar, Talk):
    """A server on stdin and stdout, and its host. Everything on stdout must be JSON."""

    def __init__(
        self,
        *arguments: str | Path,
        command: Sequence[str] = (COMMAND,),
        env: Mapping[str, str] | None = None,
        framing: Framing = Framing.NDJSON,
    ) -> None:
        super().__init__(*arguments, command=command, env=env)
        self.framing = framing
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self.threads.append(threading.Thread(target=self._read_lines))
        self.threads[-1].start()

    def _write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def line(self) -> bytes | None:
        """Return the next line of stdout."""
        return self._lines.get(timeout=PATIENCE_SECONDS)

    def end_input(self) -> None:
        """Close the server's stdin."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def _read_lines(self) -> None:
        assert self.process.stdout is not None
        while (line := self._line_of(self.process.stdout)) is not None:
            self._lines.put(line)
        self._lines.put(None)

    def _last_words(self) -> str:
        return self.stderr.decode(errors="replace")[-2000:]


class Guest(Talk):
    """A client on a connected socket. It reads when it is asked for something and at no other time."""

    def __init__(self, connected: socket.socket, framing: Framing = Framing.NDJSON) -> None:
        super().__init__()
        self.framing = framing
        connected.settimeout(PATIENCE_SECONDS)
        self.socket = connected
        self._file = connected.makefile("rb")

    @classmethod
    def at(cls, path: Path, framing: Framing = Framing.NDJSON) -> "Guest":
        """Return a client of the server that listens at `path`."""
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(str(path))
        return cls(connected, framing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        self.socket.sendall(data)

    def line(self) -> bytes | None:
        """Return the next line from the socket."""
        try:
            return self._line_of(self._file)
        except ConnectionResetError:
            return None  # What we had said was not read any more.

    def end_input(self) -> None:
        """Say that no more will be said; the other direction stays open."""
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Go away."""
        self._file.close()
        self.socket.close()


class Listening(Sidecar):
    """A server that listens at `path`; it serves by the time it is made."""

    def __init__(self, path: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        super().__init__("--listen", path, *arguments, env=env)
        self.path = path
        assert self.process.stdout is not None
        self.announcement = self.process.stdout.read()
        """All that the server ever wrote to stdout, which it has closed."""

    def connect(self, framing: Framing = Framing.NDJSON, **params: Any) -> Guest:
        """Return a client for which `initialize` has been answered."""
        guest = Guest.at(self.path, framing)
        guest.initialize(**params)
        return guest


def lines(*messages: Json) -> bytes:
    """Return messages as they stand on the wire, one a line."""
    return b"".join(json.dumps({"jsonrpc": "2.0"} | message).encode() + b"\n" for message in messages)
