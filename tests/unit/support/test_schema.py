"""The checks that other tests rely on: they let good frames pass, and they can fail."""

from typing import Any

import pytest
from support.schema import Conversation, frames

Json = dict[str, Any]
Cases = list[tuple[Any, str]]

VERSION = {"jsonrpc": "2.0"}
METHODS: dict[int | str, str] = {1: "generate", 2: "unload", 3: "shutdown", 4: "no such method"}
USAGE = {"promptTokens": 1, "completionTokens": 2}
TIMINGS = {"queueMs": 0, "prefillMs": 1.5, "ttftMs": 2, "decodeMs": 3, "tokensPerSecond": 4.5}
ANSWER = {"finishReason": "stop", "usage": USAGE, "timings": TIMINGS}


def request(method: str, **params: Any) -> Json:
    return VERSION | {"id": 1, "method": method, "params": params}


def notification(method: str, **params: Any) -> Json:
    return VERSION | {"method": method, "params": params}


def result(request_id: int, value: Any) -> Json:
    return VERSION | {"id": request_id, "result": value}


def error(request_id: int | None, code: int, kind: str, retryable: bool = False, **data: Any) -> Json:
    data = {"kind": kind, "retryable": retryable, **data}
    return VERSION | {"id": request_id, "error": {"code": code, "message": "It failed.", "data": data}}


PART = {"seq": 1, "text": "a", "tokens": [1]}
PROGRESS = notification("$/progress", token="t", value=PART)


MAY_BE_SENT: list[Any] = [
    request("generate", model="m", prompt="p", stop=["a"], seed=None, logitBias={"7": -1}),
    VERSION | {"id": "a", "method": "ping"},
    notification("$/cancelRequest", id="a"),
    VERSION | {"method": "exit"},
    [request("models"), notification("$/streamAck", token=1, seq=2)],
]
MAY_NOT_BE_SENT: Cases = [
    (request("generate", model="m", prompt="p", topp=1), "'topp' was unexpected"),
    (request("generate", prompt="p"), "'model' is a required property"),
    (request("generate", model="m", temperature=-1), r"\$\.temperature: -1 is less than the minimum"),
    (
        request("tokenize", model="m", messages=[{"role": "x", "content": ""}]),
        r"\$\.messages\[0\]\.role: 'x'",
    ),
    (request("generate", model="m", logitBias={"a": 1}), "'a' does not match"),
    (request("ping", why="not"), "'why' was unexpected"),
    (request("pong"), "'pong' cannot be said like this"),
    (request("exit"), "'exit' cannot be said like this"),
    (notification("ping"), "'ping' cannot be said like this"),
    (notification("$/progress", token=1, value=PART), "progress' cannot be said like this"),
    (request("ping") | {"id": None}, "is not valid under any of the given schemas"),
    (request("ping") | {"jsonrpc": "1.0"}, "'2.0' was expected"),
    (request("ping") | {"params": []}, "is not of type 'object'"),
    ([], "A batch of 0"),
    ([request("ping")] * 65, "A batch of 65"),
    ([request("ping"), request("pang")], "'pang' cannot be said like this"),
    ("ping", "'ping' is not of type 'object'"),
]
MAY_BE_RECEIVED: list[Any] = [
    PROGRESS,
    result(1, ANSWER | {"lastSeq": 0, "textBytes": 0}),
    result(3, None),
    result(99, "of a request that nobody remembers"),
    [result(2, {"model": "m", "state": "unloaded"}), error(None, -32600, "invalid_request")],
    error(1, 1007, "slow_consumer", retryable=True, maxUnsentBytes=1),
    error(2, -32800, "cancelled"),
    error(4, -32601, "method_not_found", method="no such method"),
    error(None, -32700, "parse_error"),
    error(99, 1001, "model_not_found", model="m"),
]
MAY_NOT_BE_RECEIVED: Cases = [
    (
        notification("$/progress", token="t", value=PART | {"extra": 1}),
        "not valid under any of the given schemas",
    ),
    (notification("$/progress", token="t"), "'value' is a required property"),
    (PROGRESS | {"id": 1}, "'id' was unexpected"),
    (notification("exit"), "'exit' cannot be said like this"),
    (result(1, ANSWER | {"finishReason": "bored"}), r"\$\.finishReason: 'bored' is not one of"),
    (result(1, ANSWER | {"usage": {}}), "'promptTokens' is a required property"),
    (result(1, ANSWER | {"surprise": 1}), "'surprise' was unexpected"),
    (result(1, None), "None is not of type 'object'"),
    (result(3, {}), "is not of type 'null'"),
    (result(4, {}), "'no such method' has no result"),
    (VERSION | {"id": 1}, "'result' is a required property"),
    (result(1, ANSWER) | {"error": {}}, "'result' was unexpected"),
    (error(1, 1002, "slow_consumer", retryable=True), "slow_consumer has the code 1007"),
    (error(1, 1007, "slow_consumer"), "'retryable': True} is promised"),
    (error(1, 1002, "no_such_kind"), "'no_such_kind' is not one of"),
    (error(1, 1002, "model_not_loaded", secret="x"), "'secret' was unexpected"),
    (error(1, -32800, "cancelled"), "This request cannot fail like this: .*-32800"),
    (error(2, 1004, "context_overflow"), "This request cannot fail like this: .*1004"),
    (error(4, -32602, "invalid_params", path=""), "This request cannot fail like this: .*-32602"),
    (error(None, -32603, "internal_error", retryable=True), "This request cannot fail like this: .*-32603"),
    (VERSION | {"id": 1, "error": {"code": 1, "message": "bare"}}, "'data' is a required property"),
    ([], "A batch of 0"),
    ([result(3, None), PROGRESS], "'method', 'params' were unexpected"),
]


@pytest.mark.parametrize("message", MAY_BE_SENT, ids=str)
def test_what_a_client_may_say_passes(message: Any) -> None:
    frames().sent(message)


@pytest.mark.parametrize(("message", "problem"), MAY_NOT_BE_SENT, ids=[why for _, why in MAY_NOT_BE_SENT])
def test_what_a_client_may_not_say_fails(message: Any, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        frames().sent(message)


@pytest.mark.parametrize("message", MAY_BE_RECEIVED, ids=str)
def test_what_the_server_may_say_passes(message: Any) -> None:
    frames().received(message, METHODS)


@pytest.mark.parametrize(
    ("message", "problem"), MAY_NOT_BE_RECEIVED, ids=[why for _, why in MAY_NOT_BE_RECEIVED]
)
def test_what_the_server_may_not_say_fails(message: Any, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        frames().received(message, METHODS)


def test_an_answer_is_checked_against_its_question() -> None:
    conversation = Conversation()
    conversation.said(
        b'not JSON\n{"jsonrpc":"2.0","id":1,"method":"ping"}\n[{"id":"a","method":"shutdown"}]\n'
    )
    conversation.heard(result(99, "of a question that nobody asked"))
    conversation.heard([VERSION | {"id": "a", "result": None}])
    with pytest.raises(AssertionError, match="'state' is a required property"):
        conversation.heard(result(1, {}))


def test_an_id_may_come_again_for_another_method() -> None:
    conversation = Conversation()
    conversation.said(b'{"id":1,"method":"ping"}\n{"id":1,"method":"ping"}')
    conversation.heard(error(1, -32600, "duplicate_id", id=1))
    with pytest.raises(AssertionError, match="'state' is a required property"):
        conversation.heard(result(1, {}))
    conversation.heard(result(1, {"state": "ready", "uptimeMs": 1, "inFlight": 0, "lastStepAgeMs": None}))
    conversation.said(b'{"id":1,"method":"models"}')
    with pytest.raises(AssertionError, match="'models' is a required property"):
        conversation.heard(result(1, {}))


def test_an_id_that_stands_for_two_methods_says_nothing_about_the_answer() -> None:
    conversation = Conversation()
    conversation.said(b'{"id":1,"method":"ping"}\n{"id":1,"method":"shutdown"}')
    conversation.heard(result(1, None))
    with pytest.raises(AssertionError, match="'jsonrpc' is a required property"):
        conversation.heard({"id": 1, "result": None})
