import json

from mlx_sidecar.protocol import jsonrpc
from mlx_sidecar.protocol.framing import MAX_OUTBOUND_FRAME_BYTES


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


def test_a_result_longer_than_a_frame_may_be_is_an_error_with_the_same_id() -> None:
    room = MAX_OUTBOUND_FRAME_BYTES - len(jsonrpc.encode_outcome("x", ""))
    assert len(jsonrpc.encode_outcome("x", "y" * room)) == MAX_OUTBOUND_FRAME_BYTES
    refused = json.loads(jsonrpc.encode_outcome("x", "y" * (room + 1)))
    assert (refused["id"], refused["error"]["data"]["kind"]) == ("x", "response_too_large")
