"""The Python client against the real server: over a socket with others, and with a process of its own.

Whatever the server says to it in here must be valid by the schema.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream
from support.checked_stream import CheckedStream
from support.scripted_server import ScriptedServer, talking
from support.tiny_adapter import random_matrices, write_mlx_lm
from support.tiny_model import END, HIDDEN, LAYERS, make_tokenizer
from support.wire import COMMAND, PATIENCE_SECONDS, Listening

from mlx_sidecar.client import (
    Sidecar,
    SidecarDisconnected,
    SidecarExited,
    SidecarNotStarted,
    SidecarRequestError,
    SyncSidecar,
    Transport,
)
from mlx_sidecar.client.connection import Connection
from mlx_sidecar.protocol.messages import LoadProgress

pytestmark = pytest.mark.anyio

SERVE = [COMMAND, "serve"]
NO_END = {str(make_tokenizer().token_to_id(END)): -1000}
SHORT: dict[str, Any] = {"prompt": "hello world", "maxTokens": 8, "logitBias": NO_END}
ENDLESS: dict[str, Any] = {"tokens": [1], "maxTokens": 2**19, "logitBias": NO_END}


@pytest.fixture(params=["asyncio", "uvloop", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str | tuple[str, dict[str, bool]]:
    return ("asyncio", {"use_uvloop": True}) if request.param == "uvloop" else request.param


@pytest.fixture(autouse=True)
def problems(monkeypatch: pytest.MonkeyPatch) -> Generator[list[str]]:
    """What was wrong with what servers said; a test fails if anything is left in it."""
    found: list[str] = []
    run = Connection.run

    async def run_checked(connection: Connection, stream: ByteStream) -> None:
        await run(connection, CheckedStream(stream, found))

    monkeypatch.setattr(Connection, "run", run_checked)
    yield found
    assert found == []


@pytest.fixture
def path(listening_server: Listening) -> Path:
    """The socket of a server that has both models loaded."""
    return listening_server.path


@pytest.fixture
def other_model(roomy_model: Path, tmp_path: Path) -> Path:
    """One that nobody has loaded yet, with room for answers that only end by force."""
    return Path(shutil.copytree(roomy_model, tmp_path / "other"))


async def test_a_server_that_does_not_keep_to_the_schema_is_found(problems: list[str]) -> None:
    async def answer(server: ScriptedServer, others: dict[str, Any]) -> None:
        request = await server.expect("ping")
        pong = {"state": "ready", "uptimeMs": 1, "inFlight": 0, "lastStepAgeMs": None}
        await server.send({"id": request["id"], "result": pong | others})

    async with talking() as (sidecar, server), anyio.create_task_group() as tasks:
        for others in ({}, {"gossip": 1}):
            assert problems == []
            tasks.start_soon(answer, server, others)
            await sidecar.ping()
        await server.send_text("Loading 100%\n")
    unknown, stray = problems
    assert "'gossip' was unexpected" in unknown
    assert "Expecting value" in stray
    problems.clear()


# -- over a socket --


async def test_an_answer_is_streamed_and_its_result_known(path: Path, tiny_model: Path) -> None:
    async with Sidecar.connect(path) as sidecar:
        generation = sidecar.generate(str(tiny_model), **SHORT)
        parts = [part async for part in generation]
        result = await generation.result()
        assert (result.finish_reason, result.last_seq) == ("length", parts[-1].seq)
        assert result.usage.completion_tokens == sum(len(part.tokens) for part in parts) == 8
        again = sidecar.generate(str(tiny_model), **SHORT)
        assert await again.text() == "".join(part.text for part in parts)


async def test_errors_are_typed_and_the_next_request_works(path: Path) -> None:
    async with Sidecar.connect(path) as sidecar:
        with pytest.raises(SidecarRequestError) as caught:
            await sidecar.generate("nothing", prompt="x").text()
        assert caught.value.kind == "model_not_loaded"
        with pytest.raises(SidecarRequestError) as caught:
            await sidecar.load("nothing", nonsense=1)
        assert (caught.value.kind, caught.value.data["path"]) == ("invalid_params", "nonsense")
        assert (await sidecar.ping()).state == "ready"


async def test_a_load_that_is_given_up_by_its_watcher_is_not_there(path: Path, other_model: Path) -> None:
    def enough(_: LoadProgress) -> None:
        raise ZeroDivisionError

    async with Sidecar.connect(path) as sidecar:
        with pytest.raises(ZeroDivisionError):
            await sidecar.load(str(other_model), on_progress=enough)
        with pytest.raises(SidecarRequestError) as caught:
            await sidecar.tokenize(str(other_model), text="hello")
        assert caught.value.kind == "model_not_loaded"


async def test_whoever_is_forced_out_of_a_model_is_told_behind_the_parts_that_came(
    path: Path, other_model: Path
) -> None:
    async with Sidecar.connect(path) as sidecar:
        model = (await sidecar.load(str(other_model))).model
        generation = sidecar.generate(model, **ENDLESS)
        assert await generation.take()
        assert (await sidecar.unload(model, force=True)).state == "unloaded"
        with pytest.raises(SidecarRequestError) as caught:
            await generation.text()
        assert (caught.value.kind, caught.value.data["model"]) == ("unloaded", model)


async def test_identical_answers_are_worked_out_once_and_whole_for_everybody(
    path: Path, roomy_model: Path
) -> None:
    async with Sidecar.connect(path) as sidecar, Sidecar.connect(path) as other:
        params = SHORT | {"maxTokens": 200, "priority": "high"}
        answers = [one.generate(str(roomy_model), **params) for one in (sidecar, other)]
        alone = sidecar.generate(str(roomy_model), **params, deduplicate=False)
        texts = {await answer.text() for answer in (*answers, alone)}
        assert len(texts) == 1
        assert sorted([(await answer.result()).shared for answer in answers]) == [False, True]
        assert not (await alone.result()).shared


async def test_a_deadline_is_a_typed_error_behind_the_parts_that_came(path: Path, roomy_model: Path) -> None:
    async with Sidecar.connect(path) as sidecar:
        generation = sidecar.generate(str(roomy_model), **ENDLESS, deadlineMs=500)
        parts: list[str] = []

        async def consume() -> None:
            async for part in generation:
                parts.append(part.text)

        with pytest.raises(SidecarRequestError) as caught:
            await consume()
        assert (caught.value.kind, caught.value.data["neverStarted"]) == ("deadline_exceeded", False)
        assert parts


async def test_a_loop_that_is_left_early_cancels_on_the_server(path: Path, roomy_model: Path) -> None:
    async with Sidecar.connect(path) as sidecar:
        cancelled_before = (await sidecar.stats()).requests.cancelled
        generation = sidecar.generate(str(roomy_model), **ENDLESS)
        async for _ in generation:
            break
        assert (await generation.result()).finish_reason == "cancelled"
        assert (await sidecar.stats()).requests.cancelled == cancelled_before + 1


async def test_an_answer_that_takes_too_long_is_cancelled_on_the_server(
    path: Path, roomy_model: Path
) -> None:
    async with Sidecar.connect(path) as sidecar:
        generation = sidecar.generate(str(roomy_model), **ENDLESS)
        with pytest.raises(TimeoutError), anyio.fail_after(0.05):
            await generation.text()
        assert (await generation.result()).finish_reason == "cancelled"


async def test_several_answers_at_once_are_kept_apart(path: Path, tiny_model: Path) -> None:
    async with Sidecar.connect(path) as sidecar:

        def ask(prompt: str) -> Any:
            return sidecar.generate(str(tiny_model), **SHORT | {"prompt": prompt})

        prompts = ["he" * n for n in range(1, 6)]
        alone = [await ask(prompt).text() for prompt in prompts]
        together = [ask(prompt) for prompt in prompts]
        assert [await generation.text() for generation in together] == alone


@pytest.mark.parametrize("window_bytes", [1, 20, 10_000])
async def test_the_same_text_comes_through_any_window(
    path: Path, tiny_model: Path, window_bytes: int
) -> None:
    async with Sidecar.connect(path, window_bytes=window_bytes) as sidecar:
        params = SHORT | {"maxTokens": 40}
        generation = sidecar.generate(str(tiny_model), **params)
        text = await generation.text()
        assert len(text.encode()) == (await generation.result()).text_bytes
        unread = sidecar.generate(str(tiny_model), **params)
        assert (await unread.result()).finish_reason == "length"
        assert await unread.text() == text


async def test_what_nobody_takes_stays_with_the_server(path: Path, roomy_model: Path) -> None:
    async with Sidecar.connect(path, window_bytes=10) as sidecar:
        steps_before = (await sidecar.stats()).engine.steps
        generation = sidecar.generate(str(roomy_model), **ENDLESS)
        with anyio.fail_after(PATIENCE_SECONDS):
            while (await sidecar.stats()).engine.steps < steps_before + 60:
                pass
        generation.cancel()
        assert (await generation.result()).usage.completion_tokens > 30
        # Ten of a byte each, and the rest in one.
        assert len(await generation.take()) <= 11


async def test_a_client_that_leaves_ends_its_own_requests_only(path: Path, roomy_model: Path) -> None:
    async with Sidecar.connect(path) as stays:
        kept = stays.generate(str(roomy_model), **ENDLESS)
        await kept.take()
        async with Sidecar.connect(path) as leaves:
            left = leaves.generate(str(roomy_model), **ENDLESS)
            assert await leaves.close() is None
            assert (await left.result()).finish_reason == "cancelled"
            with pytest.raises(SidecarDisconnected):
                await leaves.ping()
        assert (await stays.stats()).engine.sequences == 1
        kept.cancel()


async def test_a_server_that_is_killed_disconnects_its_clients(socket_path: Path, tiny_model: Path) -> None:
    with Listening(socket_path) as server:
        async with Sidecar.connect(socket_path) as sidecar:
            model = (await sidecar.load(str(tiny_model))).model
            generation = sidecar.generate(model, **SHORT | {"maxTokens": 250})
            await generation.take()
            server.process.kill()
            with pytest.raises(SidecarDisconnected):
                await generation.text()
            with pytest.raises(SidecarDisconnected):
                await sidecar.ping()


async def test_a_socket_that_nobody_serves_says_what_to_do(socket_path: Path) -> None:
    with pytest.raises(SidecarNotStarted, match="Run `mlx-sidecar serve --listen` there"):
        async with Sidecar.connect(socket_path):
            pass


def test_the_client_that_waits_does_the_same(path: Path, tiny_model: Path, roomy_model: Path) -> None:
    with SyncSidecar.connect(path) as sidecar:
        generation = sidecar.generate(str(tiny_model), timeout=PATIENCE_SECONDS, **SHORT)
        parts = list(generation)
        assert sum(len(part.tokens) for part in parts) == generation.result().usage.completion_tokens == 8
        cancelled_before = sidecar.stats().requests.cancelled
        generation = sidecar.generate(str(roomy_model), **ENDLESS)
        for _ in generation:
            break
        assert generation.result().finish_reason == "cancelled"
        with pytest.raises(TimeoutError):
            sidecar.generate(str(roomy_model), timeout=0.05, **ENDLESS).text()
        while sidecar.stats(timeout=PATIENCE_SECONDS).engine.sequences:
            pass
        assert sidecar.stats().requests.cancelled == cancelled_before + 2
        assert sidecar.process_id is None
        assert sidecar.close() is None


# -- with a process of its own --


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the tiny model."""
    layers = {f"model.layers.{layer}.self_attn.q_proj": (HIDDEN, HIDDEN) for layer in range(LAYERS)}
    folder = tmp_path_factory.mktemp("adapters") / "poet"
    return write_mlx_lm(folder, random_matrices(layers, seed=1, rank=4))


@pytest.mark.parametrize("transport", ["stdio", "pipe"])
async def test_every_method_has_its_result(tiny_model: Path, adapter: Path, transport: Transport) -> None:
    async with Sidecar.spawn(SERVE, transport=transport) as sidecar:
        assert (await sidecar.server_info()).process_id == sidecar.process_id
        far: list[LoadProgress] = []
        loaded = await sidecar.load(str(tiny_model), dtype="float32", alias="writer", on_progress=far.append)
        model = loaded.model
        assert [part.seq for part in far] == list(range(1, len(far) + 1))
        assert far[-1].done_bytes == far[-1].total_bytes == loaded.bytes
        assert (await sidecar.reload("writer", on_progress=far.append)).state == "ready"
        assert (await sidecar.alias("poetess", "writer")).model == model
        assert (await sidecar.load_adapter("writer", "poet", adapter)).modules == LAYERS
        assert await sidecar.generate("writer", adapter="poet", **SHORT).text()
        assert (await sidecar.unload_adapter(model, "poet")).adapter == "poet"
        assert (await sidecar.models())[0].aliases == ["poetess", "writer"]
        assert (await sidecar.alias("writer", None)).previous == model
        with pytest.raises(SidecarRequestError) as caught:
            await sidecar.pull("no such model", revision="main")
        assert caught.value.kind == "pull_failed"
        tokens = await sidecar.tokenize(model, text="hello world")
        assert await sidecar.detokenize(model, tokens) == "hello world"
        assert [entry.model for entry in await sidecar.models()] == [model]
        assert (await sidecar.stats()).engine.state == "ready"
        assert (await sidecar.ping()).in_flight == 0
        assert (await sidecar.generate(model, **SHORT).result()).finish_reason == "length"
        assert (await sidecar.unload(model)).state == "unloaded"
        assert await sidecar.close() == 0


def test_every_method_of_the_client_that_waits_has_its_result(tiny_model: Path, adapter: Path) -> None:
    with SyncSidecar.spawn(SERVE) as sidecar:
        assert sidecar.server_info().process_id == sidecar.process_id
        far: list[LoadProgress] = []
        model = sidecar.load(
            str(tiny_model), dtype="float32", timeout=PATIENCE_SECONDS, on_progress=far.append
        ).model
        assert [part.seq for part in far] == list(range(1, len(far) + 1))
        assert sidecar.reload(model, timeout=PATIENCE_SECONDS).state == "ready"
        assert sidecar.alias("writer", model).previous is None
        assert sidecar.load_adapter("writer", "poet", adapter).rank == 4
        assert sidecar.generate("writer", adapter="poet", **SHORT).text()
        assert sidecar.unload_adapter("writer", "poet", force=True).model == model
        with pytest.raises(SidecarRequestError) as caught:
            sidecar.pull("no such model", revision="main")
        assert caught.value.kind == "pull_failed"
        assert sidecar.detokenize(model, sidecar.tokenize(model, text="hello world")) == "hello world"
        assert [entry.model for entry in sidecar.models()] == [model]
        assert sidecar.ping().in_flight == 0
        assert sidecar.unload(model).state == "unloaded"
        assert sidecar.close() == 0


@pytest.mark.parametrize("transport", ["stdio", "pipe"])
async def test_a_process_that_is_killed_fails_what_is_in_flight_with_its_last_words(
    roomy_model: Path, transport: Transport
) -> None:
    async with Sidecar.spawn(SERVE, transport=transport) as sidecar:
        model = (await sidecar.load(str(roomy_model))).model
        generation = sidecar.generate(model, **ENDLESS)
        await generation.take()
        assert sidecar.process_id is not None
        os.kill(sidecar.process_id, 9)
        with pytest.raises(SidecarExited) as caught:
            await generation.text()
        assert (caught.value.exit_code, caught.value.signal) == (-9, "SIGKILL")
        assert "MLX" in caught.value.stderr_tail
        with pytest.raises(SidecarExited):
            await sidecar.ping()


async def test_a_private_socket_is_gone_once_the_sidecar_has_connected(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(socket_path.parent))
    async with Sidecar.spawn(SERVE, transport="pipe"):
        assert list(socket_path.parent.iterdir()) == []


async def test_an_error_in_the_block_comes_out_as_itself_and_the_process_ends() -> None:
    process_ids: list[int | None] = []

    async def fail() -> None:
        async with Sidecar.spawn(SERVE) as sidecar:
            process_ids.append(sidecar.process_id)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    (process_id,) = process_ids
    assert process_id is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


@pytest.mark.parametrize("transport", ["stdio", "pipe"])
def test_no_sidecar_outlives_a_host_that_is_killed(tmp_path: Path, transport: str) -> None:
    fifo = tmp_path / "held-by-the-sidecar"
    os.mkfifo(fifo)
    command = ["sh", "-c", f'exec 9>{fifo}; exec {COMMAND} serve "$@"', "sh"]
    script = (
        "import time\n"
        "from mlx_sidecar.client import SyncSidecar\n"
        f"with SyncSidecar.spawn({command!r}, transport={transport!r}) as sidecar:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(1000)\n"
    )
    started = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    with started as host, fifo.open("rb") as held:
        assert host.stdout is not None
        assert host.stdout.readline() == b"ready\n"
        host.kill()
        # Ends when nobody has it open any more.
        assert held.read() == b""
