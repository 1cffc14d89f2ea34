"""A real sidecar process and a plain, synchronous way to talk to it, line by line."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

COMMAND = str(Path(sys.executable).parent / "mlx-sidecar")
PATIENCE_SECONDS = 60.0

Json = dict[str, Any]


class Wire:
    """Spawns `mlx-sidecar serve`, writes requests and reads answers. Every stdout line must be JSON."""

    def __init__(self, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [COMMAND, "serve", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | dict(env or {}),
        )
        self.stderr = bytearray()
        self._frames: queue.Queue[bytes | None] = queue.Queue()
        self._aside: list[Json] = []
        self._last_id = 0
        self._threads = [threading.Thread(target=target) for target in (self._read, self._read_log)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()

    def initialize(self) -> Json:
        """Open the connection and return the result."""
        return self.result("initialize", protocolVersion=1)

    def write(self, data: bytes) -> None:
        """Write raw bytes."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def send(self, method: str, **params: Any) -> int:
        """Send a request and return its id."""
        self._last_id += 1
        self.write(_line({"jsonrpc": "2.0", "id": self._last_id, "method": method, "params": params}))
        return self._last_id

    def notify(self, method: str, **params: Any) -> None:
        """Send a notification."""
        self.write(_line({"jsonrpc": "2.0", "method": method, "params": params}))

    def read(self) -> Json:
        """Return the next frame; fail if the server ends or says nothing for a minute."""
        frame = self._frames.get(timeout=PATIENCE_SECONDS)
        assert frame is not None, f"the server ended: {self.stderr.decode(errors='replace')[-2000:]}"
        message: Json = json.loads(frame)
        assert message["jsonrpc"] == "2.0"
        return message

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

    def end_input(self) -> None:
        """Close the server's stdin."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def rest(self) -> list[Json]:
        """Return what had been put aside and everything else that comes, up to the end of the process."""
        messages, self._aside = self._aside, []
        while (frame := self._frames.get(timeout=PATIENCE_SECONDS)) is not None:
            messages.append(json.loads(frame))
        return messages

    def wait(self) -> int:
        """Wait for the end of the process and return its exit code."""
        code = self.process.wait(PATIENCE_SECONDS)
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in iter(self.process.stdout.readline, b""):
            self._frames.put(line)
        self._frames.put(None)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        while chunk := os.read(self.process.stderr.fileno(), 65536):
            self.stderr += chunk


def _line(message: Json) -> bytes:
    return json.dumps(message).encode() + b"\n"
