import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from mlx_sidecar.protocol.errors import ModelNotFound
from mlx_sidecar.protocol.framing import FrameReader
from mlx_sidecar.runtime.server.connection import Call, Connection, Handler
from mlx_sidecar.runtime.server.outbox import Outbox

pytestmark = pytest.mark.anyio


class Peer:
    """A connection over a pipe, with handlers of the test's own behind real method names."""

    def __init__(self, connection: Connection, outbox: Outbox, read_end: int) -> None:
        self.connection = connection
        self._outbox = outbox
        self._read_end = read_end

    def send(self, request_id: int | str | None, method: str, **params: Any) -> None:
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
        if request_id is not None:
            message["id"] = request_id
        self.connection.feed(json.dumps(message).encode() + b"\n")

    def answers(self) -> dict[Any, Any]:
        """Close the pipe and return id -> result or error kind; each id must have been answered once."""
        self._outbox.close(10)
        frames = [json.loads(line) for line in os.read(self._read_end, 100_000).splitlines()]
        found = {
            frame["id"]: frame.get("result", frame.get("error", {}).get("data", {}).get("kind"))
            for frame in frames
        }
        assert len(found) == len(frames)
        return found


@asynccontextmanager
async def peer(**handlers: Handler) -> AsyncGenerator[Peer]:
    read_end, write_end = os.pipe()
    outbox = Outbox(write_end, lambda: None)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            connection = Connection(outbox, tasks, handlers, lambda _: None, lambda: None, FrameReader())
            connection.initialized = True
            yield Peer(connection, outbox, read_end)
            tasks.cancel_scope.cancel()
    os.close(read_end)


def answering(value: object) -> Handler:
    def answer(_: Any, __: Call) -> object:
        return value

    return answer


async def forever(_: Any, __: Call) -> None:
    await anyio.sleep_forever()


async def test_requests_are_answered_in_whatever_order_they_end() -> None:
    first_may_end = anyio.Event()

    async def models(_: Any, __: Call) -> str:
        await first_may_end.wait()
        return "first"

    async with peer(models=models, stats=answering("second")) as host:
        host.send(1, "models")
        host.send(2, "stats")
        first_may_end.set()
        await host.connection.settled()
        assert host.answers() == {2: "second", 1: "first"}


async def test_a_handler_that_answers_at_once_is_done_before_the_next_frame() -> None:
    seen: list[str] = []

    def models(_: Any, __: Call) -> None:
        seen.append("models")

    def stats(_: Any, __: Call) -> list[str]:
        return list(seen)

    async with peer(models=models, stats=stats) as host:
        host.send(1, "models")
        host.send(2, "stats")
        assert host.answers() == {1: None, 2: ["models"]}


async def test_errors_have_their_kind_and_defects_are_internal_errors_without_details() -> None:
    def fails(_: Any, __: Call) -> None:
        raise ModelNotFound("x")

    async def breaks(_: Any, __: Call) -> None:
        raise RuntimeError("/secret/path")

    async with peer(models=fails, stats=breaks) as host:
        host.send(1, "models")
        host.send(2, "stats")
        await host.connection.settled()
        assert host.answers() == {1: "model_not_found", 2: "internal_error"}


async def test_a_second_request_with_an_id_in_flight_is_refused_and_the_first_goes_on() -> None:
    async with peer(models=forever) as host:
        host.send("a", "models")
        host.send("a", "models")
        assert host.connection.in_flight == 1
        assert host.answers() == {"a": "duplicate_id"}


async def test_an_id_can_be_used_again_after_its_answer() -> None:
    async with peer(stats=answering(1)) as host:
        host.send(1, "stats")
        assert host.connection.in_flight == 0
        host.send(1, "stats")
        assert host.connection.in_flight == 0


async def test_a_cancel_ends_the_handler_and_is_answered() -> None:
    async with peer(models=forever) as host:
        host.send(1, "models")
        await anyio.lowlevel.checkpoint()
        host.send(None, "$/cancelRequest", id=1)
        await host.connection.settled()
        assert host.answers() == {1: "cancelled"}


async def test_a_cancel_before_the_handler_ran_is_answered_too() -> None:
    async with peer(models=forever) as host:
        host.send(1, "models")
        host.send(None, "$/cancelRequest", id=1)
        await host.connection.settled()
        assert host.answers() == {1: "cancelled"}


async def test_cancelling_what_is_not_in_flight_does_nothing() -> None:
    async with peer(stats=answering(1)) as host:
        host.send(None, "$/cancelRequest", id=99)
        host.send(1, "stats")
        host.send(None, "$/cancelRequest", id=1)
        assert host.answers() == {1: 1}


async def test_a_handler_may_turn_a_cancel_into_a_result() -> None:
    async def models(_: Any, call: Call) -> str:
        asked = anyio.Event()
        call.on_cancel = asked.set
        await asked.wait()
        return "what there is so far"

    async with peer(models=models) as host:
        host.send(1, "models")
        await anyio.lowlevel.checkpoint()
        host.send(None, "$/cancelRequest", id=1)
        await host.connection.settled()
        assert host.answers() == {1: "what there is so far"}


async def test_before_initialize_only_the_exempt_methods_answer() -> None:
    async with peer(models=answering(1), ping=answering("pong")) as host:
        host.connection.initialized = False
        host.send(1, "models")
        host.send(2, "ping")
        assert host.answers() == {1: "not_initialized", 2: "pong"}


async def test_after_shutdown_requests_are_refused() -> None:
    async with peer(ping=answering(1)) as host:
        host.connection.shut_down = True
        host.send(1, "ping")
        assert host.answers() == {1: "shutting_down"}


async def test_notifications_are_never_answered_whatever_they_say() -> None:
    async with peer(ping=answering("pong")) as host:
        host.send(None, "ping")
        host.send(None, "no/such/method")
        host.send(None, "$/cancelRequest", wrong=1)
        host.send(1, "ping")
        assert host.answers() == {1: "pong"}


async def test_requests_in_flight_are_answered_when_everything_ends() -> None:
    read_end, write_end = os.pipe()
    outbox = Outbox(write_end, lambda: None)
    hosts: list[Peer] = []
    async with anyio.create_task_group() as tasks:
        connection = Connection(
            outbox, tasks, {"models": forever}, lambda _: None, lambda: None, FrameReader()
        )
        connection.initialized = True
        hosts.append(Peer(connection, outbox, read_end))
        hosts[0].send(1, "models")
        await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    assert hosts[0].answers() == {1: "cancelled"}
