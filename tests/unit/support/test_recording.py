"""The recording that the tests of foreign clients rely on: it changes nothing, and it can fail."""

import json
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.recording import recorded

from mlx_sidecar.protocol.framing import Framing

PING = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'
GOOD: dict[str, Any] = {"state": "ready", "uptimeMs": 1, "inFlight": 0, "lastStepAgeMs": None}
BAD = GOOD | {"state": "tired"}

# What is asked is taken from stdin or a client, answered with ANSWER, and followed by an end of its own.
OVER_STDIO = """
import os, sys
os.read(0, 1000)
sys.stdout.write(sys.argv[1].replace("PID", str(os.getpid())))
sys.stdout.flush()
while os.read(0, 1000): pass
sys.exit(7)
"""
OVER_A_SOCKET = """
import json, os, socket, sys
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[-1])
listening.listen()
os.write(1, json.dumps({"event": "listening", "path": sys.argv[-1]}).encode())
os.close(1)
client, _ = listening.accept()
client.recv(1000)
client.sendall(sys.argv[1].encode())
while client.recv(1000): pass
sys.exit(7)
"""
OVER_A_PIPE = """
import socket, sys
host = socket.socket(socket.AF_UNIX)
host.connect(sys.argv[-1])
host.recv(1000)
host.sendall(sys.argv[1].encode())
while host.recv(1000): pass
sys.exit(7)
"""


def answer(result: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 1, "result": result}).encode()


def server(program: str, says: bytes) -> list[str]:
    return [sys.executable, "-c", program, says.decode()]


@pytest.mark.parametrize("framing", list(Framing))
def test_a_recorded_process_is_to_its_client_the_process_itself(framing: Framing, tmp_path: Path) -> None:
    says = framing.wrap(b'{"jsonrpc":"2.0","id":1,"result":' + json.dumps(GOOD).encode() + b"}")
    with recorded(tmp_path / "r", server(OVER_STDIO, says)) as program:
        done = subprocess.run([program], input=framing.wrap(PING), stdout=subprocess.PIPE, check=False)
    assert (done.stdout, done.returncode) == (says, 7)
    (said,) = (tmp_path / "r").glob("*.said")
    assert said.read_bytes() == framing.wrap(PING)


def test_its_process_id_is_the_servers(tmp_path: Path) -> None:
    says = Framing.NDJSON.wrap(b'{"jsonrpc":"2.0","id":PID,"result":null}')
    with (
        recorded(tmp_path / "r", server(OVER_STDIO, says)) as program,
        subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        told, _ = process.communicate(Framing.NDJSON.wrap(PING))
        assert json.loads(told)["id"] == process.pid


@pytest.mark.parametrize("framing", list(Framing))
@pytest.mark.parametrize(
    ("says", "problem"),
    [
        (answer(BAD), "'tired' is not one of"),
        (answer(GOOD | {"mood": "good"}), "'mood' was unexpected"),
        (answer(GOOD)[:-1], "Expecting ',' delimiter"),
        (b'{"id":1,"result":null}', "'jsonrpc' is a required property"),
        (b'{"jsonrpc":"2.0","method":"$/progress","params":{}}', "'token' is a required property"),
    ],
)
def test_what_the_schema_forbids_is_found_out(
    framing: Framing, says: bytes, problem: str, tmp_path: Path
) -> None:
    with (
        pytest.raises((AssertionError, json.JSONDecodeError), match=problem),
        recorded(tmp_path / "r", server(OVER_STDIO, framing.wrap(says))) as program,
    ):
        subprocess.run([program], input=framing.wrap(PING), stdout=subprocess.DEVNULL, check=False)


def test_a_frame_that_is_cut_off_is_found_out(tmp_path: Path) -> None:
    says = Framing.LSP.wrap(answer(GOOD))[:-1]
    with (
        pytest.raises(AssertionError, match="cannot be told apart"),
        recorded(tmp_path / "r", server(OVER_STDIO, says)) as program,
    ):
        subprocess.run([program], input=Framing.LSP.wrap(PING), stdout=subprocess.DEVNULL, check=False)


def test_a_recording_of_nothing_proves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="Nothing was said"),
        recorded(tmp_path / "r", server(OVER_STDIO, b"")) as program,
    ):
        subprocess.run([program], input=b"", stdout=subprocess.DEVNULL, check=False)


def test_connections_to_a_socket_are_recorded(socket_path: Path, tmp_path: Path) -> None:
    def converse_with(program: str) -> None:
        with subprocess.Popen([program, "--listen", socket_path], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert json.loads(process.stdout.read()) == {"event": "listening", "path": str(socket_path)}
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(socket_path))
                converse(client)
            assert process.wait(60) == 7

    with wrong_answer(tmp_path / "r", OVER_A_SOCKET) as program:
        converse_with(program)


def test_a_connection_to_a_listening_host_is_recorded(socket_path: Path, tmp_path: Path) -> None:
    def converse_with(program: str) -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(socket_path))
            listening.listen()
            with subprocess.Popen([program, "--pipe", socket_path]) as process:
                client, _ = listening.accept()
                with client:
                    converse(client)
                assert process.wait(60) == 7

    with wrong_answer(tmp_path / "r", OVER_A_PIPE) as program:
        converse_with(program)


@contextmanager
def wrong_answer(folder: Path, script: str) -> Generator[str]:
    """Yield a program that runs `script` with a wrong answer; the recording must tell."""
    command = server(script, Framing.NDJSON.wrap(answer(BAD)))
    with pytest.raises(AssertionError, match="'tired' is not one of"), recorded(folder, command) as program:
        yield program


def converse(client: socket.socket) -> None:
    """Ask the one question, and take the answer as it was given."""
    client.settimeout(60)
    client.sendall(Framing.NDJSON.wrap(PING))
    assert client.makefile("rb").readline() == Framing.NDJSON.wrap(answer(BAD))
    client.shutdown(socket.SHUT_WR)
