"""JSON-RPC over a pair of byte streams: requests out, responses and progress in."""

from collections.abc import Callable

import anyio
import msgspec
from anyio.abc import ByteReceiveStream, ByteSendStream

from mlx_sidecar.protocol import jsonrpc
from mlx_sidecar.protocol.messages import GenerateProgress, ProgressParams
from mlx_sidecar.protocol.ndjson import LineSplitter

from .errors import SidecarRequestError

# Answers are bounded by what was asked for; this only bounds the damage of a peer that never ends a line.
_MAX_FRAME_BYTES = 256 * 1024 * 1024

OnProgress = Callable[[GenerateProgress], None]


class Pending:
    """A request that was sent; `answered` is set when its response, or the end of everything, is there."""

    def __init__(self, request_id: int) -> None:
        self.id = request_id
        self.answered = anyio.Event()
        self.reply: jsonrpc.Reply | Exception | None = None

    def settle(self, reply: jsonrpc.Reply | Exception) -> None:
        """Record the response, or the reason that there will be none."""
        self.reply = reply
        self.answered.set()

    async def result(self) -> msgspec.Raw:
        """Return the undecoded result.

        Raises:
            SidecarRequestError: the server answered with an error.
            SidecarExited: there is no server any more.
        """
        await self.answered.wait()
        if isinstance(self.reply, Exception):
            raise self.reply
        assert self.reply is not None
        if self.reply.error is not None:
            raise SidecarRequestError(self.reply.error)
        return self.reply.result


class Connection:
    """Matches responses to requests and progress to listeners."""

    def __init__(self, output: ByteSendStream) -> None:
        self._output = output
        self._sending = anyio.Lock()
        self._pending: dict[jsonrpc.RequestId, Pending] = {}
        self._listeners: dict[int | str, OnProgress] = {}
        self._closed: Exception | None = None
        self._last_id = 0

    async def send(self, method: str, params: object) -> Pending:
        """Send a request and return where its response will be."""
        self._last_id += 1
        pending = Pending(self._last_id)
        if self._closed is not None:
            pending.settle(self._closed)
            return pending
        self._pending[pending.id] = pending
        await self._write(jsonrpc.encode_request(pending.id, method, params))
        return pending

    async def notify(self, method: str, params: object) -> None:
        """Send a message that has no answer."""
        if self._closed is None:
            await self._write(jsonrpc.encode_notification(method, params))

    def listen(self, token: int | str, listener: OnProgress | None) -> None:
        """Call `listener` for progress with this token, until it is taken away with None."""
        if listener is None:
            self._listeners.pop(token, None)
        else:
            self._listeners[token] = listener

    async def read(self, stream: ByteReceiveStream) -> None:
        """Take what the server says until it says no more."""
        splitter = LineSplitter(_MAX_FRAME_BYTES)
        async for chunk in stream:
            for frame in splitter.feed(chunk):
                if isinstance(frame, bytes):
                    self._take(frame)

    def close(self, error: Exception) -> None:
        """Fail everything in flight, and everything to come, with `error`."""
        self._closed = error
        for pending in self._pending.values():
            pending.settle(error)
        self._pending.clear()

    async def _write(self, frame: bytes) -> None:
        try:
            async with self._sending:
                await self._output.send(frame + b"\n")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass  # The process has just died; its end settles every request.

    def _take(self, frame: bytes) -> None:
        try:
            reply = jsonrpc.decode_reply(frame)
        except msgspec.DecodeError:
            return  # One stray line costs itself only.
        if reply.method == "$/progress":
            progress = msgspec.json.decode(reply.params, type=ProgressParams)
            if (listener := self._listeners.get(progress.token)) is not None:
                listener(progress.value)
        elif reply.id is not None and (pending := self._pending.pop(reply.id, None)) is not None:
            pending.settle(reply)
