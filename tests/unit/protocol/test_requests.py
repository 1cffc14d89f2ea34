import json
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sidecar.protocol import jsonrpc, requests
from mlx_sidecar.protocol.errors import InvalidParams
from mlx_sidecar.protocol.messages import GenerateParams
from mlx_sidecar.protocol.methods import PARAMS_DECODERS


def refusal(frame: bytes) -> tuple[int, Any]:
    with pytest.raises(requests.BadFrame) as caught:
        requests.decode_request(frame)
    return caught.value.error.code, caught.value.request_id


def wrong_path(method: str, params: str) -> str:
    with pytest.raises(InvalidParams) as caught:
        requests.decode_params(msgspec.Raw(params.encode()), PARAMS_DECODERS[method].decode)
    return caught.value.path


# A few. The real process gets every way to break JSON's grammar, from tests/conformance/transcripts/json.
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
    assert requests.decode_request(frame).id == request_id


def test_a_request_without_id_is_a_notification() -> None:
    assert requests.decode_request(b'{"jsonrpc":"2.0","method":"exit"}').id is msgspec.UNSET


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


def test_the_name_of_an_unknown_parameter_takes_no_room_in_the_answer() -> None:
    assert wrong_path("ping", '{"' + "x" * 10_000_000 + '":1}') == "x" * 200


def test_null_params_count_as_none() -> None:
    requests.decode_params(msgspec.Raw(b"null"), PARAMS_DECODERS["ping"].decode)


def test_camel_case_on_the_wire_is_snake_case_in_python() -> None:
    raw = msgspec.Raw(b'{"model":"m","prompt":"p","maxTokens":3,"logitBias":{"5":-1}}')
    params: GenerateParams = requests.decode_params(raw, PARAMS_DECODERS["generate"].decode)
    assert (params.max_tokens, params.logit_bias) == (3, {5: -1.0})


@pytest.mark.parametrize(
    ("frame", "is_one"),
    [(b"[]", True), (b" \t[", True), (b"{}", False), (b"", False), (b'"["', False), (b"]", False)],
)
def test_an_array_is_a_batch(frame: bytes, is_one: bool) -> None:
    assert requests.is_batch(frame) is is_one


def test_the_members_of_a_batch_are_decoded_or_refused_one_by_one() -> None:
    ping = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'
    bad = [
        b"1",
        b"null",
        b"[]",
        b"{}",
        b'{"jsonrpc":"2.0","id":7}',
        b'{"jsonrpc":"2.0","id":null,"method":"x"}',
    ]
    first, *others, last = requests.decode_batch(b"[" + b" , ".join([ping, *bad, ping]) + b"]")
    for request in (first, last):
        assert isinstance(request, requests.Request)
        assert request.id == 1
    found: list[Any] = []
    for other in others:
        assert isinstance(other, requests.BadFrame)
        found.append((other.error.code, other.request_id))
    assert found == [(-32600, None)] * 4 + [(-32600, 7), (-32600, None)]


def test_params_of_a_member_are_its_own() -> None:
    (request,) = requests.decode_batch(b'[ {"jsonrpc":"2.0","method":"x","params": {"a": [1, 2]} } ]')
    assert isinstance(request, requests.Request)
    assert not request.is_call
    assert bytes(request.params) == b'{"a": [1, 2]}'


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"[]", -32600),
        (b"[" + b",".join([b"1"] * (jsonrpc.MAX_BATCH_MEMBERS + 1)) + b"]", -32600),
        (b"[1", -32700),
        (b"[1,]", -32700),
        (b"[1]]", -32700),
        (b'["\xff"]', -32700),
        (b"[" * 100_000, -32700),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_batch_that_is_none_is_refused_as_a_whole(frame: bytes, code: int) -> None:
    with pytest.raises(requests.BadFrame) as caught:
        requests.decode_batch(frame)
    assert (caught.value.error.code, caught.value.request_id) == (code, None)


def test_a_member_nested_too_deeply_breaks_the_batch() -> None:
    frame = b'[{"jsonrpc":"2.0","id":1,"method":"ping"},' + b"[" * 100_000 + b"]" * 100_000 + b"]"
    with pytest.raises(requests.BadFrame) as caught:
        requests.decode_batch(frame)
    assert caught.value.error.code == -32700


@given(
    st.lists(
        st.fixed_dictionaries(
            {"jsonrpc": st.just("2.0"), "method": st.text(st.characters(codec="utf-8"), max_size=5)},
            optional={
                "id": st.integers(-(2**53 - 1), 2**53 - 1)
                | st.text(st.characters(codec="utf-8"), max_size=5),
                "params": st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=3), st.integers()),
            },
        ),
        min_size=1,
        max_size=jsonrpc.MAX_BATCH_MEMBERS,
    )
)
def test_a_batch_means_what_its_members_mean_alone(members: list[dict[str, Any]]) -> None:
    alone = [requests.decode_request(json.dumps(member).encode()) for member in members]
    assert requests.decode_batch(json.dumps(members).encode()) == alone


@pytest.mark.parametrize("params", ["null", "[]", "[null]", " [ ] ", "{}"])
def test_clients_that_know_only_positional_parameters_can_say_that_there_are_none(params: str) -> None:
    requests.decode_params(msgspec.Raw(params.strip().encode()), PARAMS_DECODERS["ping"].decode)


@pytest.mark.parametrize("params", ['"text"', "1", "true"])
def test_params_that_are_no_structure_make_an_invalid_request(params: str) -> None:
    frame = f'{{"jsonrpc":"2.0","id":5,"method":"ping","params":{params}}}'
    assert refusal(frame.encode()) == (-32600, 5)


def test_an_id_that_would_take_the_room_of_its_answer_is_refused() -> None:
    longest = "i" * 1024
    assert requests.decode_request(json.dumps({"jsonrpc": "2.0", "id": longest, "method": "x"}).encode()).id
    assert refusal(json.dumps({"jsonrpc": "2.0", "id": longest + "i", "method": "x"}).encode()) == (
        -32600,
        None,
    )
    assert refusal(json.dumps({"jsonrpc": "1.0", "id": longest + "i", "method": "x"}).encode()) == (
        -32600,
        None,
    )


def test_a_batch_of_millions_is_refused_before_it_is_built() -> None:
    frame = b"[" + b"[]," * 2_000_000 + b"[]]"
    tracemalloc.start()
    try:
        with pytest.raises(requests.BadFrame):
            requests.decode_batch(frame)
        with pytest.raises(requests.BadFrame):
            requests.decode_request(b'{"x":' + frame + b"}")
        assert tracemalloc.get_traced_memory()[1] < len(frame) * 3
    finally:
        tracemalloc.stop()
