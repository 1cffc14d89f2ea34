import json
from typing import Any

import msgspec
import pytest

from mlx_sidecar.protocol import jsonrpc
from mlx_sidecar.protocol.errors import InvalidParams
from mlx_sidecar.protocol.messages import GenerateParams
from mlx_sidecar.protocol.methods import PARAMS_DECODERS


def refusal(frame: bytes) -> tuple[int, Any]:
    with pytest.raises(jsonrpc.BadFrame) as caught:
        jsonrpc.decode_request(frame)
    return caught.value.error.code, caught.value.request_id


def wrong_path(method: str, params: str) -> str:
    with pytest.raises(InvalidParams) as caught:
        jsonrpc.decode_params(msgspec.Raw(params.encode()), PARAMS_DECODERS[method].decode)
    return caught.value.path


@pytest.mark.parametrize(
    "frame",
    [
        b"hello",
        b"{",
        b'{"jsonrpc":"2.0",}',
        b"\xff",
        b'{"jsonrpc":"2.0","method":"\xff"}',
        b"[" * 100_000,
        b'{"jsonrpc":"2.0","method":"ping","params":' + b"[" * 100_000,
    ],
    ids=lambda frame: repr(frame[:40]),
)
def test_what_is_not_json_is_a_parse_error(frame: bytes) -> None:
    assert refusal(frame) == (-32700, None)


@pytest.mark.parametrize("frame", [b"1", b"null", b'"text"', b"[]", b"{}", b'{"jsonrpc":"2.0"}'])
def test_json_that_is_no_request_is_an_invalid_request(frame: bytes) -> None:
    assert refusal(frame) == (-32600, None)


def test_the_id_of_an_invalid_request_is_echoed_if_it_is_usable() -> None:
    assert refusal(b'{"jsonrpc":"1.0","id":7,"method":"ping"}') == (-32600, 7)
    assert refusal(b'{"jsonrpc":"2.0","id":"x","method":5}') == (-32600, "x")


@pytest.mark.parametrize("request_id", ["null", "1.5", "true", "[1]", "9007199254740992"])
def test_ids_that_javascript_could_not_hold_are_refused(request_id: str) -> None:
    assert refusal(f'{{"jsonrpc":"2.0","id":{request_id},"method":"ping"}}'.encode()) == (-32600, None)


@pytest.mark.parametrize("request_id", [0, -1, 2**53 - 1, "", "a"])
def test_integers_and_strings_are_ids(request_id: int | str) -> None:
    frame = json.dumps({"jsonrpc": "2.0", "id": request_id, "method": "ping"}).encode()
    assert jsonrpc.decode_request(frame).id == request_id


def test_a_request_without_id_is_a_notification() -> None:
    assert jsonrpc.decode_request(b'{"jsonrpc":"2.0","method":"exit"}').id is msgspec.UNSET


@pytest.mark.parametrize(
    ("params", "path"),
    [
        ("{}", "model"),
        ('{"model":1}', "model"),
        ('{"model":"m","nonsense":1}', "nonsense"),
        ('{"model":"m","topP":1.1}', "topP"),
        ('{"model":"m","temperature":"hot"}', "temperature"),
        ('{"model":"m","maxTokens":0}', "maxTokens"),
        ('{"model":"m","stop":["a",""]}', "stop[1]"),
        ('{"model":"m","tokens":[1,-1]}', "tokens[1]"),
        ('{"model":"m","messages":[{"role":"user"}]}', "messages[0].content"),
        ('{"model":"m","messages":[{"role":"robot","content":""}]}', "messages[0].role"),
        ('{"model":"m","messages":[{"role":"user","content":"","name":1}]}', "messages[0].name"),
        ('{"model":"m","seed":9007199254740992}', "seed"),
        ("[1]", ""),
    ],
)
def test_a_wrong_parameter_is_named_by_its_path(params: str, path: str) -> None:
    assert wrong_path("generate", params) == path


def test_null_params_count_as_none() -> None:
    jsonrpc.decode_params(msgspec.Raw(b"null"), PARAMS_DECODERS["ping"].decode)


def test_camel_case_on_the_wire_is_snake_case_in_python() -> None:
    raw = msgspec.Raw(b'{"model":"m","prompt":"p","maxTokens":3,"logitBias":{"5":-1}}')
    params: GenerateParams = jsonrpc.decode_params(raw, PARAMS_DECODERS["generate"].decode)
    assert (params.max_tokens, params.logit_bias) == (3, {5: -1.0})


def test_line_separators_of_javascript_are_escaped() -> None:
    frame = jsonrpc.encode_notification("x", {"text": "a\u2028b\u2029c\u0085d\u2030"})
    assert frame.decode().splitlines() == [frame.decode()]
    assert json.loads(frame)["params"]["text"] == "a\u2028b\u2029c\u0085d\u2030"


def test_a_lone_surrogate_does_not_cost_the_answer() -> None:
    frame = jsonrpc.encode_outcome(1, {"text": ["a\ud800b"]})
    assert json.loads(frame) == {"jsonrpc": "2.0", "id": 1, "result": {"text": ["a?b"]}}


def test_numbers_that_json_lacks_become_null() -> None:
    assert json.loads(jsonrpc.encode_outcome(1, {"x": float("-inf")}))["result"] == {"x": None}


def test_success_without_a_value_still_has_a_result() -> None:
    assert json.loads(jsonrpc.encode_outcome(1, None)) == {"jsonrpc": "2.0", "id": 1, "result": None}
