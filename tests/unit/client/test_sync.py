"""The client that waits, with a sidecar whose answers never end by themselves."""

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import stub_sidecar

from mlx_sidecar.client import SidecarDisconnected, SidecarExited, SidecarRequestError, SyncSidecar
from mlx_sidecar.protocol.messages import LoadProgress

PATIENCE_SECONDS = 30


@pytest.fixture
def sidecar() -> Generator[SyncSidecar]:
    with SyncSidecar.spawn(stub_sidecar.COMMAND) as sidecar:
        yield sidecar


def test_a_loop_that_is_left_early_cancels_its_answer(sidecar: SyncSidecar) -> None:
    generation = sidecar.generate("model", prompt="", timeout=PATIENCE_SECONDS)
    for part in generation:
        assert part.text == "Once"
        assert sidecar.ping().in_flight == 1
        break
    assert sidecar.ping().in_flight == 0
    assert generation.result().finish_reason == "cancelled"


def test_an_answer_that_takes_too_long_is_cancelled(sidecar: SyncSidecar) -> None:
    generation = sidecar.generate("model", prompt="", timeout=0.05)
    with pytest.raises(TimeoutError):
        generation.text()
    assert sidecar.ping().in_flight == 0


def test_a_block_that_is_left_cancels_its_answer(sidecar: SyncSidecar) -> None:
    with sidecar.generate("model", prompt="") as generation:
        assert sidecar.ping().in_flight == 1
    assert generation.result().finish_reason == "cancelled"


def test_threads_can_share_a_sidecar(sidecar: SyncSidecar) -> None:
    def ask(_: int) -> str:
        for part in sidecar.generate("model", prompt="", timeout=PATIENCE_SECONDS):
            return part.text
        return "nothing"

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(32))) == ["Once"] * 32
    assert sidecar.ping().in_flight == 0


def test_a_thread_that_waits_is_told_when_another_ends_the_sidecar(sidecar: SyncSidecar) -> None:
    generation = sidecar.generate("model", prompt="")
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(generation.result)
        assert sidecar.close() == 0
        assert waiting.result(PATIENCE_SECONDS).finish_reason == "cancelled"
    with pytest.raises(SidecarExited):
        sidecar.ping()


def test_how_far_a_load_is_is_told_to_the_thread_that_waits(sidecar: SyncSidecar) -> None:
    told: list[tuple[int, str, int]] = []

    def watch(progress: LoadProgress) -> None:
        # One that could not ask back would be in the event loop's thread.
        told.append((progress.seq, sidecar.ping().state, threading.get_ident()))

    assert sidecar.load("small", on_progress=watch, timeout=PATIENCE_SECONDS).state == "ready"
    assert told == [(1, "ready", threading.get_ident())]


def test_a_load_that_takes_too_long_is_cancelled(sidecar: SyncSidecar) -> None:
    with pytest.raises(TimeoutError):
        sidecar.load("large", on_progress=lambda _: None, timeout=0.05)
    assert sidecar.ping().in_flight == 0


def test_what_the_watcher_of_a_load_raises_cancels_it(sidecar: SyncSidecar) -> None:
    def fail(_: LoadProgress) -> None:
        assert sidecar.ping().in_flight == 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sidecar.load("large", on_progress=fail)
    assert sidecar.ping().in_flight == 0


def test_a_refusal_is_raised(sidecar: SyncSidecar) -> None:
    with pytest.raises(SidecarRequestError) as caught:
        sidecar.tokenize("model", text="x" * 64 * 1024 * 1024)
    assert caught.value.kind == "invalid_request"


def test_after_its_block_a_sidecar_is_gone() -> None:
    with SyncSidecar.spawn(stub_sidecar.COMMAND) as sidecar:
        generation = sidecar.generate("model", prompt="")
        parts = iter(generation)
        next(parts)
    with pytest.raises(SidecarDisconnected):
        sidecar.ping()
    with pytest.raises(SidecarDisconnected):
        sidecar.load("small", on_progress=print)
    generation.cancel()
    del parts


def test_an_error_in_the_block_comes_out_as_itself() -> None:
    with pytest.raises(ZeroDivisionError), SyncSidecar.spawn(stub_sidecar.COMMAND):
        raise ZeroDivisionError
