import fcntl
import os
import socket
import struct
import tempfile
import termios
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from support.channels import PATIENCE_SECONDS, FarEnd

from mlx_sidecar.runtime.server.channel import Channel


@pytest.fixture
def far() -> Generator[FarEnd]:
    with FarEnd() as far:
        yield far


@pytest.fixture
def pipes() -> Generator[tuple[Channel, int, int]]:
    """A channel over two pipes; what it reads is written to the first descriptor, what it writes is read
    from the second."""
    (read, their_write), (their_read, write) = os.pipe(), os.pipe()
    yield Channel(read, write), their_write, their_read
    for end in (read, their_write, their_read, write):
        try:
            os.close(end)
        except OSError:
            continue


def ends(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(PATIENCE_SECONDS / 3)
    return not thread.is_alive()


def fill(channel: Channel) -> int:
    total = 0
    while written := channel.try_write(b"x" * 4096):
        total += written
    return total


def test_what_is_written_without_waiting_is_all_that_fits_into_a_socket(far: FarEnd) -> None:
    assert fill(far.channel) > 0
    assert far.channel.try_write(b"x") == 0
    far.socket.recv(1 << 20)
    assert far.channel.try_write(b"x") == 1


def test_what_is_written_without_waiting_is_all_that_fits_into_a_pipe(
    pipes: tuple[Channel, int, int],
) -> None:
    channel, _, their_read = pipes
    total = fill(channel)
    assert total > 0
    assert channel.try_write(b"x") == 0
    unread = bytearray(4)
    fcntl.ioctl(their_read, termios.FIONREAD, unread)
    assert struct.unpack("i", unread) == (total,)
    os.read(their_read, 1 << 20)
    assert channel.try_write(b"x") == 1


def test_a_file_takes_everything_at_once() -> None:
    with tempfile.TemporaryFile() as file:
        channel = Channel(file.fileno(), file.fileno())
        assert channel.try_write(b"x" * 1_000_000) == 1_000_000


def test_where_it_is_not_known_whether_a_write_waits_none_is_made() -> None:
    with Path(os.devnull).open("wb", buffering=0) as nowhere:
        channel = Channel(nowhere.fileno(), nowhere.fileno())
        assert channel.try_write(b"x") == 0
        channel.write_all(b"x" * 1_000_000)


def test_a_peer_that_has_gone_fails_both_ways_of_writing(far: FarEnd) -> None:
    far.close()
    with pytest.raises(OSError, match="pipe"):
        far.channel.try_write(b"x")
    with pytest.raises(OSError, match="pipe"):
        far.channel.write_all(b"x")


def test_a_pipe_that_nobody_reads_any_more_fails_both_ways_of_writing(
    pipes: tuple[Channel, int, int],
) -> None:
    channel, _, their_read = pipes
    os.close(their_read)
    with pytest.raises(OSError, match="pipe"):
        channel.try_write(b"x")
    with pytest.raises(OSError, match="pipe"):
        channel.write_all(b"x")


def test_input_is_seen_before_it_is_read_and_so_is_its_end(pipes: tuple[Channel, int, int]) -> None:
    channel, their_write, _ = pipes
    assert not channel.has_input()
    os.write(their_write, b"hello")
    assert channel.has_input()
    assert channel.read() == b"hello"
    os.close(their_write)
    assert channel.has_input()
    assert channel.read() == b""


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_descriptors_that_somebody_else_made_non_blocking_work_like_others(kind: str) -> None:
    # O_NONBLOCK belongs to the open file, and a parent that shares it may set it whenever it likes.
    if kind == "pipe":
        (read, their_write), (their_read, write) = os.pipe(), os.pipe()
    else:
        near, far = socket.socketpair()
        read = write = near.detach()
        their_read = their_write = far.detach()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    channel = Channel(read, write)
    heard: list[bytes] = []
    reading = ends(lambda: heard.append(channel.read()))
    writing = ends(lambda: channel.write_all(b"x" * 1_000_000))
    received = 0
    while received < 1_000_000:
        received += len(os.read(their_read, 1 << 20))
    assert ended(writing)
    os.write(their_write, b"late")
    assert ended(reading)
    assert heard == [b"late"]
    channel.release()
    for end in (read, write, their_read, their_write) if kind == "pipe" else (their_read,):
        os.close(end)


def test_closing_a_socket_ends_a_read_and_a_write_that_wait(far: FarEnd) -> None:
    heard: list[bytes] = []
    failed = threading.Event()

    def write() -> None:
        try:
            far.channel.write_all(b"x" * 10_000_000)
        except OSError:
            failed.set()

    reading, writing = ends(lambda: heard.append(far.channel.read())), ends(write)
    far.channel.close()
    assert ended(reading)
    assert ended(writing)
    assert heard == [b""]
    assert failed.is_set()


def test_what_was_written_before_closing_can_still_be_read(far: FarEnd) -> None:
    far.channel.write_all(b"last words")
    far.channel.close()
    assert far.socket.recv(100) == b"last words"
    assert far.socket.recv(100) == b""


def test_a_peer_that_only_stopped_talking_is_not_gone(far: FarEnd) -> None:
    far.socket.shutdown(socket.SHUT_WR)
    assert far.channel.read() == b""
    waiting = ends(far.channel.wait_until_gone)
    far.channel.write_all(b"still here")
    assert far.socket.recv(100) == b"still here"
    assert waiting.is_alive()
    far.close()
    assert ended(waiting)


def test_a_peer_that_closes_its_end_of_a_pipe_is_gone(pipes: tuple[Channel, int, int]) -> None:
    channel, their_write, their_read = pipes
    os.close(their_write)
    waiting = ends(channel.wait_until_gone)
    os.close(their_read)
    assert ended(waiting)


def test_a_channel_can_be_closed_and_released_in_any_order_and_often(far: FarEnd) -> None:
    far.channel.close()
    far.channel.close()
    far.channel.release()
    far.channel.close()
    far.channel.release()


def test_releasing_gives_the_descriptor_back() -> None:
    before = len(list(Path("/dev/fd").iterdir()))
    with FarEnd():
        pass
    assert len(list(Path("/dev/fd").iterdir())) == before
