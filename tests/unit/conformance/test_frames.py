import pytest

from mlx_sidecar.conformance.frames import Violation, decode

ERROR = '{"jsonrpc":"2.0","id":null,"error":{"code":1,"message":"m","data":{"kind":"k","retryable":false}}}'


@pytest.mark.parametrize(
    "frame",
    [
        '{"jsonrpc":"2.0","id":1,"result":null}',
        '{"jsonrpc":"2.0","id":"","result":{}}',
        ERROR,
        '{"jsonrpc":"2.0","method":"$/progress","params":{}}',
        f'[{{"jsonrpc":"2.0","id":1,"result":1}},{ERROR}]',
        '{"jsonrpc":"2.0","id":1,"result":"\\u2028"}',
    ],
)
def test_a_frame_as_it_must_be(frame: str) -> None:
    assert decode(frame.encode())


@pytest.mark.parametrize(
    "frame",
    [
        "",
        "hello",
        "1",
        "[]",
        "{}",
        '{"jsonrpc":"2.0","id":1,"result":NaN}',
        '{"jsonrpc":"2.0","id":1,"result":1,"result":1}',
        '{"jsonrpc":"2.0","id":1,"result":"\u2028"}',
        '{"jsonrpc":"2.0","id":1,"result":"\\ud800"}',
        '{"jsonrpc":"1.0","id":1,"result":1}',
        '{"id":1,"result":1}',
        '{"jsonrpc":"2.0","result":1}',
        '{"jsonrpc":"2.0","id":null,"result":1}',
        '{"jsonrpc":"2.0","id":true,"result":1}',
        '{"jsonrpc":"2.0","id":1}',
        ERROR.replace("{", '{"result":1,', 1),
        '{"jsonrpc":"2.0","id":1,"error":"m"}',
        ERROR.replace('"code":1', '"code":"1"'),
        ERROR.replace('"code":1', '"code":true'),
        ERROR.replace('"message":"m"', '"message":""'),
        ERROR.replace('"kind":"k",', ""),
        ERROR.replace("false", "0"),
        '{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"m"}}',
        '{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"m","data":{"kind":"k"}}}',
        '{"jsonrpc":"2.0","id":1,"method":"m"}',
        '{"jsonrpc":"2.0","method":1}',
        '{"jsonrpc":"2.0","method":"m","params":1}',
        '[{"jsonrpc":"2.0","method":"m"}]',
    ],
)
def test_a_frame_that_breaks_a_rule(frame: str) -> None:
    with pytest.raises(Violation):
        decode(frame.encode())


@pytest.mark.parametrize("frame", [b"\xff", b"[" * 100_000])
def test_bytes_that_are_no_frame(frame: bytes) -> None:
    with pytest.raises(Violation):
        decode(frame)
