"""`ping` while somebody holds the interpreter's lock, as a tokenizer that loads does for a while."""

import fcntl
import os
import shutil
import tempfile
import termios
import time
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from support.wire import PATIENCE_SECONDS, Listening, Talk, Wire, lines

from mlx_sidecar.protocol.framing import Framing

# Starts with the process. A PyDLL keeps the lock during a call; between two somebody else could take it.
HOLDER = """
import ctypes, os, sys, threading

def hold():
    system = ctypes.PyDLL(None).system
    hold, held = os.open(os.environ["HOLD"], os.O_RDONLY), os.open(os.environ["HELD"], os.O_WRONLY)
    while os.read(hold, 1):
        system(b'printf x > "$HELD"; dd bs=1 count=1 if="$HOLD" of=/dev/null 2> /dev/null')
        os.write(held, b"x")

if "serve" in sys.argv:
    threading.Thread(target=hold, daemon=True).start()
"""


class Lock:
    """The interpreter's lock of a server that was started with `environ`; held inside the block.

    Nothing in the server's Python happens there.
    """

    def __init__(self, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(HOLDER)
        for name in ("hold", "held"):
            os.mkfifo(folder / name)
        # Opened in both directions, because opening one end of a FIFO waits for the other.
        self._hold, self._held = (os.open(folder / name, os.O_RDWR) for name in ("hold", "held"))
        self.environ = {"PYTHONPATH": str(folder), "HOLD": str(folder / "hold"), "HELD": str(folder / "held")}

    def __enter__(self) -> Self:
        os.write(self._hold, b"x")
        assert os.read(self._held, 1) == b"x"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.write(self._hold, b"x")
        assert os.read(self._held, 1) == b"x"

    def close(self) -> None:
        os.close(self._hold)
        os.close(self._held)


@pytest.fixture
def lock() -> Generator[Lock]:
    folder = Path(tempfile.mkdtemp(prefix="mlx-", dir="/tmp"))
    lock = Lock(folder)
    yield lock
    lock.close()
    shutil.rmtree(folder)


@pytest.fixture(params=Framing)
def framing(request: pytest.FixtureRequest) -> Framing:
    return request.param


@pytest.fixture(params=["stdio", "socket"])
def talk(request: pytest.FixtureRequest, lock: Lock, socket_path: Path, framing: Framing) -> Generator[Talk]:
    if request.param == "stdio":
        with Wire(env=lock.environ, framing=framing) as wire:
            wire.initialize()
            wire.result("stats")  # The first answer may come before anybody reads on.
            yield wire
    else:
        with Listening(socket_path, env=lock.environ) as server, server.connect(framing) as guest:
            yield guest


def test_ping_is_answered_while_no_python_runs(talk: Talk, lock: Lock) -> None:
    with lock:
        for _ in range(3):
            assert talk.result("ping")["inFlight"] == 0
    pulse = talk.result("stats")["native"]["pulse"]
    assert pulse["active"]
    assert pulse["answered"] >= 3


def test_the_first_ping_is_answered_while_no_python_runs(lock: Lock, framing: Framing) -> None:
    with Wire(env=lock.environ, framing=framing) as wire:
        for _ in range(2):  # The second one is read by nobody but the pulse.
            say_nothing(wire)
        with lock:
            assert wire.result("ping")["state"] == "starting"
        wire.initialize()


def test_behind_a_first_ping_a_byte_order_mark_is_no_beginning() -> None:
    with Wire() as wire:
        wire.result("ping")
        wire.write(b"\xef\xbb\xbf" + lines({"id": 9, "method": "ping"}))
        assert wire.response(None)["error"]["data"]["kind"] == "parse_error"


def say_nothing(wire: Wire) -> None:
    """Return when the server has read a blank."""
    stdin = wire.process.stdin
    assert stdin is not None
    stdin.write(b"\n")
    stdin.flush()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while fcntl.ioctl(stdin, termios.FIONREAD, bytes(4)) != bytes(4):
        assert time.monotonic() < deadline


def test_ping_is_answered_behind_a_frame_that_python_could_not_finish(lock: Lock, socket_path: Path) -> None:
    with Listening(socket_path, env=lock.environ) as server, server.connect() as guest:
        long = [guest.send("rpc.discover") for _ in range(8)]  # It reads nothing yet.
        with lock:
            assert guest.result("ping")["inFlight"] == 0
        assert all(guest.response(request_id)["result"]["openrpc"] for request_id in long)


def test_ping_overtakes_requests_that_wait_for_python(talk: Talk, lock: Lock) -> None:
    with lock:
        waiting = talk.send("models")
        assert talk.result("ping")["inFlight"] == 0
    assert talk.response(waiting)["result"] == {"models": []}
    assert talk.result("stats")["native"]["pulse"]["overtook"] >= 1


def test_after_shutdown_nobody_answers_ping(talk: Talk, lock: Lock) -> None:
    talk.result("shutdown")
    with lock:
        ping = talk.send("ping")
    assert talk.response(ping)["error"]["data"]["kind"] == "shutting_down"


def test_a_shutdown_that_waits_for_python_is_not_overtaken(talk: Talk, lock: Lock) -> None:
    with lock:
        shutdown, ping = talk.send("shutdown"), talk.send("ping")
    assert talk.response(shutdown)["result"] is None
    assert talk.response(ping)["error"]["data"]["kind"] == "shutting_down"


def test_switched_off_ping_waits_for_python_and_is_answered(lock: Lock) -> None:
    with Wire(env=lock.environ | {"MLX_SIDECAR_PULSE": "off"}) as wire:
        wire.initialize()
        with lock:
            ping = wire.send("ping")
        assert wire.response(ping)["result"]["inFlight"] == 0
        assert wire.result("stats")["native"]["pulse"] == {
            "active": False,
            "reason": "switched off by MLX_SIDECAR_PULSE=off",
        }
