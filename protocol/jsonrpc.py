"""The JSON-RPC 2.0 envelope of what is sent: responses, notifications, and requests of clients.

`requests` decodes what a client sends.
"""

from typing import Any, Literal, cast

import msgspec

from .errors import ErrorObject, ResponseTooLarge, SidecarError
from .framing import MAX_OUTBOUND_FRAME_BYTES

RequestId = int | str
SAFE_INTEGER = 2**53 - 1
"""Largest integer that a JavaScript number holds exactly; ids and seeds stay within it."""

MAX_ID_CHARACTERS = 1024
"""An id is echoed, so it must not take the room of the answer."""

MAX_BATCH_MEMBERS = 64

MAX_IN_FLIGHT = 1024
"""Requests of one connection that wait for their answers: far more than run at once, few enough to hold."""


class _Response(msgspec.Struct, kw_only=True):
    jsonrpc: str = "2.0"
    id: RequestId | None
    result: Any


class _ErrorResponse(msgspec.Struct, kw_only=True):
    jsonrpc: str = "2.0"
    id: RequestId | None
    error: ErrorObject


class _Notification(msgspec.Struct, kw_only=True):
    jsonrpc: str = "2.0"
    method: str
    params: Any


class Reply(msgspec.Struct):
    """A frame as a client receives it: a response (`id`, `result` or `error`) or a notification."""

    jsonrpc: Literal["2.0"]
    id: RequestId | None = None
    method: str | None = None
    params: msgspec.Raw = msgspec.Raw(b"null")
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: ErrorObject | None = None


_encoder = msgspec.json.Encoder()
_reply_decoder = msgspec.json.Decoder(Reply)

# Line ends to JavaScript's readline and to str.splitlines, though not to JSON.
_LINE_SEPARATORS = (
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
    ("\u0085".encode(), b"\\u0085"),
)


def decode_reply(frame: bytes) -> Reply:
    """Return the response or notification in one frame; raise msgspec.DecodeError on anything else."""
    return _reply_decoder.decode(frame)


def encode_outcome(request_id: RequestId | None, outcome: object) -> bytes:
    """Return the response frame (no newline) for a call that ended with a result or a SidecarError."""
    if isinstance(outcome, SidecarError):
        return _encode(_ErrorResponse(id=request_id, error=outcome.to_wire()))
    frame = _encode(_Response(id=request_id, result=outcome))
    if len(frame) > MAX_OUTBOUND_FRAME_BYTES:
        return encode_outcome(request_id, ResponseTooLarge(MAX_OUTBOUND_FRAME_BYTES))
    return frame


def encode_notification(method: str, params: object) -> bytes:
    """Return the frame (no newline) of a notification."""
    return _encode(_Notification(method=method, params=params))


def encode_request(request_id: RequestId, method: str, params: object) -> bytes:
    """Return the frame (no newline) of a call, for clients."""
    return _encode({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params})


def _encode(message: object) -> bytes:
    try:
        frame = _encoder.encode(message)
    except UnicodeEncodeError:
        # A lone surrogate must not cost the client its answer.
        frame = _encoder.encode(_without_surrogates(msgspec.to_builtins(message)))
    if not frame.isascii():
        for raw, escaped in _LINE_SEPARATORS:
            if raw in frame:
                frame = frame.replace(raw, escaped)
    return frame


def _without_surrogates(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "replace").decode()
        case list():
            return [_without_surrogates(item) for item in cast(list[Any], value)]
        case dict():
            members = cast(dict[Any, Any], value)
            return {_without_surrogates(key): _without_surrogates(item) for key, item in members.items()}
        case _:
            return value
