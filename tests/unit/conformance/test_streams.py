from typing import Any

import pytest

from mlx_sidecar.conformance.frames import Violation
from mlx_sidecar.conformance.streams import Streams

REQUEST = b'{"jsonrpc":"2.0","id":1,"method":"generate","params":{"partialResultToken":"t"}}'


def progress(**value: Any) -> dict[str, Any]:
    return {"method": "$/progress", "params": {"token": "t", "value": {"text": "é", "tokens": [5]} | value}}


def response(last_seq: int, text_bytes: int, tokens: int, **more: Any) -> dict[str, Any]:
    usage = {"completionTokens": tokens}
    return {"id": 1, "result": {"lastSeq": last_seq, "textBytes": text_bytes, "usage": usage, **more}}


@pytest.fixture
def streams() -> Streams:
    book = Streams()
    book.sent(REQUEST)
    return book


def test_a_stream_that_adds_up(streams: Streams) -> None:
    streams.received(progress(seq=1))
    streams.received(progress(seq=4, merged=3, text="abc", tokens=[1, 2, 3]))
    streams.received(response(4, 5, 4))
    assert streams.contents() == {"t": ("éabc", [5, 1, 2, 3])}


@pytest.mark.parametrize(
    "value",
    [{"seq": 2}, {"seq": 0}, {"seq": 3, "merged": 2}, {"seq": 1, "merged": 0}, {"seq": 1, "text": None}, {}],
)
def test_progress_that_cannot_come_next(streams: Streams, value: Any) -> None:
    with pytest.raises(Violation):
        streams.received(progress(**({"seq": None} | value)))


@pytest.mark.parametrize(
    "wrong",
    [
        response(2, 2, 1),
        response(1, 1, 1),
        response(1, 2, 2),
        response(1, 2, 1, text="é"),
        {"id": 1, "result": None},
    ],
)
def test_a_result_that_says_something_else(streams: Streams, wrong: Any) -> None:
    streams.received(progress(seq=1))
    with pytest.raises(Violation):
        streams.received(wrong)


def test_progress_after_the_response(streams: Streams) -> None:
    streams.received({"id": 1, "error": {}})
    with pytest.raises(Violation, match="after the response"):
        streams.received(progress(seq=1))


def test_progress_that_nobody_has_asked_for() -> None:
    with pytest.raises(Violation, match="nobody"):
        Streams().received(progress(seq=1))


@pytest.mark.parametrize("method", ["load", "reload", "pull"])
def test_of_how_far_a_load_or_a_pull_is_only_the_newest_counts(method: str) -> None:
    book = watching(method)
    book.received(far(seq=1, doneBytes=0, totalBytes=0))
    book.received(far(seq=4, doneBytes=10, totalBytes=10))
    book.received({"id": 1, "result": {}})
    assert [value["seq"] for value in book.of('"t"').values] == [1, 4]
    with pytest.raises(Violation, match="after the response"):
        book.received(far(seq=5))


@pytest.mark.parametrize(
    "value",
    [
        {"seq": 2},
        {"seq": 1},
        {"seq": None},
        {"phase": None},
        {"doneBytes": 11},
        {"doneBytes": -1},
        {"totalBytes": None},
    ],
)
def test_how_far_it_cannot_be(value: dict[str, Any]) -> None:
    book = watching("load")
    book.received(far(seq=2))
    with pytest.raises(Violation):
        book.received(far(**value))


def watching(method: str) -> Streams:
    book = Streams()
    book.sent(REQUEST.replace(b"generate", method.encode()))
    return book


def far(**value: Any) -> dict[str, Any]:
    value = {"seq": 3, "phase": "weights", "doneBytes": 5, "totalBytes": 10} | value
    return {"method": "$/progress", "params": {"token": "t", "value": value}}


def test_one_and_the_string_one_are_two_tokens_and_two_ids() -> None:
    book = Streams()
    book.sent(REQUEST.replace(b'"t"', b"1"))
    book.sent(REQUEST.replace(b'"t"', b'"1"').replace(b'"id":1', b'"id":"1"'))
    book.received({"id": "1", "result": {"lastSeq": 0, "textBytes": 0, "usage": {"completionTokens": 0}}})
    assert book.of('"1"').ended
    assert not book.of("1").ended


@pytest.mark.parametrize("frame", [b"hello", b"[]", b"{}", b'{"id":1,"params":[1]}', b"[" * 100_000])
def test_frames_that_ask_for_no_stream_are_passed_over(frame: bytes) -> None:
    book = Streams()
    book.sent(frame)
    assert book.contents() == {}
