import os
import threading

import anyio
import pytest

from mlx_sidecar.runtime.server.outbox import Outbox

pytestmark = pytest.mark.anyio


async def test_frames_of_one_turn_go_out_in_order_and_together() -> None:
    read_end, write_end = os.pipe()
    outbox = Outbox(write_end, lambda: None)
    for frame in (b"one\n", b"two\n", b"three\n"):
        outbox.send(frame)
    # A pipe returns what one write put in, as long as it is read before the next.
    assert await anyio.to_thread.run_sync(os.read, read_end, 1000) == b"one\ntwo\nthree\n"
    outbox.close(10)


async def test_a_callback_runs_when_what_was_sent_before_it_has_been_written() -> None:
    read_end, write_end = os.pipe()
    outbox = Outbox(write_end, lambda: None)
    outbox.send(b"answer\n")
    outbox.then(lambda: os.close(write_end))
    assert await anyio.to_thread.run_sync(os.read, read_end, 1000) == b"answer\n"
    assert await anyio.to_thread.run_sync(os.read, read_end, 1000) == b""
    outbox.close(10)


async def test_close_writes_what_is_queued() -> None:
    read_end, write_end = os.pipe()
    outbox = Outbox(write_end, lambda: None)
    outbox.send(b"last\n")
    outbox.close(10)
    assert os.read(read_end, 1000) == b"last\n"


async def test_a_large_frame_is_written_whole_through_a_small_pipe() -> None:
    read_end, write_end = os.pipe()
    outbox = Outbox(write_end, lambda: None)
    outbox.send(b"x" * 1_000_000)
    received = 0
    while received < 1_000_000:
        received += len(await anyio.to_thread.run_sync(os.read, read_end, 65536))
    outbox.close(10)


async def test_a_peer_that_does_not_read_holds_up_nobody_who_sends() -> None:
    read_end, write_end = os.pipe()
    outbox = Outbox(write_end, lambda: None)
    for _ in range(50):
        outbox.send(b"x" * 100_000)
        await anyio.lowlevel.checkpoint()
    os.close(read_end)
    outbox.close(10)


async def test_a_peer_that_went_away_is_reported_once() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    broken = threading.Semaphore(0)
    outbox = Outbox(write_end, broken.release)
    outbox.send(b"one")
    assert await anyio.to_thread.run_sync(lambda: broken.acquire(timeout=10))
    outbox.send(b"two")
    await anyio.lowlevel.checkpoint()
    outbox.close(10)
    assert not broken.acquire(blocking=False)
