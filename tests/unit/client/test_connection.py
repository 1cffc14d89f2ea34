"""What goes over the wire, and when."""

import anyio
import pytest
from support.scripted_server import ScriptedServer, joined, talking

from mlx_sidecar.client import Sidecar, SidecarDisconnected, SidecarError, SidecarRequestError

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


async def test_a_request_too_long_for_the_server_is_refused_here() -> None:
    async with talking(maxFrameBytes=1000) as (sidecar, server):
        with pytest.raises(SidecarRequestError, match="at most 1000") as caught:
            await sidecar.tokenize("model", text="x" * 1000)
        assert (caught.value.kind, caught.value.retryable) == ("invalid_request", False)
        generation = sidecar.generate("model", prompt="short")
        # The first that the server hears of, so of the other it has heard nothing.
        request = await server.expect("generate")
        await server.end(request, 0)
        assert (await generation.result()).finish_reason == "stop"


async def test_a_server_that_is_not_ours_is_told_of_no_process_to_end_with() -> None:
    async def turn_away(server: ScriptedServer) -> None:
        assert (await server.expect("initialize"))["params"]["processId"] is None
        await server.hang_up()

    async with joined() as (server, stream), anyio.create_task_group() as tasks:
        tasks.start_soon(turn_away, server)
        with pytest.raises(SidecarDisconnected):
            async with Sidecar.over(stream):
                pass


async def test_a_request_that_is_cancelled_while_it_is_written_leaves_whole_lines() -> None:
    text = "x" * 8 * 1024 * 1024
    async with talking() as (sidecar, server):
        with anyio.move_on_after(0.01):
            await sidecar.tokenize("model", text=text)
        assert (await server.expect("tokenize"))["params"]["text"] == text
        await server.expect("$/cancelRequest")


@pytest.mark.parametrize("method", ["text", "result", "take"])
async def test_whoever_is_cancelled_while_waiting_for_an_answer_cancels_it(method: str) -> None:
    async with talking() as (sidecar, server), anyio.create_task_group() as tasks:
        generation = sidecar.generate("model", prompt="")
        tasks.start_soon(getattr(generation, method))
        request = await server.expect("generate")
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            assert (await server.expect("$/cancelRequest"))["params"]["id"] == request["id"]


async def test_a_loop_that_is_left_early_cancels_its_answer_once() -> None:
    async with talking() as (sidecar, server), sidecar.generate("model", prompt="") as generation:
        request = await server.expect("generate")
        await server.part(request, 1, "Once")
        await server.part(request, 2, " upon")
        async for part in generation:
            assert part.text == "Once"
            break
        await server.expect("$/cancelRequest")
        generation.cancel()
        await server.end(request, 2, "cancelled")
        assert (await generation.result()).finish_reason == "cancelled"


async def test_a_consumer_confirms_what_it_has_taken_by_half_windows() -> None:
    async with talking(window_bytes=1000) as (sidecar, server):
        parts = aiter(generation := sidecar.generate("model", prompt=""))
        request = await server.expect("generate")
        for seq in range(1, 6):
            await server.part(request, seq, "é" * 100)
            assert (await anext(parts)).seq == seq
        # 200 bytes each, so half of the window is there with the third.
        sidecar.generate("model", prompt="what comes behind it")
        ack = await server.expect("$/streamAck")
        assert ack["params"] == {"token": request["params"]["partialResultToken"], "seq": 3}
        await server.expect("generate")
        await server.end(request, 5)
        assert (await generation.result()).finish_reason == "stop"


async def test_an_answer_that_nobody_reads_is_confirmed_by_nobody_and_ends_all_the_same() -> None:
    async with talking(window_bytes=10) as (sidecar, server):
        generation = sidecar.generate("model", prompt="")
        request = await server.expect("generate")
        await server.part(request, 1, "Once upon ")
        await server.part(request, 2, "a time")
        await server.end(request, 2)
        assert (await generation.result()).last_seq == 2
        assert await generation.text() == "Once upon a time"
        sidecar.generate("model", prompt="what comes next")
        await server.expect("generate")


async def test_a_part_that_was_lost_is_noticed() -> None:
    async with talking() as (sidecar, server):
        generation = sidecar.generate("model", prompt="")
        request = await server.expect("generate")
        await server.part(request, 1, "Once")
        await server.send_text("a library says hello")
        await server.part(request, 2, " upon")
        await server.end(request, 2)
        with pytest.raises(SidecarError, match="2 parts 1 came"):
            await generation.text()


async def test_an_answer_of_another_protocol_is_an_error_of_ours() -> None:
    async def answer(server: ScriptedServer) -> None:
        request = await server.expect("ping")
        await server.send({"id": request["id"], "result": {"state": 5}})

    async with talking() as (sidecar, server), anyio.create_task_group() as tasks:
        tasks.start_soon(answer, server)
        with pytest.raises(SidecarError, match="'ping' cannot be understood"):
            await sidecar.ping()


async def test_everybody_who_waits_for_one_answer_gets_it() -> None:
    async with talking() as (sidecar, server):
        generation = sidecar.generate("model", prompt="")
        request = await server.expect("generate")
        results: list[str] = []

        async def wait() -> None:
            results.append((await generation.result()).finish_reason)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            await server.part(request, 1, "Once")
            await server.end(request, 1)
        assert results == ["stop"] * 3
