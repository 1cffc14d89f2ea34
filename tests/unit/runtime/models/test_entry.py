import anyio
import pytest

from mlx_sidecar.protocol.errors import InvalidModel
from mlx_sidecar.protocol.messages import LoadParams
from mlx_sidecar.runtime.models.entry import Attempt, Entry

pytestmark = pytest.mark.anyio


async def waiting(attempt: Attempt, outcomes: list[str]) -> None:
    try:
        await attempt.wait()
        outcomes.append("done")
    except InvalidModel:
        outcomes.append("failed")


async def test_everybody_who_waits_for_an_attempt_gets_its_end() -> None:
    for error, expected in ((None, "done"), (InvalidModel("m", "it is broken"), "failed")):
        attempt, outcomes = Attempt(), list[str]()
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(waiting, attempt, outcomes)
            await anyio.wait_all_tasks_blocked()
            attempt.end(error)
        assert outcomes == [expected] * 3


async def test_an_attempt_is_given_up_when_the_last_who_waits_gives_up() -> None:
    attempt, scopes = Attempt(), [anyio.CancelScope(), anyio.CancelScope()]

    async def wait_within(scope: anyio.CancelScope) -> None:
        with scope:
            await attempt.wait()

    async with anyio.create_task_group() as tasks:
        for scope in scopes:
            tasks.start_soon(wait_within, scope)
        await anyio.wait_all_tasks_blocked()
        scopes[0].cancel()
        await anyio.wait_all_tasks_blocked()
        assert not attempt.scope.cancel_called
        scopes[1].cancel()
    assert attempt.scope.cancel_called


async def test_a_time_to_live_of_its_own_goes_before_the_default() -> None:
    entry = Entry("m", LoadParams(model="m"))
    assert entry.ttl_seconds(None) is None
    assert entry.ttl_seconds(2000) == 2
    entry.ttl_ms = 500
    assert entry.ttl_seconds(2000) == 0.5
    entry.ttl_ms = None
    assert entry.ttl_seconds(2000) is None
