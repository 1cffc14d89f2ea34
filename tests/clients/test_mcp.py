"""The stdio transport of `mcp`, with raw messages: our methods are not MCP's."""

import os
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.shared.message import SessionMessage
from mcp_types import JSONRPCError, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse
from support.wire import PATIENCE_SECONDS, Json

from .streams import assert_cancelled, assert_streamed


class Host:
    """Our ids and our waiting, on top of the library's two streams of messages."""

    def __init__(self, received: Any, sent: Any) -> None:
        self._received = received
        self._sent = sent
        self._ids = count()
        self.values: list[Json] = []

    async def ask(self, method: str, params: Json) -> int:
        request = JSONRPCRequest(jsonrpc="2.0", id=next(self._ids), method=method, params=params)
        await self._sent.send(SessionMessage(request))
        return int(request.id)

    async def notify(self, method: str, params: Json) -> None:
        await self._sent.send(
            SessionMessage(JSONRPCNotification(jsonrpc="2.0", method=method, params=params))
        )

    async def next(self) -> JSONRPCResponse | JSONRPCError | None:
        """Return the next message if it is a response; keep its value if it is progress."""
        received = await self._received.receive()
        assert isinstance(received, SessionMessage), received
        message = received.message
        if isinstance(message, JSONRPCResponse | JSONRPCError):
            return message
        assert isinstance(message, JSONRPCNotification)
        assert message.params is not None
        self.values.append(message.params["value"])
        return None

    async def answer(self, request_id: int) -> JSONRPCResponse | JSONRPCError:
        while (message := await self.next()) is None:
            pass
        assert message.id == request_id
        return message

    async def call(self, method: str, params: Json) -> Json:
        answer = await self.answer(await self.ask(method, params))
        assert isinstance(answer, JSONRPCResponse), answer
        return answer.result


@pytest.mark.anyio
async def test_mcp_streams_cancels_and_ends_the_sidecar(case: Json, command: str, tmp_path: Path) -> None:
    parameters = StdioServerParameters(command=command, args=["serve"])
    with (tmp_path / "log").open("w") as log, anyio.fail_after(PATIENCE_SECONDS):
        async with stdio_client(parameters, log) as (received, sent):
            process_id = await _converse(Host(received, sent), case)
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


async def _converse(host: Host, case: Json) -> int:
    opened = await host.call("initialize", {"protocolVersion": 1})
    assert opened["serverInfo"]["name"] == "mlx-sidecar"
    assert (await host.call("load", {"model": case["model"]}))["state"] == "ready"

    result = await host.call("generate", case["finite"] | {"partialResultToken": "words"})
    assert_streamed(host.values, result, case["answer"])

    host.values = []
    endless = await host.ask("generate", case["endless"] | {"partialResultToken": 7})
    assert await host.next() is None
    await host.notify("$/cancelRequest", {"id": endless})
    cancelled = await host.answer(endless)
    assert isinstance(cancelled, JSONRPCResponse)
    assert_cancelled(host.values, cancelled.result, case["answer"])

    refused = await host.answer(await host.ask("generate", case["finite"] | {"model": "nobody"}))
    assert isinstance(refused, JSONRPCError)
    assert refused.error.code == 1002
    assert refused.error.data == {"kind": "model_not_loaded", "retryable": False, "model": "nobody"}

    assert (await host.call("stats", {}))["engine"]["sequences"] == 0
    return (await host.call("server/info", {}))["processId"]
