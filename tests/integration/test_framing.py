"""Both framings through the real process, whole and one byte at a time."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.recording import check
from support.wire import COMMAND

from mlx_sidecar.protocol.framing import FrameReader, Framing


def talk(framing: Framing, pieces: list[bytes]) -> tuple[list[Any], int]:
    """Write pieces, close stdin, and return what came back in the same framing, and the exit code."""
    command = [COMMAND, "serve", "--eof-grace-ms", "60000"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as it:
        assert it.stdin is not None
        assert it.stdout is not None
        for piece in pieces:
            os.write(it.stdin.fileno(), piece)
        it.stdin.close()
        heard = it.stdout.read()
    check(b"".join(pieces), heard)
    reader = FrameReader(framing)
    frames = [*reader.feed(heard), *reader.close()]
    return [json.loads(frame) for frame in frames if isinstance(frame, bytes)], it.returncode


def conversation(model: str) -> list[bytes]:
    generate = {"model": model, "tokens": [1, 2, 3], "maxTokens": 3, "partialResultToken": "é"}
    messages: list[dict[str, Any]] = [
        {"id": "a", "method": "initialize", "params": {"protocolVersion": 1}},
        {"id": 2, "method": "load", "params": {"model": model}},
        {"id": 3, "method": "generate", "params": generate},
        {"id": 4, "method": "no/such/method"},
    ]
    return [json.dumps({"jsonrpc": "2.0"} | message, ensure_ascii=False).encode() for message in messages]


@pytest.mark.parametrize("framing", list(Framing))
@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
def test_a_conversation_is_answered_in_the_framing_it_is_held_in(
    framing: Framing, bytewise: bool, tiny_model: Path
) -> None:
    data = b"".join(framing.wrap(frame) for frame in conversation(str(tiny_model)))
    messages, exit_code = talk(framing, [data[i : i + 1] for i in range(len(data))] if bytewise else [data])
    assert {message["id"] for message in messages if "id" in message} == {"a", 2, 3, 4}
    assert any(message.get("method") == "$/progress" for message in messages)
    assert exit_code == 0


def test_broken_headers_are_answered_once_and_end_the_process() -> None:
    first = Framing.LSP.wrap(b'{"jsonrpc":"2.0","id":1,"method":"ping"}')
    messages, exit_code = talk(Framing.LSP, [first + b"Content-Length: many\r\n\r\n" + first])
    assert [message["id"] for message in messages] == [1, None]
    assert messages[1]["error"]["code"] == -32600
    assert exit_code == 1
