"""`pygls`: Content-Length, asyncio, string ids, objects as named tuples."""

import asyncio
from typing import Any

import pytest
from pygls.client import JsonRPCClient
from pygls.exceptions import JsonRpcException
from support.wire import PATIENCE_SECONDS, Json

from .streams import assert_cancelled, assert_streamed


class Host(JsonRPCClient):
    """The library's client, which starts the sidecar by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.progress: asyncio.Queue[Json] = asyncio.Queue()
        self.complaints: list[Exception] = []
        self.exit_code: int | None = None

        def take(params: Any) -> None:
            self.progress.put_nowait(params.value._asdict())

        self.feature("$/progress")(take)

    def values(self) -> list[Json]:
        """Return the progress that has come since the last call."""
        return [self.progress.get_nowait() for _ in range(self.progress.qsize())]

    async def server_exit(self, server: asyncio.subprocess.Process) -> None:
        self.exit_code = server.returncode

    def report_server_error(self, error: Exception, source: Any) -> None:  # noqa: ARG002
        self.complaints.append(error)


def test_pygls_streams_cancels_and_ends_the_sidecar(case: Json, command: str) -> None:
    asyncio.run(_converse(case, command))


async def _converse(case: Json, command: str) -> None:
    host = Host()
    call = host.protocol.send_request_async
    async with asyncio.timeout(PATIENCE_SECONDS):
        await host.start_io(command, "serve")
        assert (await call("initialize", {"protocolVersion": 1})).serverInfo.name == "mlx-sidecar"
        assert (await call("load", {"model": case["model"]})).state == "ready"

        result = await call("generate", case["finite"] | {"partialResultToken": "words"})
        assert_streamed(host.values(), _members(result), case["answer"])

        endless = call("generate", case["endless"] | {"partialResultToken": 7}, msg_id="endless")
        first = await host.progress.get()
        host.protocol.notify("$/cancelRequest", {"id": "endless"})
        result = await endless
        assert_cancelled([first, *host.values()], _members(result), case["answer"])
        assert (await call("stats")).engine.sequences == 0
        assert host.values() == []

        with pytest.raises(JsonRpcException) as refused:
            await call("generate", case["finite"] | {"model": "nobody"})
        assert refused.value.code == 1002
        assert refused.value.data == {"kind": "model_not_loaded", "retryable": False, "model": "nobody"}

        assert await call("shutdown") is None
        host.protocol.notify("exit")
        await host.stop()
    assert host.exit_code == 0
    assert host.complaints == []


def _members(result: Any) -> Json:
    return result._asdict() | {"usage": result.usage._asdict()}
