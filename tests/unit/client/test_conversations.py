"""Replays the conversations of `tests/clients`, which every client replays; their README has the format."""

import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import anyio
import msgspec
import pytest
from anyio.abc import ByteStream, TaskGroup
from anyio.streams.stapled import StapledByteStream
from support.scripted_server import WELCOME, Json, ScriptedServer, joined

from mlx_sidecar.client import (
    Generation,
    Sidecar,
    SidecarDisconnected,
    SidecarError,
    SidecarNotStarted,
    SidecarRequestError,
)

pytestmark = pytest.mark.anyio

CONVERSATIONS = sorted((Path(__file__).parents[2] / "clients" / "conversations").glob("*.json"))
NAME = re.compile(r'"(\$(?:id|token):\w+)"')

Ask = Callable[[Sidecar, Json], Awaitable[Any]]


async def member(name: str, value: Awaitable[Any]) -> Json:
    return {name: await value}


ASK: dict[str, Ask] = {
    "load": lambda sidecar, params: sidecar.load(**params),
    "reload": lambda sidecar, params: sidecar.reload(**params),
    "unload": lambda sidecar, params: sidecar.unload(**params),
    "alias": lambda sidecar, params: sidecar.alias(**params),
    "models": lambda sidecar, params: member("models", sidecar.models(**params)),
    "pull": lambda sidecar, params: sidecar.pull(**params),
    "loadAdapter": lambda sidecar, params: sidecar.load_adapter(**params),
    "unloadAdapter": lambda sidecar, params: sidecar.unload_adapter(**params),
    "tokenize": lambda sidecar, params: member("tokens", sidecar.tokenize(**params)),
    "detokenize": lambda sidecar, params: member("text", sidecar.detokenize(**params)),
    "stats": lambda sidecar, params: sidecar.stats(**params),
    "ping": lambda sidecar, params: sidecar.ping(**params),
    "server/info": lambda sidecar, params: sidecar.server_info(**params),
}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


class ByteByByte(StapledByteStream):
    """Gives every byte on its own, however they came."""

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await super().receive(min(max_bytes, 1))


class Call:
    """What a caller gets to see of one call."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.outcome: Any = None
        self.ended = anyio.Event()
        self.generation: Generation | None = None
        self.scope = anyio.CancelScope()
        self._texts_read = 0
        self._news = anyio.Event()

    async def run(self, work: Callable[[], Awaitable[Any]]) -> None:
        with self.scope:
            try:
                self.outcome = await work()
            except SidecarError as error:
                self.outcome = error
        self.ended.set()
        self._tell()

    async def follow(self, sidecar: Sidecar, params: Json) -> Any:
        self.generation = sidecar.generate(**params)
        async for part in self.generation:
            self.texts.append(part.text)
            self._tell()
        return await self.generation.result()

    async def read(self, count: int) -> list[str]:
        while len(self.texts) < self._texts_read + count:
            assert not self.ended.is_set(), self.texts
            await self._news.wait()
        self._texts_read += count
        return self.texts[self._texts_read - count : self._texts_read]

    def _tell(self) -> None:
        told, self._news = self._news, anyio.Event()
        told.set()


class Script:
    """The server's side of a conversation, and the caller's wishes."""

    def __init__(self, server: ScriptedServer, client: ByteStream, tasks: TaskGroup) -> None:
        self._server = server
        self._client = client
        self._tasks = tasks
        self._names: Json = {}
        self._calls: dict[str, Call] = {}
        self._sidecar: Sidecar | None = None
        self._connected = anyio.Event()
        self._finished = anyio.Event()

    async def take(self, step: Json) -> None:
        ((kind, value),) = step.items()
        await getattr(self, f"step_{kind}")(value)

    async def finish(self) -> None:
        self._finished.set()
        await self._server.see_off()

    async def step_open(self, other: Json) -> None:
        await self.step_call({"name": "open", "method": "initialize"})
        await self.step_expect({"id": "$id:open", "method": "initialize"})
        await self.step_send({"id": "$id:open", "result": WELCOME | other})
        await self._connected.wait()

    async def step_call(self, value: Json) -> None:
        call = self._calls[value["name"]] = Call()
        method, params = value["method"], value.get("params", {})
        if method == "initialize":
            self._tasks.start_soon(call.run, self._connect)
            return
        assert self._sidecar is not None
        sidecar, ask = self._sidecar, call.follow if method == "generate" else ASK[method]
        self._tasks.start_soon(call.run, lambda: ask(sidecar, params))

    async def step_expect(self, frame: Json) -> None:
        while (message := await self._server.next())["method"] == "$/streamAck":
            pass
        self._match(frame, message)

    async def step_send(self, frame: Json) -> None:
        await self.step_sendText(json.dumps({"jsonrpc": "2.0"} | frame, ensure_ascii=False) + "\n")

    async def step_sendText(self, text: str) -> None:  # noqa: N802
        await self._server.send_text(NAME.sub(lambda name: json.dumps(self._names[name[1]]), text))

    async def step_read(self, value: Json) -> None:
        assert await self._calls[value["of"]].read(len(value["texts"])) == value["texts"]

    async def step_cancel(self, name: str) -> None:
        generation = self._calls[name].generation
        assert generation is not None
        generation.cancel()

    async def step_abandon(self, name: str) -> None:
        self._calls[name].scope.cancel()

    async def step_hangUp(self, _: Json) -> None:  # noqa: N802
        await self._server.hang_up()

    async def step_outcome(self, value: Json) -> None:
        call = self._calls[value["of"]]
        await call.ended.wait()
        if "texts" in value:
            assert call.texts == value["texts"]
        match value:
            case {"result": result}:
                assert not isinstance(call.outcome, SidecarError), call.outcome
                self._match(result, msgspec.to_builtins(call.outcome))
            case {"error": error}:
                assert isinstance(call.outcome, SidecarRequestError)
                self._match(error, {name: getattr(call.outcome, name) for name in error})
            case {"incomplete": True}:
                assert type(call.outcome) is SidecarError
            case {"gone": True}:
                assert isinstance(call.outcome, SidecarDisconnected)
            case {"refused": True}:
                assert isinstance(call.outcome, SidecarNotStarted)
            case _:
                assert value["abandoned"]
                assert call.scope.cancelled_caught

    async def _connect(self) -> None:
        async with Sidecar.over(self._client) as sidecar:
            self._sidecar = sidecar
            self._connected.set()
            await self._finished.wait()

    def _match(self, expected: Any, found: Any) -> None:
        if isinstance(expected, dict):
            assert isinstance(found, dict)
            for name, value in cast(Json, expected).items():
                assert name in found, (expected, found)
                self._match(value, found[name])
        elif isinstance(expected, str) and NAME.fullmatch(f'"{expected}"'):
            assert self._names.setdefault(expected, found) == found
        elif expected != "$any":
            assert found == expected


async def replay(path: Path, wrap: Callable[[ByteStream], ByteStream]) -> None:
    async with joined() as (server, client), anyio.create_task_group() as tasks:
        script = Script(server, wrap(client), tasks)
        for step in json.loads(path.read_text())["steps"]:
            await script.take(step)
        await script.finish()


@pytest.mark.parametrize("path", CONVERSATIONS, ids=lambda path: path.stem)
async def test_a_recorded_conversation_goes_the_same_way(path: Path) -> None:
    await replay(path, lambda stream: stream)


@pytest.mark.parametrize("path", CONVERSATIONS, ids=lambda path: path.stem)
async def test_it_does_so_byte_by_byte(path: Path) -> None:
    await replay(path, lambda stream: ByteByByte(stream, stream))


def test_there_are_conversations() -> None:
    assert len(CONVERSATIONS) >= 10
