"""One peer: its frames in, its answers out, its requests in flight."""

import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup

from mlx_sidecar.protocol import errors, jsonrpc
from mlx_sidecar.protocol.framing import Frame, FrameReader, Framing
from mlx_sidecar.protocol.headers import FramingLost
from mlx_sidecar.protocol.methods import CLIENT_NOTIFICATIONS, METHODS, PARAMS_DECODERS
from mlx_sidecar.protocol.ndjson import FrameTooLarge

from .outbox import Outbox

log = logging.getLogger("server")

Handler = Callable[[Any, "Call"], Any]
"""Takes decoded params and the call; returns the result, or an awaitable of it."""


class Call:
    """A request in flight, as its handler sees it.

    A cancel stops the handler where it waits, and the answer is the error `cancelled`. A handler that can do
    better sets `on_cancel` to what should happen instead. `after_answer` is called, on another thread, once
    the answer has left the process.
    """

    def __init__(self, connection: "Connection", request_id: jsonrpc.RequestId) -> None:
        self.connection = connection
        self.id = request_id
        self._scope = anyio.CancelScope()
        self.on_cancel: Callable[[], None] = self._scope.cancel
        self.after_answer: Callable[[], None] | None = None

    def progress(self, token: int | str, value: object) -> None:
        """Send `$/progress` for this call."""
        self.connection.notify("$/progress", {"token": token, "value": value})

    async def run(self, work: Awaitable[Any]) -> Any:
        """Return the handler's result.

        Raises:
            RequestCancelled: the call was cancelled and the handler left that to us.
        """
        with self._scope:
            return await work
        raise errors.RequestCancelled()


class Connection:
    """Decodes frames, runs handlers, and answers every request exactly once.

    Handlers that return an awaitable run as tasks; the others answer before the next frame is looked at, so
    what follows an `initialize` in the same write already finds it done.
    """

    def __init__(
        self,
        outbox: Outbox,
        tasks: TaskGroup,
        handlers: dict[str, Handler],
        on_exit: Callable[["Connection"], None],
        on_lost: Callable[[], None],
        reader: FrameReader,
    ) -> None:
        self._outbox = outbox
        self._tasks = tasks
        self._handlers = handlers
        self._on_exit = on_exit
        self._on_lost = on_lost
        self._reader = reader
        self._calls: dict[jsonrpc.RequestId, Call] = {}
        self._idle = anyio.Event()
        self.initialized = False
        self.shut_down = False

    @property
    def in_flight(self) -> int:
        """Requests that have not been answered yet."""
        return len(self._calls)

    def feed(self, chunk: bytes) -> None:
        """Take bytes from the peer."""
        self._take_all(self._reader.feed(chunk))

    def end_input(self) -> None:
        """Take the last frame, if the peer left it without a newline."""
        self._take_all(self._reader.close())

    def notify(self, method: str, params: object) -> None:
        """Send a notification."""
        self._send(jsonrpc.encode_notification(method, params))

    def cancel(self, request_id: jsonrpc.RequestId) -> None:
        """Cancel a request in flight; an id that is not in flight is ignored."""
        if (call := self._calls.get(request_id)) is not None:
            call.on_cancel()

    def cancel_all(self, *, but: Call | None = None) -> None:
        """Cancel every request in flight."""
        for call in list(self._calls.values()):
            if call is not but:
                call.on_cancel()

    async def settled(self, *, but: Call | None = None) -> None:
        """Wait until every request in flight has been answered."""
        while self._calls.keys() - ({but.id} if but else set[jsonrpc.RequestId]()):
            self._idle = anyio.Event()
            await self._idle.wait()

    def _send(self, frame: bytes) -> None:
        self._outbox.send((self._reader.framing or Framing.NDJSON).wrap(frame))

    def _take_all(self, frames: list[Frame]) -> None:
        for frame in frames:
            try:
                self._take(frame)
            except Exception:
                log.exception("a frame could not be taken")
                self._refuse(None, errors.InternalError())

    def _take(self, frame: Frame) -> None:
        if isinstance(frame, FrameTooLarge):
            self._refuse(None, errors.InvalidRequest("The line is longer than limits.maxFrameBytes."))
            return
        if isinstance(frame, FramingLost):
            self._refuse(None, errors.InvalidRequest(f"{frame.problem} The connection cannot go on."))
            self._on_lost()
            return
        try:
            request = jsonrpc.decode_request(frame)
        except jsonrpc.BadFrame as bad:
            self._refuse(bad.request_id, bad.error)
            return
        if isinstance(request.id, msgspec.UnsetType):
            self._notified(request.method, request.params)
        else:
            self._call(request.id, request.method, request.params)

    def _notified(self, method: str, raw: msgspec.Raw) -> None:
        if method not in CLIENT_NOTIFICATIONS:
            return
        try:
            params = jsonrpc.decode_params(raw, PARAMS_DECODERS[method].decode)
        except (errors.InvalidParams, jsonrpc.BadFrame):
            log.warning("ignored a notification %s with wrong parameters", method)
            return
        if method == "exit":
            self._on_exit(self)
        else:
            self.cancel(params.id)

    def _call(self, request_id: jsonrpc.RequestId, method: str, raw: msgspec.Raw) -> None:
        try:
            params = self._accept(request_id, method, raw)
        except errors.SidecarError as error:
            self._refuse(request_id, error)
            return
        call = self._calls[request_id] = Call(self, request_id)
        try:
            result = self._handlers[method](params, call)
        except Exception as error:
            self._finish(call, _as_sidecar_error(method, error))
            return
        if inspect.isawaitable(result):
            self._tasks.start_soon(self._run, call, method, result)
        else:
            self._finish(call, result)

    def _accept(self, request_id: jsonrpc.RequestId, method: str, raw: msgspec.Raw) -> Any:
        if request_id in self._calls:
            raise errors.DuplicateId(request_id)
        entry = METHODS.get(method)
        if entry is None:
            raise errors.MethodNotFound(method)
        if self.shut_down:
            raise errors.ShuttingDown()
        if not self.initialized and not entry.before_initialize:
            raise errors.NotInitialized()
        try:
            return jsonrpc.decode_params(raw, PARAMS_DECODERS[method].decode)
        except jsonrpc.BadFrame as bad:
            raise bad.error from None

    async def _run(self, call: Call, method: str, work: Awaitable[Any]) -> None:
        outcome: Any = errors.RequestCancelled()
        try:
            outcome = await call.run(work)
        except Exception as error:
            outcome = _as_sidecar_error(method, error)
        finally:
            # Also when the whole process is being torn down: every request is answered.
            self._finish(call, outcome)

    def _finish(self, call: Call, outcome: Any) -> None:
        del self._calls[call.id]
        if isinstance(outcome, errors.SidecarError):
            self._send(jsonrpc.encode_error(call.id, outcome.to_wire()))
        else:
            self._send(jsonrpc.encode_result(call.id, outcome))
        if call.after_answer is not None:
            self._outbox.then(call.after_answer)
        self._idle.set()

    def _refuse(self, request_id: jsonrpc.RequestId | None, error: errors.SidecarError) -> None:
        self._send(jsonrpc.encode_error(request_id, error.to_wire()))


def _as_sidecar_error(method: str, error: Exception) -> errors.SidecarError:
    if isinstance(error, errors.SidecarError):
        return error
    log.error("the handler of %s failed", method, exc_info=error)
    return errors.InternalError()
