"""`python-lsp-jsonrpc`: Content-Length, threads, string ids."""

import queue
import subprocess
import threading
from collections.abc import Generator
from typing import Any

import pytest

# The library has no types.
# pyright: reportMissingTypeStubs=false
from pylsp_jsonrpc.endpoint import Endpoint
from pylsp_jsonrpc.exceptions import JsonRpcException
from pylsp_jsonrpc.streams import JsonRpcStreamReader, JsonRpcStreamWriter
from support.wire import PATIENCE_SECONDS, Json

from .streams import assert_cancelled, assert_streamed


class Host:
    """A sidecar, and the library at the other end of its pipes."""

    def __init__(self, command: str) -> None:
        self.process = subprocess.Popen([command, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.progress: queue.Queue[Json] = queue.Queue()
        self.last_id = 0
        # The library has no types.
        writer: Any = JsonRpcStreamWriter(self.process.stdin)
        reader: Any = JsonRpcStreamReader(self.process.stdout)
        on_progress = {"$/progress": self.progress.put}
        self.endpoint: Any = Endpoint(on_progress, writer.write, id_generator=self._next_id)
        self._listener = threading.Thread(target=reader.listen, args=[self.endpoint.consume])
        self._listener.start()

    def call(self, method: str, params: Json | None = None) -> Json:
        return self.endpoint.request(method, params).result(PATIENCE_SECONDS)

    def values(self) -> list[Json]:
        """Return the progress that has come since the last call."""
        return [self.progress.get_nowait()["value"] for _ in range(self.progress.qsize())]

    def close(self) -> None:
        with self.process:
            self.process.kill()
            self._listener.join(PATIENCE_SECONDS)
        self.endpoint.shutdown()

    def _next_id(self) -> str:
        self.last_id += 1
        return f"request {self.last_id}"


@pytest.fixture
def host(command: str) -> Generator[Host]:
    host = Host(command)
    try:
        yield host
    finally:
        host.close()


def test_python_lsp_jsonrpc_streams_cancels_and_ends_the_sidecar(host: Host, case: Json) -> None:
    assert host.call("initialize", {"protocolVersion": 1})["serverInfo"]["name"] == "mlx-sidecar"
    assert host.call("load", {"model": case["model"]})["state"] == "ready"

    result = host.call("generate", case["finite"] | {"partialResultToken": "words"})
    assert_streamed(host.values(), result, case["answer"])

    endless = host.endpoint.request("generate", case["endless"] | {"partialResultToken": 7})
    first = host.progress.get(timeout=PATIENCE_SECONDS)["value"]
    # Not `endless.cancel()`: the library then stumbles over the response that every request must have.
    host.endpoint.notify("$/cancelRequest", {"id": f"request {host.last_id}"})
    result = endless.result(PATIENCE_SECONDS)
    assert_cancelled([first, *host.values()], result, case["answer"])
    assert host.call("stats")["engine"]["sequences"] == 0
    assert host.values() == []

    with pytest.raises(JsonRpcException) as refused:
        host.call("generate", case["finite"] | {"model": "nobody"})
    assert refused.value.code == 1002
    assert refused.value.data == {"kind": "model_not_loaded", "retryable": False, "model": "nobody"}

    assert host.call("shutdown") is None
    host.endpoint.notify("exit")
    assert host.process.wait(PATIENCE_SECONDS) == 0
