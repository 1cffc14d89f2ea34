"""Pulls for clients, with real processes and a hub on the loopback interface."""

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import safetensors.numpy as safetensors
from support.stub_hub import StubHub
from support.tiny_model import make_tiny_model

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import PullFailed
from mlx_sidecar.runtime.models.pulling import Pulls, pull

PATIENCE_SECONDS = 60
HELD_AT = 11 * 1024 * 1024

pytestmark = pytest.mark.anyio


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[StubHub]:
    """A hub with acme/long, whose weights come in more than one piece, and the environment to reach it."""
    model = make_tiny_model(tmp_path / "tiny")
    arrays = dict(safetensors.load_file(model / "model.safetensors"))
    arrays["more"] = np.arange(3 * 1024 * 1024, dtype="f4")
    safetensors.save_file(arrays, model / "model.safetensors")
    with StubHub() as hub:
        hub.add("acme/long", {path.name: path.read_bytes() for path in model.iterdir()})
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.delenv("HF_HUB_CACHE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("MLX_SIDECAR_HOME", str(tmp_path / "home"))
        yield hub


def ignore(_: m.PullProgress) -> None:
    """Take progress that a test does not look at."""


async def held(hub: StubHub) -> None:
    """Wait until a download waits."""
    assert await anyio.to_thread.run_sync(hub.held.wait, PATIENCE_SECONDS)


def children() -> set[str]:
    """The children of this process, by what Linux knows."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


async def test_a_pull_tells_how_far_it_is_and_what_it_brought(hub: StubHub) -> None:
    told: list[m.PullProgress] = []
    result = await pull("acme/long", None, told.append)
    total = sum(len(data) for data in hub.repos["acme/long"].files.values())
    assert result == m.PullResult(model="acme/long", bytes=total, revision=hub.repos["acme/long"].commit)
    assert [part.seq for part in told] == list(range(1, len(told) + 1))
    assert (told[0].phase, told[0].done_bytes, told[0].total_bytes) == ("fetching", 0, total)
    assert (told[-1].phase, told[-1].done_bytes) == ("checking", total)


async def test_a_failure_says_why_without_paths(hub: StubHub) -> None:
    with pytest.raises(PullFailed, match="the hub has no repository acme/nothing"):
        await pull("acme/nothing", None, ignore)
    with pytest.raises(PullFailed, match="acme/long has no revision v9"):
        await pull("acme/long", "v9", ignore)
    hub.repos["acme/long"].files["config.json"] = b"[]"
    with pytest.raises(PullFailed, match=r"its config\.json is not a JSON object") as caught:
        await pull("acme/long", None, ignore)
    assert "/hf/" not in caught.value.message


@pytest.mark.parametrize("name", ["--help", "-x", "--revision=v1"])
async def test_a_name_that_looks_like_a_flag_is_a_name(hub: StubHub, name: str) -> None:
    with pytest.raises(PullFailed, match="is neither a known model"):
        await pull(name, None, ignore)
    assert hub.requests == []


async def test_a_cancel_ends_the_process(hub: StubHub) -> None:
    before = children()
    hub.hold("model.safetensors", HELD_AT)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pull, "acme/long", None, ignore)
        await held(hub)
        assert children() > before
        tasks.cancel_scope.cancel()
    assert children() == before


async def test_a_second_request_follows_the_first(hub: StubHub) -> None:
    hub.hold("model.safetensors", HELD_AT)
    told: list[list[int]] = [[], []]
    results: list[m.PullResult] = []
    async with anyio.create_task_group() as tasks:
        pulls = Pulls(tasks)

        async def ask(number: int) -> None:
            results.append(await pulls.pull("acme/long", None, lambda part: told[number].append(part.seq)))

        tasks.start_soon(ask, 0)
        await held(hub)
        tasks.start_soon(ask, 1)
        await anyio.lowlevel.checkpoint()
        hub.release()
    assert results[0] == results[1]
    assert hub.downloads().count("model.safetensors") == 1
    for seqs in told:
        assert seqs == list(range(1, len(seqs) + 1))
        assert seqs
    assert len(told[0]) >= len(told[1])


async def test_a_pull_goes_on_until_its_last_follower_has_left(hub: StubHub) -> None:
    before = children()
    hub.hold("model.safetensors", HELD_AT)
    scopes = [anyio.CancelScope(), anyio.CancelScope()]
    async with anyio.create_task_group() as tasks:
        pulls = Pulls(tasks)

        async def ask(scope: anyio.CancelScope, gone: anyio.Event) -> None:
            with scope:
                await pulls.pull("acme/long", None, ignore)
            gone.set()

        gone = [anyio.Event(), anyio.Event()]
        for scope, event in zip(scopes, gone, strict=True):
            tasks.start_soon(ask, scope, event)
        await held(hub)
        scopes[0].cancel()
        await gone[0].wait()
        assert children() > before
        scopes[1].cancel()
        await gone[1].wait()
    assert children() == before


async def test_a_pull_can_be_asked_for_again_once_it_was_cancelled(hub: StubHub) -> None:
    hub.hold("model.safetensors", HELD_AT)
    async with anyio.create_task_group() as tasks:
        pulls = Pulls(tasks)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as asking:
                asking.start_soon(pulls.pull, "acme/long", None, ignore)
                await held(hub)
                scope.cancel()
        hub.release()
        assert (await pulls.pull("acme/long", None, ignore)).bytes > HELD_AT


def test_a_pull_ends_with_whoever_started_it(hub: StubHub) -> None:
    hub.hold("model.safetensors", HELD_AT)
    command = [sys.executable, "-P", "-m", "mlx_sidecar.runtime", "pull", "--json", "--until-input-ends"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, "acme/long"], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    ) as child:
        assert hub.held.wait(PATIENCE_SECONDS)
        assert child.poll() is None
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(PATIENCE_SECONDS) != 0
