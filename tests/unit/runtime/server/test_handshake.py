import json
import os
from typing import Any

import pytest

from mlx_sidecar.runtime.server.handshake import Greeting, greet
from mlx_sidecar.runtime.server.stdio import Wire


def line(**message: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0"} | message).encode() + b"\n"


INITIALIZE = line(id="first", method="initialize", params={"protocolVersion": 1, "processId": 7})


def greeting(said: bytes) -> tuple[Greeting, list[Any]]:
    """Let a host say something, greet it, and return what it got."""
    (from_host, host_out), (host_in, to_host) = os.pipe(), os.pipe()
    os.write(host_out, said)
    result = greet(Wire(from_host, to_host))
    os.close(to_host)
    with os.fdopen(host_in, "rb") as answers:
        got = [json.loads(answer) for answer in answers]
    os.close(host_out)
    os.close(from_host)
    return result, got


def test_an_initialize_that_is_waiting_is_answered() -> None:
    result, answers = greeting(INITIALIZE)
    assert [answer["id"] for answer in answers] == ["first"]
    assert answers[0]["result"]["protocolVersion"] == 1
    assert result.accepted is not None
    assert (result.accepted.process_id, result.unread) == (7, b"")


def test_what_follows_it_is_left_for_the_connection() -> None:
    rest = line(id=2, method="ping") + b'{"half'
    result, answers = greeting(INITIALIZE + rest)
    assert result.unread == rest
    assert len(answers) == 1


@pytest.mark.parametrize(
    "said",
    [
        line(id=1, method="ping"),
        line(method="initialize", params={"protocolVersion": 1}),
        line(id=1, method="initialize", params={"protocolVersion": 2}),
        line(id=1, method="initialize", params={"protocolVersion": 1, "nonsense": 1}),
        b"\n" + INITIALIZE,
        b"not json\n" + INITIALIZE,
        INITIALIZE.rstrip(b"\n"),
        b"\xef\xbb\xbf" + INITIALIZE,
    ],
)
def test_everything_else_is_left_for_the_connection_untouched(said: bytes) -> None:
    result, answers = greeting(said)
    assert (result, answers) == (Greeting(said, None), [])


def test_a_host_that_says_nothing_yet_is_not_waited_for() -> None:
    assert greeting(b"") == (Greeting(b"", None), [])
