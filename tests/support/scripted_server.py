"""Both ends of a Unix socket, and at one of them a server that says what a test tells it to."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
from anyio.abc import ByteStream
from anyio.streams.buffered import BufferedByteReceiveStream

from mlx_sidecar.client import Sidecar
from mlx_sidecar.protocol.methods import PARAMS_DECODERS

Json = dict[str, Any]
PATIENCE_SECONDS = 30
WELCOME: Json = json.loads((Path(__file__).parents[1] / "clients" / "welcome.json").read_text())
_MAX_LINE_BYTES = 64 * 1024 * 1024


class ScriptedServer:
    """Reads the client's messages, each of which must be valid, and answers as it is told."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._lines = BufferedByteReceiveStream(stream)

    async def next(self) -> Json:
        """Return the client's next message."""
        message: Json = json.loads(await self._lines.receive_until(b"\n", _MAX_LINE_BYTES))
        assert message["jsonrpc"] == "2.0"
        PARAMS_DECODERS[message["method"]].decode(json.dumps(message["params"]))
        return message

    async def expect(self, method: str) -> Json:
        """Return the client's next message, which must be of this method."""
        message = await self.next()
        assert message["method"] == method
        return message

    async def send(self, message: Json) -> None:
        """Send a message."""
        await self.send_text(json.dumps({"jsonrpc": "2.0"} | message, ensure_ascii=False) + "\n")

    async def send_text(self, text: str) -> None:
        """Send what may be anything."""
        await self._stream.send(text.encode())

    async def part(self, request: Json, seq: int, text: str) -> None:
        """Send a part of an answer."""
        await self.progress(request, {"seq": seq, "text": text, "tokens": [seq]})

    async def progress(self, request: Json, value: Json) -> None:
        """Send a `$/progress` for a request."""
        token = request["params"]["partialResultToken"]
        await self.send({"method": "$/progress", "params": {"token": token, "value": value}})

    async def end(self, request: Json, last_seq: int, finish_reason: str = "stop") -> None:
        """End an answer."""
        timings = dict.fromkeys(("queueMs", "prefillMs", "ttftMs", "decodeMs", "tokensPerSecond"), 0)
        usage = {"promptTokens": 1, "completionTokens": last_seq}
        result = {"finishReason": finish_reason, "usage": usage, "timings": timings, "lastSeq": last_seq}
        await self.send({"id": request["id"], "result": result})

    async def see_off(self) -> None:
        """Answer `shutdown`, hang up when the client does; it must say nothing else."""
        with suppress(anyio.IncompleteRead, anyio.ClosedResourceError):
            while message := await self.next():
                assert message["method"] in {"shutdown", "exit", "$/streamAck"}, message
                if message["method"] == "shutdown":
                    await self.send({"id": message["id"], "result": None})
        await self.hang_up()

    async def hang_up(self) -> None:
        """Close the connection."""
        await self._stream.aclose()


@asynccontextmanager
async def joined() -> AsyncGenerator[tuple[ScriptedServer, ByteStream]]:
    """Both ends of a Unix socket; the block may take as long as any test may."""
    with TemporaryDirectory() as folder, anyio.fail_after(PATIENCE_SECONDS):
        path = Path(folder) / "socket"
        async with (
            await anyio.create_unix_listener(path) as listener,
            await anyio.connect_unix(path) as client,
            await listener.accept() as server,
        ):
            yield ScriptedServer(server), client


@asynccontextmanager
async def talking(
    *, window_bytes: int = 1024, **limits: int
) -> AsyncGenerator[tuple[Sidecar, ScriptedServer]]:
    """A client that has connected; the server sees it off when the block is left."""

    async def welcome(server: ScriptedServer) -> None:
        request = await server.expect("initialize")
        result = WELCOME | {"limits": WELCOME["limits"] | limits}
        await server.send({"id": request["id"], "result": result})

    async with joined() as (server, stream), anyio.create_task_group() as tasks:
        tasks.start_soon(welcome, server)
        async with Sidecar.over(stream, window_bytes=window_bytes) as sidecar:
            yield sidecar, server
            tasks.start_soon(server.see_off)
