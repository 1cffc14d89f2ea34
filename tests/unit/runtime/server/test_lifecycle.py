import os
import subprocess
import sys

import anyio
import pytest

from mlx_sidecar.runtime.server.lifecycle import (
    HOST_DIED,
    Ending,
    Lifecycle,
    ending_of_host,
    engine_died,
    watch_host,
)
from mlx_sidecar.runtime.server.peer import PeerEvent

pytestmark = pytest.mark.anyio

PATIENT = Ending("patient", 0, grace=True)
HASTY = Ending("hasty", 143)


async def test_the_first_hasty_reason_stays() -> None:
    lifecycle = Lifecycle()
    lifecycle.end(HASTY)
    lifecycle.end(PATIENT)
    lifecycle.end(Ending("another", 1))
    assert await lifecycle.wait() == HASTY


async def test_a_hasty_reason_replaces_a_patient_one_and_whoever_waits_beyond_it_is_told() -> None:
    lifecycle = Lifecycle()
    lifecycle.end(PATIENT)
    lifecycle.end(Ending("patient too", 0, grace=True))
    assert await lifecycle.wait() == PATIENT
    found: list[Ending] = []

    async def wait() -> None:
        found.append(await lifecycle.wait(beyond=PATIENT))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(wait)
            await anyio.lowlevel.checkpoint()
            assert found == []
            lifecycle.end(HASTY)
    assert found == [HASTY] * 3


@pytest.mark.parametrize(
    ("event", "shut_down", "code", "grace"),
    [
        (PeerEvent.INPUT_ENDED, False, 0, True),
        (PeerEvent.INPUT_ENDED, True, 0, True),
        (PeerEvent.EXIT, True, 0, False),
        (PeerEvent.EXIT, False, 1, False),
        (PeerEvent.GONE, False, 0, False),
        (PeerEvent.BROKEN, False, 1, False),
        (PeerEvent.FRAMING_LOST, False, 1, False),
    ],
)
async def test_what_becomes_of_the_host_decides_the_exit_code(
    event: PeerEvent, shut_down: bool, code: int, grace: bool
) -> None:
    ending = ending_of_host(event, shut_down=shut_down)
    assert (ending.exit_code, ending.grace) == (code, grace)


async def test_an_engine_that_ran_out_of_memory_has_a_code_of_its_own() -> None:
    assert engine_died(MemoryError()).exit_code == 71
    assert engine_died(RuntimeError()).exit_code == 70


async def test_the_end_of_the_host_process_is_noticed() -> None:
    host = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    endings: list[Ending] = []
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch_host, host.pid, endings.append)
            await anyio.lowlevel.checkpoint()
            assert endings == []
            host.communicate()
    assert endings == [HOST_DIED]


async def test_a_process_of_somebody_else_counts_as_alive() -> None:
    with anyio.move_on_after(0.1) as watching:
        await watch_host(1 if os.geteuid() else os.getppid(), lambda _: None)
    assert watching.cancelled_caught


@pytest.mark.parametrize("process_id", [2**22 + 1, 2**31, 2**53 - 1])
async def test_a_number_that_no_process_has_is_a_host_that_has_died(process_id: int) -> None:
    endings: list[Ending] = []
    await watch_host(process_id, endings.append)
    assert endings == [HOST_DIED]
