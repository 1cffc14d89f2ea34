"""The client and a process that misbehaves."""

import json
import os
import sys

import anyio
import pytest
from support import stub_sidecar

from mlx_sidecar.client import Sidecar, SidecarExited, SidecarNotStarted, Transport

pytestmark = pytest.mark.anyio


REPEAT = """
import socket, sys
said = sys.stdin
if "--pipe" in sys.argv:
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(sys.argv[-1])
    said = connected.makefile()
sys.stderr.write(said.readline())
"""
"""Writes the first message to stderr, and ends."""


@pytest.fixture(params=["asyncio", "uvloop", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str | tuple[str, dict[str, bool]]:
    return ("asyncio", {"use_uvloop": True}) if request.param == "uvloop" else request.param


async def test_lines_that_are_no_messages_cost_nothing() -> None:
    async with Sidecar.spawn(stub_sidecar.COMMAND) as sidecar:
        async for part in sidecar.generate("model", prompt="noisy"):
            assert part.text == "Once"
            break
        assert (await sidecar.ping()).in_flight == 0


async def test_a_flood_on_stderr_stops_nobody_and_its_end_is_kept() -> None:
    async with Sidecar.spawn(stub_sidecar.COMMAND) as sidecar:
        async for part in sidecar.generate("model", prompt="talkative"):
            assert part.text == "Once"
            break
        assert sidecar.process_id is not None
        os.kill(sidecar.process_id, 9)
        with pytest.raises(SidecarExited) as caught:
            await sidecar.generate("model", prompt="").text()
        assert caught.value.signal == "SIGKILL"
        assert caught.value.stderr_tail == "x" * 8 * 1024


async def test_a_death_is_noticed_though_another_process_holds_the_pipes() -> None:
    async with Sidecar.spawn(stub_sidecar.COMMAND) as sidecar:
        with pytest.raises(SidecarExited, match="SIGKILL"):
            await sidecar.generate("model", prompt="leaving").text()


async def test_a_process_that_does_not_answer_is_ended() -> None:
    with pytest.raises(SidecarNotStarted, match=r"did not answer within 0\.5 seconds"):
        async with Sidecar.spawn([*stub_sidecar.COMMAND, "deaf"], start_timeout=0.5):
            pass


@pytest.mark.parametrize("transport", ["stdio", "pipe"])
async def test_a_program_that_ends_at_once_is_told_with_its_stderr(transport: Transport) -> None:
    script = "import sys; print('cannot go on', file=sys.stderr); sys.exit(3)"
    with pytest.raises(SidecarExited, match="cannot go on") as caught:
        async with Sidecar.spawn([sys.executable, "-c", script], transport=transport):
            pass
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("transport", ["stdio", "pipe"])
async def test_a_process_of_ours_is_told_whom_to_end_with(transport: Transport) -> None:
    with pytest.raises(SidecarExited) as caught:
        async with Sidecar.spawn([sys.executable, "-c", REPEAT], transport=transport):
            pass
    assert json.loads(caught.value.stderr_tail)["params"]["processId"] == os.getpid()


async def test_a_missing_program_says_what_to_do() -> None:
    with pytest.raises(SidecarNotStarted, match="Install it, or pass `command`"):
        async with Sidecar.spawn(["/no/such/program"]):
            pass


async def test_a_block_that_is_cancelled_ends_its_process_in_order() -> None:
    exit_code: int | None = None
    with anyio.CancelScope() as scope:
        async with Sidecar.spawn(stub_sidecar.COMMAND) as sidecar:
            generation = sidecar.generate("model", prompt="")
            try:
                async for _ in generation:
                    scope.cancel()
            finally:
                exit_code = await sidecar.close()
    assert scope.cancelled_caught
    assert exit_code == 0
