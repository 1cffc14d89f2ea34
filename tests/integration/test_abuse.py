"""What broken hosts, careless users and odd models do to a server must stay their own affair."""

import json
import os
import resource
import subprocess
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import make_tiny_model
from support.wire import COMMAND, PATIENCE_SECONDS, Guest, Listening, Wire, lines

TEXT = "hello world abcdefgh"


@pytest.fixture
def unread_server(socket_path: Path) -> Generator["subprocess.Popen[bytes]"]:
    """A server at `socket_path`, and whoever started it does not read its stderr."""
    command = [COMMAND, "serve", "--listen", str(socket_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()


def tokenizer_with(folder: Path, **changes: Any) -> str:
    """Return a tiny model with other members in its tokenizer.json."""
    file = make_tiny_model(folder) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(folder)


def truncation(stride: int) -> dict[str, Any]:
    return {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": stride}


def test_a_log_that_nobody_reads_stops_nobody(
    unread_server: "subprocess.Popen[bytes]", socket_path: Path, tiny_model: Path
) -> None:
    with Guest.at(socket_path) as noisy, Guest.at(socket_path) as other:
        noisy.initialize()
        noisy.write(lines({"method": "$/cancelRequest", "params": {"x": 1}}) * 3000)
        noisy.call("ping")
        other.initialize()
        assert other.result("load", model=str(tiny_model))["state"] == "ready"
    unread_server.terminate()
    assert unread_server.wait(PATIENCE_SECONDS) == 143


def test_a_closed_stderr_is_no_failure() -> None:
    command = ["bash", "-c", f'exec "{COMMAND}" serve 2>&-']
    done = subprocess.run(command, input=b"", capture_output=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"truncation": truncation(stride=0)},
        {"truncation": truncation(stride=5)},  # With this the tokenizers library panics.
        {
            "padding": {
                "strategy": {"Fixed": 40},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        },
    ],
    ids=["truncation", "impossible truncation", "padding"],
)
def test_a_prompt_is_neither_cut_nor_padded_whatever_the_tokenizer_was_trained_with(
    tmp_path: Path, tiny_server: Wire, tiny_model: Path, changes: dict[str, Any]
) -> None:
    model = tokenizer_with(tmp_path / "odd", **changes)
    tiny_server.result("load", model=model)
    plain = tiny_server.result("tokenize", model=str(tiny_model), text=TEXT)
    assert tiny_server.result("tokenize", model=model, text=TEXT) == plain
    tiny_server.result("unload", model=model)


def test_clients_beyond_the_descriptors_are_turned_away_in_one_line(socket_path: Path) -> None:
    with Listening(socket_path) as server, server.connect() as first:
        first.stats_when(lambda stats: stats["engine"]["state"] == "ready")  # Importing needs descriptors.
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (32, 32))
        crowd = [Guest.at(socket_path) for _ in range(30)]
        assert first.result("ping")["inFlight"] == 0
        for guest in crowd:
            guest.close()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (answer := _hello(socket_path)):
            assert time.monotonic() < deadline
        assert answer["protocolVersion"] == 1
        server.process.terminate()
        server.wait()
        assert "Traceback" not in server.stderr.decode()


def _hello(path: Path) -> Any:
    """Return the answer to `initialize`, or None while there is no room."""
    with Guest.at(path) as guest:
        try:
            return guest.initialize()
        except (AssertionError, OSError):
            return None


def test_a_path_that_cannot_be_announced_is_a_wrong_path(socket_path: Path) -> None:
    command: list[bytes] = [os.fsencode(COMMAND), b"serve", b"--listen", os.fsencode(socket_path) + b"\xff"]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 2
    assert b"UTF-8" in done.stderr


@pytest.mark.parametrize("content", [5, [1], {"a": 1}], ids=["number", "list", "object"])
def test_a_special_token_of_a_wrong_type_is_none(
    tmp_path: Path, tiny_server: Wire, tiny_model: Path, content: Any
) -> None:
    folder = make_tiny_model(tmp_path / "odd")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": content}}))
    tiny_server.result("load", model=str(folder))
    plain = tiny_server.result("tokenize", model=str(tiny_model), text=TEXT)
    assert tiny_server.result("tokenize", model=str(folder), text=TEXT) == plain
    tiny_server.result("unload", model=str(folder))
