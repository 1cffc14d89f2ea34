"""What one peer says: bytes in, and for every frame an answer at once or a request for the event loop.

Runs on whichever thread reads, and needs no event loop: a `ping` is answered before there is one, and while
it is busy. Rules that depend on the order of frames (`initialize` first, nothing after `shutdown`, no id
twice) are applied here, where the order is known.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from msgspec import UNSET, Raw, UnsetType

from mlx_sidecar.protocol import errors, jsonrpc, requests
from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.framing import Frame, FrameReader
from mlx_sidecar.protocol.headers import FramingLost
from mlx_sidecar.protocol.methods import CLIENT_NOTIFICATIONS, METHODS, PARAMS_DECODERS
from mlx_sidecar.protocol.ndjson import FrameTooLarge

from .batch_reply import BatchReply
from .outbox import Outbox

log = logging.getLogger("server")

Immediate = Callable[[Any, "Intake"], Any]
"""Answers a request at once, on the reading thread."""


class Incoming(NamedTuple):
    """What the event loop has to deal with: a request, or (`id` None) something to be noted."""

    id: jsonrpc.RequestId | None
    method: str
    params: Any
    batch: BatchReply | None = None


class Intake:
    """Takes the bytes of one peer. Call `feed` and `end` from one thread at a time.

    `immediate` answers the methods that wait for nothing; everything else is returned, in order. `lost` says
    that the frames of the peer can no longer be told apart: what comes after is not looked at.
    """

    def __init__(self, reader: FrameReader, outbox: Outbox, immediate: dict[str, Immediate]) -> None:
        self._reader = reader
        self._outbox = outbox
        self._immediate = immediate
        self._accepted: list[Incoming] = []
        self.in_flight: set[jsonrpc.RequestId] = set()
        self.initialized = False
        self.shut_down = False
        self.lost = False

    def open(self, params: m.InitializeParams) -> None:
        """Let requests in: `initialize` was accepted."""
        self.initialized = True
        if params.flow_control is not None:
            self._outbox.window = params.flow_control.window_bytes
        self._accepted.append(Incoming(None, "initialize", params))

    def feed(self, chunk: bytes) -> list[Incoming]:
        """Take bytes; return what they hold for the event loop, in order."""
        return self._take_all(self._reader.feed(chunk))

    def end(self) -> list[Incoming]:
        """Take the last frame, if the peer left it without a newline; return what it holds."""
        return self._take_all(self._reader.close())

    def _take_all(self, frames: list[Frame]) -> list[Incoming]:
        for frame in frames:
            # A few bytes can ask for much: who does not read the answers is not listened to meanwhile.
            self._outbox.wait_for_room()
            try:
                self._take(frame)
            except Exception:
                log.exception("a frame could not be taken")
                self._refuse(None, errors.InternalError())
        accepted, self._accepted = self._accepted, []
        return accepted

    def _take(self, frame: Frame) -> None:
        if isinstance(frame, FrameTooLarge):
            self._refuse(None, errors.InvalidRequest("The line is longer than limits.maxFrameBytes."))
        elif isinstance(frame, FramingLost):
            self.lost = True
            self._refuse(None, errors.InvalidRequest(f"{frame.problem} The connection cannot go on."))
        elif requests.is_batch(frame):
            self._take_batch(frame)
        else:
            self._take_single(frame)

    def _take_single(self, frame: bytes) -> None:
        try:
            request = requests.decode_request(frame)
        except requests.BadFrame as bad:
            self._refuse(bad.request_id, bad.error)
        else:
            self._dispatch(request, None)

    def _take_batch(self, frame: bytes) -> None:
        try:
            members = requests.decode_batch(frame)
        except requests.BadFrame as bad:
            self._refuse(None, bad.error)
            return
        expected = sum(isinstance(member, requests.BadFrame) or member.is_call for member in members)
        batch = BatchReply(expected, self._outbox.send)
        for member in members:
            if isinstance(member, requests.BadFrame):
                self._answer(batch, member.request_id, member.error)
            else:
                self._dispatch(member, batch)

    def _dispatch(self, request: requests.Request, batch: BatchReply | None) -> None:
        if isinstance(request.id, UnsetType):
            self._notified(request.method, request.params)
            return
        try:
            params = self._accept(request.id, request.method, request.params, in_batch=batch is not None)
            if (immediate := self._immediate.get(request.method)) is not None:
                self._answer(batch, request.id, immediate(params, self))
                return
        except Exception as error:
            self._answer(batch, request.id, as_sidecar_error(request.method, error))
            return
        self.in_flight.add(request.id)
        self._accepted.append(Incoming(request.id, request.method, params, batch))

    def _notified(self, method: str, raw: Raw) -> None:
        if method not in CLIENT_NOTIFICATIONS:
            return
        try:
            params = requests.decode_params(raw, PARAMS_DECODERS[method].decode)
        except (errors.InvalidParams, requests.BadFrame):
            log.warning("ignored a notification %s with wrong parameters", method)
            return
        if isinstance(params, m.StreamAckParams):
            self._outbox.ack(params.token, params.seq)
        else:
            self._accepted.append(Incoming(None, method, params))

    def _accept(self, request_id: jsonrpc.RequestId, method: str, raw: Raw, *, in_batch: bool) -> Any:
        if self.shut_down:
            raise errors.ShuttingDown()
        if request_id in self.in_flight:
            raise errors.DuplicateId(request_id)
        entry = METHODS.get(method)
        if entry is None:
            raise errors.MethodNotFound(method)
        if not entry.before_initialize:
            self._check_open()
        params = requests.decode_params(raw, PARAMS_DECODERS[method].decode)
        if in_batch and not (entry.in_batch and getattr(params, "partial_result_token", UNSET) is UNSET):
            raise errors.InvalidRequest(f"{method!r} cannot be part of a batch like this. Send it by itself.")
        if method == "shutdown":
            self.shut_down = True
        return params

    def _check_open(self) -> None:
        if not self.initialized:
            raise errors.NotInitialized()
        if len(self.in_flight) >= jsonrpc.MAX_IN_FLIGHT:
            raise errors.Overloaded(jsonrpc.MAX_IN_FLIGHT)

    def _answer(self, batch: BatchReply | None, request_id: jsonrpc.RequestId | None, outcome: Any) -> None:
        frame = jsonrpc.encode_outcome(request_id, outcome)
        if batch is None:
            self._outbox.send(frame)
        else:
            batch.put(request_id, frame)

    def _refuse(self, request_id: jsonrpc.RequestId | None, error: errors.SidecarError) -> None:
        self._answer(None, request_id, error)


def as_sidecar_error(method: str, error: BaseException) -> errors.SidecarError:
    """Return what the client is told of `error`; the log has the rest."""
    if isinstance(error, errors.SidecarError):
        return error
    if isinstance(error, requests.BadFrame):
        return error.error
    log.error("the handler of %s failed", method, exc_info=error)
    return errors.InternalError()
