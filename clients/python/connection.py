"""JSON-RPC over one byte stream: requests out, responses and progress in. Knows nothing of processes."""

import copy
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Generic, TypeVar

import anyio
import msgspec
from anyio.abc import ByteStream

from mlx_sidecar.protocol import jsonrpc
from mlx_sidecar.protocol.errors import InvalidRequest
from mlx_sidecar.protocol.messages import Result
from mlx_sidecar.protocol.ndjson import LineSplitter

from .errors import SidecarError, SidecarRequestError

PartT = TypeVar("PartT", bound=Result)
ResultT = TypeVar("ResultT")

# Far above what the server sends; this only bounds the damage of a peer that never ends a line.
_MAX_SENT_FRAME_BYTES = 256 * 1024 * 1024
# What a stream may raise when the other side has gone; not every backend translates all of it.
_GONE = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, OSError)


class _Progress(msgspec.Struct):
    token: jsonrpc.RequestId
    value: msgspec.Raw


_progress_decoder = msgspec.json.Decoder(_Progress)
log: logging.Logger = logging.getLogger(__name__)


class Request:
    """A request that was sent, and how it ended.

    Whoever is cancelled while waiting for it cancels it on the server.
    """

    def __init__(self, connection: "Connection", request_id: int, method: str) -> None:
        self.id = request_id
        self._connection = connection
        self._method = method
        self._reply: jsonrpc.Reply | SidecarError | None = None
        self._news = anyio.Event()
        self._cancelled = False

    @property
    def ended(self) -> bool:
        """Whether the response, or the end of everything, is there."""
        return self._reply is not None

    def add(self, value: msgspec.Raw) -> None:
        """Take a `$/progress` value. Nobody asked for this one."""

    def settle(self, reply: jsonrpc.Reply | SidecarError) -> None:
        """Take the response, or the reason that there will be none."""
        self._reply = reply
        self._tell()

    def cancel(self) -> None:
        """Ask the server, once, to end the request; its response says how it ended."""
        if not self.ended and not self._cancelled:
            self._cancelled = True
            self._connection.notify("$/cancelRequest", {"id": self.id})

    async def end(self) -> None:
        """Wait for the end, however it is."""
        while not self.ended:
            await self._wait()

    async def result(self, result: type[ResultT]) -> ResultT:
        """Return the result as what it should be.

        Raises:
            SidecarRequestError: the server answered with an error.
            SidecarDisconnected: there is no server any more.
            SidecarError: the answer is not of this protocol.
        """
        await self.end()
        assert self._reply is not None
        if isinstance(self._reply, SidecarError):
            # Several may raise it, each with a traceback of its own.
            raise copy.copy(self._reply)
        if self._reply.error is not None:
            raise SidecarRequestError(self._reply.error)
        try:
            return msgspec.json.decode(self._reply.result, type=result)
        except msgspec.DecodeError as error:
            raise SidecarError(
                f"The answer to {self._method!r} cannot be understood ({error}). "
                "Install the same version of client and server."
            ) from None

    async def _wait(self) -> None:
        try:
            await self._news.wait()
        except BaseException:
            self.cancel()
            raise

    def _tell(self) -> None:
        told, self._news = self._news, anyio.Event()
        told.set()


class StreamedRequest(Request, Generic[PartT]):
    """A request that is answered in parts, each a `progress`, before it ends."""

    def __init__(self, connection: "Connection", request_id: int, method: str, progress: type[PartT]) -> None:
        super().__init__(connection, request_id, method)
        self._decoder = msgspec.json.Decoder(progress)
        self._parts: list[PartT] = []

    def add(self, value: msgspec.Raw) -> None:
        """Take a part; raise msgspec.DecodeError if it is not one."""
        self._parts.append(self._decoder.decode(value))
        self._tell()

    async def take(self) -> list[PartT]:
        """Return the parts that are here, waiting for one if there is none; an empty list at the end."""
        while not self._parts and not self.ended:
            await self._wait()
        taken, self._parts = self._parts, []
        return taken


class Connection:
    """Matches responses and progress to requests. What it sends goes into a queue, so sending never waits.

    A task that is cancelled while its message is being written could otherwise leave half a line on the wire.
    """

    def __init__(self) -> None:
        self.max_frame_bytes: float = math.inf
        self.closed: anyio.Event = anyio.Event()
        self._queue, self._queued = anyio.create_memory_object_stream[bytes](math.inf)
        self._requests: dict[jsonrpc.RequestId, Request] = {}
        self._error: SidecarError | None = None
        self._last_id = 0

    def send(self, method: str, params: Mapping[str, Any]) -> Request:
        """Send a request that is answered at once."""
        request = Request(self, self._new_id(), method)
        self._send(request, method, params)
        return request

    def stream(self, method: str, params: Mapping[str, Any], progress: type[PartT]) -> StreamedRequest[PartT]:
        """Send a request that is answered in parts of type `progress`."""
        request = StreamedRequest(self, self._new_id(), method, progress)
        self._send(request, method, {**params, "partialResultToken": request.id})
        return request

    def notify(self, method: str, params: object) -> None:
        """Send a message that has no answer."""
        self._post(jsonrpc.encode_notification(method, params))

    def finish(self) -> None:
        """Say nothing more: the stream's end follows what was sent."""
        self._queue.close()

    async def run(self, stream: ByteStream) -> None:
        """Carry messages until the server says no more."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._write, stream)
            await self._read(stream)
            tasks.cancel_scope.cancel()

    def close(self, error: SidecarError) -> None:
        """Fail everything in flight, and everything to come, with `error`; the first one counts."""
        if self._error is not None:
            return
        self._error = error
        self._queue.close()
        self._queued.close()
        for request in self._requests.values():
            request.settle(error)
        self._requests.clear()
        self.closed.set()

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _send(self, request: Request, method: str, params: Mapping[str, Any]) -> None:
        frame = jsonrpc.encode_request(request.id, method, params)
        if self._error is not None:
            request.settle(self._error)
        elif len(frame) > self.max_frame_bytes:
            # The server would refuse it too, but without an id: it does not read what it will not take.
            text = f"The request has {len(frame)} bytes; the server takes at most {self.max_frame_bytes}."
            request.settle(SidecarRequestError(InvalidRequest(text).to_wire()))
        else:
            self._requests[request.id] = request
            self._post(frame)

    def _post(self, frame: bytes) -> None:
        # Nobody may be there any more; the end of what the server says settles every request.
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            self._queue.send_nowait(frame + b"\n")

    async def _write(self, stream: ByteStream) -> None:
        with self._queued, suppress(*_GONE):
            async for frame in self._queued:
                await stream.send(frame)
            await stream.send_eof()

    async def _read(self, stream: ByteStream) -> None:
        splitter = LineSplitter(_MAX_SENT_FRAME_BYTES)
        with suppress(*_GONE):
            while True:
                for frame in splitter.feed(await stream.receive()):
                    if isinstance(frame, bytes):
                        self._take(frame)

    def _take(self, frame: bytes) -> None:
        # One stray line costs itself only, whatever it looks like.
        with suppress(msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            reply = jsonrpc.decode_reply(frame)
            if reply.method == "$/progress":
                progress = _progress_decoder.decode(reply.params)
                if (request := self._requests.get(progress.token)) is not None:
                    request.add(progress.value)
            elif reply.method is None:
                self._answer(reply)

    def _answer(self, reply: jsonrpc.Reply) -> None:
        if reply.id is not None and (request := self._requests.pop(reply.id, None)) is not None:
            request.settle(reply)
        elif reply.id is None and reply.error is not None:
            log.warning("the sidecar could not read a message: %s", reply.error.message)
