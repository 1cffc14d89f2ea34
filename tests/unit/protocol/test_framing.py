import pytest

from mlx_sidecar.protocol.framing import Frame, FrameReader, Framing
from mlx_sidecar.protocol.headers import FramingLost
from mlx_sidecar.protocol.ndjson import FrameTooLarge

BOM = b"\xef\xbb\xbf"


def read(
    data: bytes, *, bytewise: bool, framing: Framing | None = None
) -> tuple[list[Frame], Framing | None]:
    reader = FrameReader(framing, max_frame_bytes=100)
    chunks = [bytes([byte]) for byte in data] if bytewise else [data]
    frames = [frame for chunk in chunks for frame in reader.feed(chunk)]
    return frames + reader.close(), reader.framing


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize("start", [b"", b"\n \r\n\t", BOM, BOM + b"\n"])
def test_the_first_byte_that_is_not_blank_decides(start: bytes, bytewise: bool) -> None:
    assert read(start + b'{"a":1}\n{}\n', bytewise=bytewise) == ([b'{"a":1}', b"{}"], Framing.NDJSON)
    lsp = start + Framing.LSP.wrap(b"{}") + Framing.LSP.wrap(b"[]")
    assert read(lsp, bytewise=bytewise) == ([b"{}", b"[]"], Framing.LSP)


def test_a_lower_case_header_is_a_header() -> None:
    assert read(b"content-length: 2\r\n\r\n{}", bytewise=False) == ([b"{}"], Framing.LSP)


def test_the_decision_stands_whatever_comes_later() -> None:
    frames, framing = read(b"{}\n" + Framing.LSP.wrap(b"{}"), bytewise=False)
    assert framing is Framing.NDJSON
    assert frames[0] == b"{}"
    assert b"Content-Length: 2\r" in frames


def test_a_framing_can_be_fixed_beforehand() -> None:
    frames, framing = read(b"Content-Length\n", bytewise=False, framing=Framing.NDJSON)
    assert (frames, framing) == ([b"Content-Length"], Framing.NDJSON)


def test_a_byte_order_mark_is_skipped_at_the_start_only() -> None:
    assert read(BOM + b"one\n" + BOM + b"two\n", bytewise=True)[0] == [b"one", BOM + b"two"]


@pytest.mark.parametrize("bytewise", [False, True])
def test_a_byte_order_mark_behind_a_blank_is_none(bytewise: bool) -> None:
    assert read(b" " + BOM + b"one\n", bytewise=bytewise) == ([BOM + b"one"], Framing.NDJSON)


def test_nothing_but_blanks_decides_nothing() -> None:
    assert read(b" \n\n", bytewise=False) == ([], None)


def test_a_line_too_long_can_be_skipped_and_a_message_too_long_cannot() -> None:
    lines, _ = read(b"x" * 101 + b"\n{}\n", bytewise=False)
    assert isinstance(lines[0], FrameTooLarge)
    assert lines[1] == b"{}"
    messages, _ = read(Framing.LSP.wrap(b"x" * 101) + Framing.LSP.wrap(b"{}"), bytewise=False)
    assert isinstance(messages[0], FramingLost)
    assert len(messages) == 1


@pytest.mark.parametrize("framing", list(Framing))
def test_what_is_wrapped_can_be_read(framing: Framing) -> None:
    frame = '{"text":"é🙂"}'.encode()
    assert read(framing.wrap(frame) * 2, bytewise=True) == ([frame, frame], framing)
