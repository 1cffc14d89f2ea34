from hypothesis import given
from hypothesis import strategies as st

from mlx_sidecar.protocol.ndjson import FrameTooLarge, LineSplitter


def split(*chunks: bytes, limit: int = 1000) -> list[bytes | str]:
    splitter = LineSplitter(limit)
    frames = [frame for chunk in chunks for frame in splitter.feed(chunk)] + splitter.close()
    return ["too large" if isinstance(frame, FrameTooLarge) else frame for frame in frames]


def test_lines_come_out_without_their_newline() -> None:
    assert split(b'{"a":1}\n{"b":2}\n') == [b'{"a":1}', b'{"b":2}']


def test_a_line_in_pieces_comes_out_whole() -> None:
    assert split(b'{"a', b'":', b"1}\n") == [b'{"a":1}']


def test_a_final_line_needs_no_newline() -> None:
    assert split(b"one\ntwo") == [b"one", b"two"]


def test_blank_lines_are_skipped() -> None:
    assert split(b"\n \t\r\none\n\n") == [b"one"]


def test_a_carriage_return_stays_with_its_line_where_json_ignores_it() -> None:
    assert split(b"{}\r\n") == [b"{}\r"]


def test_unicode_line_separators_do_not_end_a_line() -> None:
    line = '"\u2028\u2029\u0085"'.encode()
    assert split(line + b"\n") == [line]


def test_an_oversized_line_is_reported_once_and_the_next_one_is_read() -> None:
    assert split(b"x" * 11, b"y" * 30 + b"\nok\n", limit=10) == ["too large", b"ok"]


def test_a_line_of_exactly_the_limit_is_accepted() -> None:
    assert split(b"x" * 10 + b"\n", limit=10) == [b"x" * 10]


def test_an_oversized_last_line_is_reported() -> None:
    assert split(b"x" * 11, limit=10) == ["too large"]


@given(st.binary(max_size=200), st.integers(1, 30))
def test_the_cuts_between_chunks_make_no_difference(data: bytes, limit: int) -> None:
    whole = split(data, limit=limit)
    assert split(*(bytes([byte]) for byte in data), limit=limit) == whole
