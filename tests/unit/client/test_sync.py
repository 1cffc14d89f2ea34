"""The client that waits, with a sidecar whose answers never end by themselves."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import stub_sidecar

from mlx_sidecar.client import SidecarDisconnected, SidecarExited, SidecarRequestError, SyncSidecar

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
    generation.cancel()
    del parts


def test_an_error_in_the_block_comes_out_as_itself() -> None:
    with pytest.raises(ZeroDivisionError), SyncSidecar.spawn(stub_sidecar.COMMAND):
        raise ZeroDivisionError
