"""The program around the client: how it is interrupted, and how it ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from subprocess import PIPE

import pytest

PATIENCE_SECONDS = 30

INTERRUPTED_ANSWER = """
from support import stub_sidecar
from mlx_sidecar.client import SyncSidecar

with SyncSidecar.spawn(stub_sidecar.COMMAND) as sidecar:
    generation = sidecar.generate("model", prompt="")
    try:
        for part in generation:
            print(part.text, flush=True)
    except KeyboardInterrupt:
        print(generation.result().finish_reason)
"""
INTERRUPTED_LOOP = """
import sys
import anyio
from support import stub_sidecar
from mlx_sidecar.client import Sidecar

async def main():
    async with Sidecar.spawn(stub_sidecar.COMMAND) as sidecar:
        try:
            async for part in sidecar.generate("model", prompt=""):
                print(part.text, flush=True)
        finally:
            with anyio.CancelScope(shield=True):
                print(await sidecar.close())

# Elsewhere a Ctrl-C can leave one of trio's own events with a waiter that no longer waits.
options = {"restrict_keyboard_interrupt_to_checkpoints": True} if sys.argv[1] == "trio" else {}
try:
    anyio.run(main, backend=sys.argv[1], backend_options=options)
except KeyboardInterrupt:
    print("interrupted")
"""
FORGETFUL = """
from support import stub_sidecar
from mlx_sidecar.client import SyncSidecar

opening = SyncSidecar.spawn(stub_sidecar.COMMAND)
print(opening.__enter__().ping().state)
"""


@contextmanager
def host(script: str, *arguments: str) -> Generator["subprocess.Popen[str]"]:
    """A program as a terminal runs it: with its children it is a group that gets signals together."""
    command = [sys.executable, "-c", script, *arguments]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=env, stdout=PIPE, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def rest_after_ctrl_c(process: "subprocess.Popen[str]") -> list[str]:
    """Interrupt when the first part has come; return what is said after that."""
    assert process.stdout is not None
    assert process.stdout.readline() == "Once\n"
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0
    return rest.splitlines()


def test_ctrl_c_cancels_the_answer_that_is_waited_for_and_the_sidecar_lives_on() -> None:
    with host(INTERRUPTED_ANSWER) as process:
        assert rest_after_ctrl_c(process) == ["cancelled"]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_ctrl_c_leaves_the_block_in_order(backend: str) -> None:
    with host(INTERRUPTED_LOOP, backend) as process:
        assert rest_after_ctrl_c(process) == ["0", "interrupted"]


def test_a_program_that_forgets_to_leave_the_block_ends_all_the_same() -> None:
    with host(FORGETFUL) as process:
        assert process.communicate(timeout=PATIENCE_SECONDS) == ("ready\n", None)
        assert process.returncode == 0
