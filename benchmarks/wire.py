"""What the wire carries and what it costs, with an engine that computes nothing (fake_server.py).

    make bench, or: .venv/bin/python benchmarks/wire.py [ROUNDS]

Notifications per second to Node clients, the round trip of `ping`, and what a reader that stops does to
another.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from socket import AF_UNIX, socket
from typing import Any

from report import publish

HERE = Path(__file__).parent
FAKE_SERVER = [sys.executable, str(HERE / "fake_server.py")]
MODEL = "smollm2-135m"
PACE = {"TOKENS_PER_SECOND": "200"}
"""With 32 streams 6400 tokens a second: more than one H200 gives to a model of three billion parameters."""

PAUSE_SECONDS = 10
STOPPED_STREAMS = 16


def measure_throughput(rounds: int) -> dict[str, list[float]]:
    """Return frames a second and processor time by client and number of streams."""
    figures: dict[str, list[float]] = {}
    for client, streams, tokens, ahead in (
        ("ours", 1, 30_000, 1),
        ("ours", 8, 10_000, 1),
        ("ours", 64, 2_000, 1),
        ("vscode", 64, 500, 1),
        ("ours", 1, 60_000, 64),
        ("ours", 8, 20_000, 64),
        ("ours", 64, 4_000, 64),
    ):
        # The first round compiles and connects; it is not counted.
        numbers = (str(streams), str(tokens), str(rounds + 1))
        steps = {"STEPS_AHEAD": str(ahead)}
        lines = _node("throughput", client, *FAKE_SERVER, *numbers, environment=steps)[1:]
        name = f"{client}, {streams} streams" + (f", up to {ahead} steps ahead" if ahead > 1 else "")
        figures[f"{name}: frames/s"] = [line["frames"] for line in lines]
        figures[f"{name}: tokens/s"] = [line["tokens"] for line in lines]
        figures[f"{name}: CPU us/token"] = [line["cpuMicroseconds"] for line in lines]
    return figures


def measure_ping(rounds: int) -> dict[str, list[float]]:
    """Return the round trip of `ping` in microseconds: alone and beside 32 streams, on stdio and a socket."""
    figures: dict[str, list[float]] = {}
    for streams in (0, 32):
        stdio = _node("ping", "stdio", *FAKE_SERVER, str(streams), "2000", str(rounds), environment=PACE)
        with _listening() as (path, _):
            over_socket = _node("ping", path, "-", "-", str(streams), "2000", str(rounds), environment={})
        for name, lines in (("stdio", stdio), ("socket", over_socket)):
            for figure in ("median", "p99", "worst"):
                figures[f"{name}, {streams} streams: {figure}"] = [line[figure] for line in lines]
    return figures


def measure_stopped_reader(rounds: int) -> dict[str, list[float]]:
    """Return what a stopped reader does to another's throughput, as a ratio, and to our memory, in MiB."""
    figures: dict[str, list[float]] = {"other's tokens, ratio": [], "growth of our memory, MiB": []}
    for _ in range(rounds):
        with _listening() as (path, process):
            stopped, other = _Client(path), _Client(path)
            other.call("load", model=MODEL)
            other.generate(4)
            threading.Thread(target=other.read_for_ever, daemon=True).start()
            before = other.tokens_within(PAUSE_SECONDS)
            resident = _resident_mib(process.pid)
            stopped.generate(STOPPED_STREAMS)
            during = other.tokens_within(PAUSE_SECONDS)
            figures["other's tokens, ratio"].append(during / before)
            figures["growth of our memory, MiB"].append(_resident_mib(process.pid) - resident)
    return figures


class _Client:
    """A plain client over a socket, which reads when it is told to."""

    def __init__(self, path: str) -> None:
        self._socket = socket(AF_UNIX)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._tokens = 0
        self.call("initialize", protocolVersion=1)

    def call(self, method: str, **params: Any) -> Any:
        self._send(0, method, params)
        return json.loads(self._lines.readline())

    def generate(self, streams: int) -> None:
        for stream in range(1, streams + 1):
            params = {"model": MODEL, "tokens": [1], "maxTokens": 2**30, "partialResultToken": stream}
            params["deduplicate"] = False
            self._send(stream, "generate", params)

    def read_for_ever(self) -> None:
        for line in self._lines:
            if (progress := json.loads(line).get("params")) is not None:
                self._tokens += len(progress["value"]["tokens"])

    def tokens_within(self, seconds: float) -> int:
        began = self._tokens
        time.sleep(seconds)
        return self._tokens - began

    def _send(self, request_id: int, method: str, params: dict[str, Any]) -> None:
        request = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}
        self._socket.sendall(json.dumps(request).encode() + b"\n")


@contextmanager
def _listening() -> "Generator[tuple[str, subprocess.Popen[bytes]]]":
    """Run a server on a socket in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/wire.sock"
        command = [*FAKE_SERVER, "serve", "--listen", path, "--log-level", "error"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | PACE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                yield path, process
            finally:
                process.terminate()


def _node(*arguments: str, environment: dict[str, str]) -> list[dict[str, float]]:
    done = subprocess.run(
        ["node", str(HERE / "node_wire.mjs"), *arguments],
        stdout=subprocess.PIPE,
        env=os.environ | environment,
        check=True,
        timeout=300,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def _resident_mib(process_id: int) -> float:
    pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Measure everything; the medians are over rounds."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    command = "benchmarks/wire.py"
    publish("wire_throughput", command, "see names", measure_throughput(rounds))
    publish("wire_ping", command, "us", measure_ping(rounds))
    publish("wire_stopped_reader", command, "see names", measure_stopped_reader(max(rounds // 2, 1)))


if __name__ == "__main__":
    main()
