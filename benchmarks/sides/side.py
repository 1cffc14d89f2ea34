"""The parent's end of a side: start it, ask it, end it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from .rounds import Answer, Ready, Request, Round

HERE = Path(__file__).parent
NODE_CLIENT = HERE.parents[1] / "clients/typescript/dist/esm/index.js"
PATIENCE_SECONDS = 600
# As on a user's machine: with this variable Python compiles our modules anew at every start.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


class SideError(Exception):
    """A side ended, or did not answer in time."""


class Side:
    """A process that answers rounds; it ends when the block is left."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        """Start the process and wait until it is ready.

        Raises:
            SideError: it ended instead; what it said is on stderr.
        """
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT | (environment or {}),
            # A group of its own, so that its server goes with it if it has to be killed.
            start_new_session=True,
        )
        self._owes_an_answer = True
        try:
            self.ready = msgspec.json.decode(self._line(), type=Ready)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, requests: Sequence[Request], how: str = "") -> list[Answer]:
        """Have it answer one round.

        Raises:
            SideError: it ended, or did not answer in time.
        """
        self._say(Round(list(requests), how))
        return msgspec.json.decode(self._line(), type=list[Answer])

    def stats(self) -> Any:
        """Return the `stats` document; of the sidecar only."""
        self._say(Round([], "stats"))
        return json.loads(self._line())

    def peak_memory_mib(self) -> float:
        """Return the most that the process with the model has held so far; Linux only."""
        status = Path(f"/proc/{self.ready.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024

    def forget_peak_memory(self) -> None:
        """Let the peak begin again at what it holds now; Linux only."""
        Path(f"/proc/{self.ready.pid}/clear_refs").write_text("5")

    def processor_seconds(self) -> float:
        """Return what all threads of the process with the model have computed so far; Linux only."""
        fields = Path(f"/proc/{self.ready.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """Let it end in order, or kill it in the middle of an answer."""
        assert self._process.stdin is not None
        if self._owes_an_answer:
            self._kill()
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()

    def _say(self, asked: Round) -> None:
        assert self._process.stdin is not None
        self._owes_an_answer = True
        self._process.stdin.write(msgspec.json.encode(asked) + b"\n")
        self._process.stdin.flush()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        with self._killed_when_late():
            line = self._process.stdout.readline()
        if not line:
            raise SideError(f"{self.name} has ended, or did not answer within {PATIENCE_SECONDS} s")
        self._owes_an_answer = False
        return line

    @contextmanager
    def _killed_when_late(self) -> Generator[None]:
        timer = threading.Timer(PATIENCE_SECONDS, self._kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def sidecar(
    model: Path, first: Request | None, dtype: str = "auto", environment: dict[str, str] | None = None
) -> Side:
    """Start our server and a client of it: the Node client, or the Python client where there is no Node."""
    command = [sys.executable, str(HERE / "sidecar_python.py")]
    if has_node():
        command = ["node", str(HERE / "sidecar_node.mjs"), sys.executable]
    return Side("sidecar", [*command, str(model), dtype, _argument(first)], environment)


def in_process(
    model: Path, first: Request | None, dtype: str = "stored", environment: dict[str, str] | None = None
) -> Side:
    """Start mlx-lm in a process of its own."""
    command = [sys.executable, str(HERE / "in_process.py"), str(model), dtype, _argument(first)]
    return Side("mlx-lm in process", command, environment)


def mlx_lm_server(model: Path, first: Request | None) -> Side:
    """Start `mlx_lm.server` and a client of it."""
    script = str(HERE / "http_server.py")
    return Side("mlx_lm.server", [sys.executable, script, str(model), _argument(first)])


def has_node() -> bool:
    """Return whether the Node client can run here."""
    return shutil.which("node") is not None and NODE_CLIENT.exists()


def _argument(first: Request | None) -> str:
    return msgspec.json.encode(first).decode() if first else ""
