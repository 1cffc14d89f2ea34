"""Batches through the real process."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from support.wire import Json, Wire

from mlx_sidecar.protocol.framing import FrameReader, Framing


def call(request_id: Any, method: str, **params: Any) -> Json:
    return {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}


def by_id(replies: list[Json]) -> dict[Any, Any]:
    found = {
        reply["id"]: reply.get("result", reply.get("error", {}).get("data", {}).get("kind"))
        for reply in replies
    }
    assert len(found) == len(replies)
    return found


def test_a_batch_is_answered_by_one_array_of_what_its_members_would_get_alone(
    tiny_server: Wire, model: str
) -> None:
    alone = [tiny_server.result("generate", model=model, tokens=[n], maxTokens=8) for n in range(1, 6)]
    replies = tiny_server.batch(
        *(call(f"g{n}", "generate", model=model, tokens=[n], maxTokens=8) for n in range(1, 6)),
        call("t", "tokenize", model=model, text="hello world"),
        call("p", "ping"),
        call("no", "no/such/method"),
        call("wrong", "generate", model=model, tokens=[1], maxTokens=0),
        {"jsonrpc": "2.0", "method": "no/such/notification"},
    )
    found = by_id(replies)
    for n in range(1, 6):
        assert found[f"g{n}"]["tokens"] == alone[n - 1]["tokens"]
    assert found["t"] == tiny_server.result("tokenize", model=model, text="hello world")
    assert found["p"]["inFlight"] == 6
    assert (found["no"], found["wrong"]) == ("method_not_found", "invalid_params")
    assert len(replies) == 9


def test_a_member_can_be_cancelled_and_the_others_go_on(tiny_server: Wire, model: str) -> None:
    long = {"model": model, "tokens": [1], "maxTokens": 250, "logitBias": {"3": 1000}}
    cancel = {"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": "a"}}
    found = by_id(tiny_server.batch(call("a", "generate", **long), call("b", "generate", **long), cancel))
    assert found["a"]["finishReason"] == "cancelled"
    assert found["b"]["usage"]["completionTokens"] == 250


@pytest.mark.parametrize(
    ("frame", "code"),
    [(b"[]", -32600), (json.dumps([{}] * 65).encode(), -32600), (b"[1", -32700), (b'[{"jsonrpc":', -32700)],
    ids=["empty", "too many", "cut", "cut in a member"],
)
def test_a_batch_that_is_none_gets_one_error(tiny_server: Wire, frame: bytes, code: int) -> None:
    tiny_server.write(frame + b"\n")
    assert tiny_server.response(None)["error"]["code"] == code
    assert tiny_server.result("ping")["inFlight"] == 0


def test_notifications_alone_get_no_answer(tiny_server: Wire) -> None:
    note = {"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": "nobody"}}
    tiny_server.write(json.dumps([note, note]).encode() + b"\n")
    # Answers come in order here: had there been one, it would be first.
    request_id = tiny_server.send("ping")
    assert tiny_server.read()["id"] == request_id


def test_what_has_an_order_or_a_stream_is_refused_by_itself(tiny_server: Wire, model: str) -> None:
    streamed = {"model": model, "tokens": [1], "maxTokens": 2, "partialResultToken": "t"}
    found = by_id(
        tiny_server.batch(
            call(1, "initialize", protocolVersion=1),
            call(2, "shutdown"),
            call(3, "generate", **streamed),
            call(4, "models"),
        )
    )
    assert [found[n] for n in (1, 2, 3)] == ["invalid_request"] * 3
    assert found[4]["models"]
    assert tiny_server.progress("t") == []
    assert tiny_server.result("ping")["state"] == "ready"


def test_before_initialize_each_member_is_judged_by_itself() -> None:
    with Wire() as wire:
        found = by_id(wire.batch(call(1, "ping"), call(2, "models")))
        assert (found[1]["state"], found[2]) == ("starting", "not_initialized")


def test_a_batch_in_headers_is_answered_in_headers() -> None:
    with Wire() as wire:
        wire.write(Framing.LSP.wrap(json.dumps([call(1, "ping"), call(2, "ping")]).encode()))
        wire.end_input()
        reader = FrameReader(Framing.LSP)
        said = b"".join(iter(wire.line, None))
        (frame,) = [*reader.feed(said), *reader.close()]
        assert isinstance(frame, bytes)
        assert {reply["id"] for reply in json.loads(frame)} == {1, 2}
        assert wire.wait() == 0


def test_an_unfinished_batch_is_answered_whole_when_the_input_ends(tiny_model: Path) -> None:
    model = str(tiny_model)
    with Wire("--eof-grace-ms", "60000") as wire:
        wire.initialize()
        wire.result("load", model=model)
        wire.write(
            json.dumps([call(n, "generate", model=model, tokens=[n], maxTokens=20) for n in (1, 2)]).encode()
        )
        wire.end_input()
        (batch,) = cast(list[Any], wire.rest())
        assert {reply["id"] for reply in batch} == {1, 2}
        assert all(reply["result"]["finishReason"] in ("length", "stop") for reply in batch)
        assert wire.wait() == 0
