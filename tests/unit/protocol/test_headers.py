import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sidecar.protocol.headers import FramingLost, HeaderSplitter


def split(*chunks: bytes, limit: int = 1000) -> list[bytes | str]:
    splitter = HeaderSplitter(limit)
    frames = [frame for chunk in chunks for frame in splitter.feed(chunk)] + splitter.close()
    return [frame.problem if isinstance(frame, FramingLost) else frame for frame in frames]


def message(body: bytes, *others: bytes) -> bytes:
    return b"".join([b"Content-Length: %d\r\n" % len(body), *others, b"\r\n", body])


def test_bodies_come_out_without_their_headers() -> None:
    assert split(message(b"one") + message(b"") + message(b"three\n")) == [b"one", b"", b"three\n"]


def test_names_of_headers_have_no_case_and_other_headers_are_ignored() -> None:
    assert split(b"X-Other: 1\r\ncontent-LENGTH:  3 \r\n\r\nabc") == [b"abc"]


def test_line_ends_without_carriage_return_are_understood() -> None:
    assert split(b"Content-Length: 3\n\nabc") == [b"abc"]


@pytest.mark.parametrize("charset", [b"utf-8", b"utf8", b'"UTF-8"'])
def test_utf_8_may_be_named(charset: bytes) -> None:
    header = b"Content-Type: application/vscode-jsonrpc; charset=%b\r\n" % charset
    assert split(message(b"a", header)) == [b"a"]


@pytest.mark.parametrize(
    "data",
    [
        b"Content-Length: a\r\n\r\nabc",
        b"Content-Length: -1\r\n\r\nabc",
        b"Content-Length: +3\r\n\r\nabc",
        b"Content-Length: \r\n\r\nabc",
        b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"Content-Length: 1001\r\n\r\n",
        b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"Content-Size: 3\r\n\r\nabc",
        b"nonsense\r\n\r\n",
        b"Content-Length: 1\r\nContent-Type: x; charset=latin-1\r\n\r\na",
        b"C" * 9000,
    ],
    ids=lambda data: repr(data[:40]),
)
def test_a_wrong_header_loses_the_stream_and_is_told_once(data: bytes) -> None:
    good = message(b"good")
    frames = split(good + data, good, good)
    assert frames[0] == b"good"
    assert [type(frame) for frame in frames[1:]] == [str]


def test_the_same_length_twice_is_one_length() -> None:
    assert split(b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc") == [b"abc"]


@pytest.mark.parametrize(
    "end", [b"Content-Le", b"Content-Length: 5\r\n\r\n", b"Content-Length: 5\r\n\r\nabc"]
)
def test_a_stream_that_ends_inside_a_message_says_so(end: bytes) -> None:
    assert split(message(b"a") + end) == [b"a", "The stream ended inside a message."]


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(0, 400), max_size=8))
def test_the_cuts_between_chunks_make_no_difference(bodies: list[bytes], cuts: list[int]) -> None:
    data = b"".join(message(body) for body in bodies)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in zip(edges, edges[1:], strict=False)]  # noqa: RUF007
    assert split(*pieces) == bodies
    assert split(*(bytes([byte]) for byte in data)) == bodies


@given(st.binary(max_size=200))
def test_any_bytes_give_frames_or_one_loss_however_they_are_cut(data: bytes) -> None:
    assert split(data) == split(*(bytes([byte]) for byte in data))
