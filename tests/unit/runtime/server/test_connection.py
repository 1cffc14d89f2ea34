from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from support.channels import FarEnd, line

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import ModelNotFound, SidecarError
from mlx_sidecar.runtime.api.lifecycle import shutdown
from mlx_sidecar.runtime.api.presence import PresenceApi
from mlx_sidecar.runtime.server.connection import Call, Connection, Handler
from mlx_sidecar.runtime.server.peer import Peer, PeerEvent
from mlx_sidecar.runtime.telemetry.vitals import Vitals

pytestmark = pytest.mark.anyio


class Host:
    """A connection with handlers of the test's own behind real method names."""

    def __init__(self, far: FarEnd, connection: Connection) -> None:
        self._far = far
        self.connection = connection
        self.events: list[PeerEvent] = []

    def send(self, request_id: int | str | None, method: str, **params: Any) -> None:
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
        self.say(message if request_id is None else message | {"id": request_id})

    def say(self, message: object) -> None:
        self.connection.take(self.connection.peer.intake.feed(line(message)))

    def messages(self) -> list[Any]:
        """Hang up and return everything that was said."""
        self.connection.flush()
        self.connection.peer.channel.close()
        return self._far.rest()

    def answers(self) -> dict[Any, Any]:
        """Hang up and return id -> result or error kind; each id must have been answered once."""
        messages = self.messages()
        found = {message["id"]: outcome(message) for message in messages}
        assert len(found) == len(messages)
        return found


def outcome(response: Any) -> Any:
    return response["error"]["data"]["kind"] if "error" in response else response["result"]


@asynccontextmanager
async def host(*, patience: float = 30, **handlers: Handler) -> AsyncGenerator[Host]:
    with anyio.fail_after(patience), FarEnd() as far:
        async with anyio.create_task_group() as tasks:
            peer = Peer(far.channel, PresenceApi(Vitals()).methods())
            events: list[PeerEvent] = []
            connection = Connection(
                peer, tasks, handlers, lambda _: None, lambda _, event: events.append(event)
            )
            peer.intake.initialized = True
            it = Host(far, connection)
            it.events = events
            yield it
            tasks.cancel_scope.cancel()


def answering(value: object) -> Handler:
    def answer(_: Any, __: Call) -> object:
        return value

    return answer


async def forever(_: Any, __: Call) -> None:
    await anyio.sleep_forever()


def part(seq: int) -> m.GenerateProgress:
    return m.GenerateProgress(seq=seq, text=f"{seq} ", tokens=[])


# Answers


async def test_requests_are_answered_in_whatever_order_they_end() -> None:
    first_may_end = anyio.Event()

    async def models(_: Any, __: Call) -> str:
        await first_may_end.wait()
        return "first"

    async with host(models=models, stats=answering("second")) as it:
        it.send(1, "models")
        it.send(2, "stats")
        first_may_end.set()
        await it.connection.settled()
        assert [message["id"] for message in it.messages()] == [2, 1]


async def test_a_handler_that_answers_at_once_is_done_before_the_next_frame() -> None:
    seen: list[str] = []

    def models(_: Any, __: Call) -> None:
        seen.append("models")

    def stats(_: Any, __: Call) -> list[str]:
        return list(seen)

    async with host(models=models, stats=stats) as it:
        it.send(1, "models")
        it.send(2, "stats")
        assert it.answers() == {1: None, 2: ["models"]}


async def test_errors_have_their_kind_and_defects_are_internal_errors_without_details() -> None:
    def fails(_: Any, __: Call) -> None:
        raise ModelNotFound("x")

    async def breaks(_: Any, __: Call) -> None:
        raise RuntimeError("/secret/path")

    async with host(models=fails, stats=breaks) as it:
        it.send(1, "models")
        it.send(2, "stats")
        await it.connection.settled()
        messages = it.messages()
        assert "secret" not in str(messages)
        assert {found["id"]: outcome(found) for found in messages} == {
            1: "model_not_found",
            2: "internal_error",
        }


async def test_a_second_request_with_an_id_in_flight_is_refused_and_the_first_goes_on() -> None:
    async with host(models=forever) as it:
        it.send("a", "models")
        it.send("a", "models")
        assert it.connection.peer.intake.in_flight == {"a"}
        assert it.answers() == {"a": "duplicate_id"}


async def test_an_id_can_be_used_again_after_its_answer() -> None:
    async with host(stats=answering(1)) as it:
        it.send(1, "stats")
        it.send(1, "stats")
        assert [message["result"] for message in it.messages()] == [1, 1]


async def test_what_one_turn_of_the_loop_answers_goes_out_in_one_write() -> None:
    async with host(stats=answering("x"), models=answering("y")) as it:
        it.send(1, "stats")
        it.send(2, "models")
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        assert it._far.socket.recv(1000).count(b"\n") == 2  # pyright: ignore[reportPrivateUsage]


# Cancels


async def test_a_cancel_ends_the_handler_and_is_answered() -> None:
    async with host(models=forever) as it:
        it.send(1, "models")
        await anyio.lowlevel.checkpoint()
        it.send(None, "$/cancelRequest", id=1)
        await it.connection.settled()
        assert it.answers() == {1: "cancelled"}


async def test_a_cancel_before_the_handler_ran_is_answered_too() -> None:
    async with host(models=forever) as it:
        it.send(1, "models")
        it.send(None, "$/cancelRequest", id=1)
        await it.connection.settled()
        assert it.answers() == {1: "cancelled"}


async def test_cancelling_what_is_not_in_flight_does_nothing() -> None:
    async with host(stats=answering(1), models=forever) as it:
        it.send(2, "models")
        it.send(None, "$/cancelRequest", id=99)
        it.send(None, "$/cancelRequest", id="2")
        it.send(1, "stats")
        it.send(None, "$/cancelRequest", id=1)
        await anyio.lowlevel.checkpoint()
        assert it.answers() == {1: 1}


async def test_a_handler_may_turn_a_cancel_into_a_result() -> None:
    async def models(_: Any, call: Call) -> str:
        asked = anyio.Event()
        call.on_cancel = asked.set
        await asked.wait()
        return "what there is so far"

    async with host(models=models) as it:
        it.send(1, "models")
        await anyio.lowlevel.checkpoint()
        it.send(None, "$/cancelRequest", id=1)
        await it.connection.settled()
        assert it.answers() == {1: "what there is so far"}


async def test_requests_in_flight_are_answered_when_everything_ends() -> None:
    async with anyio.create_task_group() as outer:
        async with host(models=forever) as it:
            it.send(1, "models")
            await anyio.lowlevel.checkpoint()
            it.connection._tasks.cancel_scope.cancel()  # pyright: ignore[reportPrivateUsage]
            with anyio.CancelScope(shield=True):
                await it.connection.settled()
            assert it.answers() == {1: "cancelled"}
        outer.cancel_scope.cancel()


# Shutdown, and waiting for the end


async def test_shutdown_is_answered_when_all_others_have_been() -> None:
    async with host(models=forever, shutdown=shutdown) as it:
        it.send(1, "models")
        await anyio.lowlevel.checkpoint()
        it.send(2, "shutdown")
        assert it.connection.shut_down
        await it.connection.settled()
        assert [(found["id"], outcome(found)) for found in it.messages()] == [(1, "cancelled"), (2, None)]


async def test_any_number_may_wait_for_the_last_answer() -> None:
    # A host that says `shutdown` and closes its pipe: the handler waits, and so does the end of the process.
    may_end = anyio.Event()

    async def models(_: Any, call: Call) -> str:
        call.on_cancel = lambda: None
        await may_end.wait()
        return "late"

    async with host(models=models, shutdown=shutdown, patience=5) as it:
        it.send(1, "models")
        await anyio.lowlevel.checkpoint()
        it.send(2, "shutdown")
        await anyio.lowlevel.checkpoint()
        async with anyio.create_task_group() as waiting:
            for _ in range(3):
                waiting.start_soon(it.connection.settled)
                await anyio.lowlevel.checkpoint()
            may_end.set()
        assert it.answers() == {1: "late", 2: None}


async def test_shutdown_and_exit_in_one_write_answer_the_shutdown() -> None:
    may_end = anyio.Event()

    async def models(_: Any, call: Call) -> str:
        call.on_cancel = may_end.set
        await may_end.wait()
        # The engine ends a sequence with its step, not at once.
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        return "cut short"

    async with host(models=models, shutdown=shutdown, patience=5) as it:
        it.send(1, "models")
        await anyio.lowlevel.checkpoint()
        it.send(2, "shutdown")
        it.send(None, "exit")
        assert it.events == [PeerEvent.EXIT]
        # What the end of the process does.
        it.connection.cancel_all()
        await it.connection.settled()
        assert it.answers() == {1: "cut short", 2: None}


# Streams


async def test_progress_of_a_call_comes_before_its_response() -> None:
    async def generate(_: Any, call: Call) -> str:
        call.open_stream("t")
        for seq in (1, 2, 3):
            call.progress(part(seq))
            await anyio.lowlevel.checkpoint()
        return "end"

    async with host(generate=generate) as it:
        it.send(1, "generate", model="m", partialResultToken="t")
        await it.connection.settled()
        *parts, end = it.messages()
        assert "".join(found["params"]["value"]["text"] for found in parts) == "1 2 3 "
        assert (end["id"], end["result"]) == (1, "end")


async def test_a_token_in_use_is_refused_and_can_be_used_again_after_the_response() -> None:
    may_end = anyio.Event()

    async def generate(params: m.GenerateParams, call: Call) -> str:
        assert isinstance(params.partial_result_token, str | int)
        call.open_stream(params.partial_result_token)
        await may_end.wait()
        return "done"

    async with host(generate=generate) as it:
        for request_id in ("first", "second"):
            it.send(request_id, "generate", model="m", partialResultToken="t")
            await anyio.lowlevel.checkpoint()
        may_end.set()
        await it.connection.settled()
        it.send("third", "generate", model="m", partialResultToken="t")
        await it.connection.settled()
        assert it.answers() == {"second": "invalid_params", "first": "done", "third": "done"}


async def test_a_call_whose_stream_overflows_ends_with_slow_consumer() -> None:
    async def generate(_: Any, call: Call) -> None:
        call.open_stream("t")
        assert call.stream is not None
        failed: list[SidecarError] = []
        call.on_overflow = failed.append
        call.stream.on_overflow()
        raise failed[0]

    async with host(generate=generate) as it:
        it.send(1, "generate", model="m", partialResultToken="t")
        await it.connection.settled()
        assert it.answers() == {1: "slow_consumer"}


# Batches


async def test_a_batch_is_answered_when_its_last_member_has_ended() -> None:
    may_end = anyio.Event()

    async def models(_: Any, __: Call) -> str:
        await may_end.wait()
        return "late"

    def member(request_id: int, method: str) -> dict[str, Any]:
        return {"jsonrpc": "2.0", "id": request_id, "method": method}

    async with host(models=models, stats=answering("early"), load=forever) as it:
        load = member(3, "load") | {"params": {"model": "m"}}
        it.say([member(1, "models"), member(2, "stats"), load])
        it.send(4, "stats")
        it.send(None, "$/cancelRequest", id=3)
        await anyio.lowlevel.checkpoint()
        may_end.set()
        await it.connection.settled()
        first, batch = it.messages()
        assert first["id"] == 4
        assert {found["id"]: outcome(found) for found in batch} == {1: "late", 2: "early", 3: "cancelled"}
