import asyncio
import contextvars
import gc
import json
import socket
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream
from support.channels import line

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.runtime.api.presence import PresenceApi
from mlx_sidecar.runtime.server.channel import Channel
from mlx_sidecar.runtime.server.connection import Call, Connection, OnEvent
from mlx_sidecar.runtime.server.guests import Guests
from mlx_sidecar.runtime.server.peer import Peer
from mlx_sidecar.runtime.server.unix_socket import Listener
from mlx_sidecar.runtime.telemetry.vitals import Vitals

pytestmark = pytest.mark.anyio

PATIENCE_SECONDS = 10


class Client:
    """Somebody who connects."""

    def __init__(self, stream: SocketStream) -> None:
        self.stream = stream
        self._lines = BufferedByteReceiveStream(stream)

    async def say(self, method: str, request_id: int | None = None, **params: Any) -> None:
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
        await self.stream.send(line(message if request_id is None else message | {"id": request_id}))

    async def hear(self) -> Any:
        return json.loads(await self._lines.receive_until(b"\n", 10_000_000))

    async def answered(self, method: str, request_id: int) -> Any:
        await self.say(method, request_id)
        response = await self.hear()
        assert response["id"] == request_id
        return response.get("result", response.get("error"))

    async def is_sent_away(self) -> bool:
        with pytest.raises(anyio.EndOfStream):
            await self.stream.receive()
        return True


class House:
    """Guests with handlers of the test's own behind real method names."""

    def __init__(self, path: Path, guests: Guests) -> None:
        self._path = path
        self.guests = guests
        self.connections: list[weakref.ref[Connection]] = []
        self.cancelled = 0

    async def models(self, _: Any, __: Call) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled += 1

    def stats(self, _: Any, __: Call) -> str:
        return "stats"

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(PATIENCE_SECONDS):
            while not condition():
                await anyio.sleep(0)

    async def visit(self) -> Client:
        client = Client(await anyio.connect_unix(str(self._path)))
        await client.say("initialize", 0, protocolVersion=1)
        await client.hear()
        return client


@asynccontextmanager
async def house(path: Path, *, grace_ms: int = 100_000, most: int = 100) -> AsyncGenerator[House]:
    listener = Listener.bind(path)
    settings = Settings(home=path, eof_grace_ms=grace_ms, max_connections=most)
    immediate = PresenceApi(Vitals()).methods()
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    with anyio.fail_after(3 * PATIENCE_SECONDS):
        async with anyio.create_task_group() as tasks:

            def open_connection(channel: Channel, on_event: OnEvent) -> Connection:
                peer = Peer(channel, immediate)
                handlers = {"models": it.models, "stats": it.stats}
                connection = Connection(peer, tasks, handlers, lambda _: None, on_event)
                peer.attach(connection, post)
                peer.start()
                it.connections.append(weakref.ref(connection))
                return connection

            def post(callback: Callable[..., None], *args: Any) -> None:
                with suppress(RuntimeError):  # A reader may notice something when the loop has been closed.
                    loop.call_soon_threadsafe(callback, *args, context=context)

            guests = Guests(listener, open_connection, post, tasks, settings)
            it = House(path, guests)
            guests.start(lambda: None)
            yield it
            listener.close()
            for guest in list(guests.present):
                guest.peer.channel.close()
            await it.until(lambda: not guests.present)
            tasks.cancel_scope.cancel()


async def test_each_guest_is_served_without_regard_to_the_others(socket_path: Path) -> None:
    async with house(socket_path) as it:
        first, second = await it.visit(), await it.visit()
        await first.say("models", 1)
        await second.say("models", 1)
        await first.say("$/cancelRequest", id=1)
        assert (await first.hear())["error"]["data"]["kind"] == "cancelled"
        assert (await second.answered("ping", 2))["inFlight"] == 1
        await first.stream.aclose()
        await second.stream.aclose()


async def test_a_guest_who_leaves_has_its_requests_cancelled_and_costs_the_others_nothing(
    socket_path: Path,
) -> None:
    async with house(socket_path) as it:
        first, second = await it.visit(), await it.visit()
        await first.say("models", 1)
        await second.say("models", 1)
        assert (await first.answered("ping", 2))["inFlight"] == 1
        assert (await second.answered("ping", 2))["inFlight"] == 1
        await first.stream.aclose()
        await it.until(lambda: it.cancelled == 1)
        assert (await second.answered("ping", 3))["inFlight"] == 1
        await second.stream.aclose()


async def test_guests_who_have_left_are_forgotten(socket_path: Path) -> None:
    async with house(socket_path) as it:
        for how in ("leave", "leave mid-request", "exit", "garbage", "half-close"):
            guest = await it.visit()
            match how:
                case "leave mid-request":
                    await guest.say("models", 1)
                case "exit":
                    await guest.say("exit")
                    await guest.is_sent_away()
                case "half-close":
                    await guest.stream.send_eof()
                    await guest.is_sent_away()
                case "garbage":
                    await guest.stream.send(b"\xff\n")
                case _:
                    pass
            await guest.stream.aclose()
        await it.until(lambda: not it.guests.present)

        def forgotten() -> bool:
            gc.collect()
            return not any(connection() for connection in it.connections)

        with anyio.fail_after(PATIENCE_SECONDS):
            while not forgotten():
                await anyio.sleep(0.01)


async def test_exit_ends_one_connection_only(socket_path: Path) -> None:
    async with house(socket_path) as it:
        first, second = await it.visit(), await it.visit()
        await first.say("models", 1)
        await first.say("exit")
        assert (await first.hear())["error"]["data"]["kind"] == "cancelled"
        assert await first.is_sent_away()
        assert await second.answered("stats", 1) == "stats"
        for guest in (first, second):
            await guest.stream.aclose()


async def test_headers_that_cannot_be_followed_end_one_connection_only(socket_path: Path) -> None:
    async with house(socket_path) as it:
        sound = await it.visit()
        broken = Client(await anyio.connect_unix(str(socket_path)))
        await broken.stream.send(b"Content-Length: x\r\n\r\n")
        assert b"-32600" in await broken.stream.receive()
        assert await broken.is_sent_away()
        assert await sound.answered("stats", 1) == "stats"
        for guest in (sound, broken):
            await guest.stream.aclose()


async def test_a_guest_who_has_said_all_gets_its_answers_and_is_seen_off(socket_path: Path) -> None:
    async with house(socket_path) as it:
        guest = await it.visit()
        await guest.say("models", 1)
        await guest.say("stats", 2)
        await guest.say("$/cancelRequest", id=1)
        await guest.stream.send_eof()
        assert {(await guest.hear())["id"], (await guest.hear())["id"]} == {1, 2}
        assert await guest.is_sent_away()
        await guest.stream.aclose()


async def test_after_its_last_word_a_guest_is_waited_for_no_longer_than_the_grace(socket_path: Path) -> None:
    async with house(socket_path, grace_ms=0) as it:
        guest = await it.visit()
        await guest.say("models", 1)
        await guest.stream.send_eof()
        assert (await guest.hear())["error"]["data"]["kind"] == "cancelled"
        assert await guest.is_sent_away()
        await guest.stream.aclose()


async def test_a_guest_who_stops_reading_is_sent_away_and_the_others_are_served(socket_path: Path) -> None:
    async with house(socket_path) as it:
        deaf, sound = await it.visit(), await it.visit()
        await deaf.say("models", 1)
        assert (await deaf.answered("ping", 2))["inFlight"] == 1
        raw: socket.socket = deaf.stream.extra(anyio.abc.SocketAttribute.raw_socket)
        (victim,) = (guest for guest in it.guests.present if guest.peer.intake.in_flight)
        victim.peer.outbox.send(b"x" * 1_000_000)
        raw.shutdown(socket.SHUT_RD)
        await it.until(lambda: victim not in it.guests.present and it.cancelled == 1)
        assert await sound.answered("stats", 1) == "stats"
        for guest in (deaf, sound):
            await guest.stream.aclose()


async def test_one_guest_too_many_is_turned_away_until_another_leaves(socket_path: Path) -> None:
    async with house(socket_path, most=2) as it:
        first, second = await it.visit(), await it.visit()
        third = Client(await anyio.connect_unix(str(socket_path)))
        assert await third.is_sent_away()
        assert await second.answered("stats", 1) == "stats"
        await first.stream.aclose()
        await it.until(lambda: len(it.guests.present) == 1)
        fourth = await it.visit()
        assert await fourth.answered("stats", 1) == "stats"
        for guest in (second, third, fourth):
            await guest.stream.aclose()
