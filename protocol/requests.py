"""The JSON-RPC 2.0 envelope of what a client sends: one frame to a request, a notification, or a batch.

Facts about the decoder that this rests on: msgspec raises `ValidationError` (a `DecodeError`) for valid JSON
of the wrong shape, plain `DecodeError` for what is not JSON, and `RecursionError` beyond about a thousand
levels of nesting, even inside a member that is skipped.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import msgspec

from .errors import InvalidParams, InvalidRequest, ParseError
from .jsonrpc import MAX_BATCH_MEMBERS, MAX_ID_CHARACTERS, SAFE_INTEGER, RequestId

ParamsT = TypeVar("ParamsT")


class Request(msgspec.Struct):
    """A call (with `id`) or a notification (without). `params` is still undecoded JSON."""

    jsonrpc: Literal["2.0"]
    method: str
    id: RequestId | msgspec.UnsetType = msgspec.UNSET
    params: msgspec.Raw = msgspec.Raw(b"{}")

    @property
    def is_call(self) -> bool:
        """Whether it wants an answer."""
        return self.id is not msgspec.UNSET


class BadFrame(Exception):
    """A frame that cannot be dispatched: what to answer, and to which id (None when unknown)."""

    def __init__(self, error: ParseError | InvalidRequest, request_id: RequestId | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.request_id = request_id


class _Members(msgspec.Struct):
    jsonrpc: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    method: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_request_decoder = msgspec.json.Decoder(Request)
_raw_decoder = msgspec.json.Decoder(msgspec.Raw)
_members_decoder = msgspec.json.Decoder(_Members)
# A struct, not a list: of this the decoder makes no more members than there may be.
_batch_decoder = msgspec.json.Decoder(
    msgspec.defstruct(
        "_Batch",
        [(f"member{n}", msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for n in range(MAX_BATCH_MEMBERS)],
        array_like=True,
        forbid_unknown_fields=True,
    )
)


# How clients that know only positional parameters, or always send one, say that there are none.
_NOTHING = (b"null", b"[]", b"[null]")
_LONGEST_NOTHING = 16


def decode_request(frame: bytes) -> Request:
    """Return the request in one frame.

    Raises:
        BadFrame: not JSON, or JSON that is not a JSON-RPC 2.0 request.
    """
    _check_text(frame)
    try:
        request = _request_decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise _bad_frame(frame) from None
    if not isinstance(request.id, msgspec.UnsetType) and (problem := _id_problem(request.id)) is not None:
        raise BadFrame(InvalidRequest(problem), None)
    if request.is_call and bytes(memoryview(request.params)[:1]) not in (b"{", b"[", b"n"):
        problem = 'The member "params" must be an object.'
        raise BadFrame(InvalidRequest(problem), cast(RequestId, request.id))
    return request


def is_batch(frame: bytes) -> bool:
    """Return whether the frame is an array, or would be one."""
    return frame.lstrip()[:1] == b"["


def decode_batch(frame: bytes) -> list[Request | BadFrame]:
    """Return the members of a batch, each decoded or refused by itself.

    Raises:
        BadFrame: not JSON, empty, or too many members.
    """
    _check_text(frame)
    try:
        members = msgspec.structs.astuple(_batch_decoder.decode(frame))
    except msgspec.ValidationError:
        if not _is_json(frame):
            raise BadFrame(ParseError(), None) from None
        problem = f"A batch holds at most {MAX_BATCH_MEMBERS} requests. Send them in parts."
        raise BadFrame(InvalidRequest(problem), None) from None
    except (msgspec.DecodeError, RecursionError):
        raise BadFrame(ParseError(), None) from None
    if members[0] is msgspec.UNSET:
        raise BadFrame(InvalidRequest("A batch holds at least one request."), None)
    return [_decode_member(bytes(member)) for member in members if member is not msgspec.UNSET]


def decode_params(raw: msgspec.Raw, decode: Callable[[msgspec.Raw], ParamsT]) -> ParamsT:
    """Return `raw` as the type that `decode` was built for.

    Raises:
        InvalidParams: with the path of the parameter that is wrong.
        BadFrame: the JSON inside is broken after all (bad UTF-8 in a string, nesting).
    """
    if len(text := memoryview(raw)) <= _LONGEST_NOTHING and bytes(text).replace(b" ", b"") in _NOTHING:
        raw = msgspec.Raw(b"{}")
    try:
        return decode(raw)
    except msgspec.ValidationError as error:
        raise _invalid_params(str(error)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise BadFrame(ParseError(), None) from None


def _check_text(frame: bytes) -> None:
    # msgspec looks only into the strings that it returns, and a frame is JSON as a whole or not at all.
    if not frame.isascii():
        try:
            frame.decode()
        except UnicodeDecodeError:
            raise BadFrame(ParseError(), None) from None


def _decode_member(frame: bytes) -> Request | BadFrame:
    try:
        return decode_request(frame)
    except BadFrame as bad:
        return bad


def _bad_frame(frame: bytes) -> BadFrame:
    # Validation stops at the first wrong member, so whether the rest is JSON at all is only known now.
    # Nothing is built of it: a frame of 64 MiB may hold twenty million empty lists.
    if not _is_json(frame):
        return BadFrame(ParseError(), None)
    try:
        members = _members_decoder.decode(frame)
    except msgspec.ValidationError:
        return BadFrame(InvalidRequest("A request is a JSON object."), None)
    request_id = _decoded(members.id, RequestId)
    if _decoded(members.jsonrpc, str) != "2.0":
        problem = 'The member "jsonrpc" must be "2.0".'
    elif _decoded(members.method, str) is None:
        problem = 'The member "method" must be a string.'
    else:
        problem = 'The member "id" must be a string or an integer.'
    return BadFrame(InvalidRequest(problem), None if _id_problem(request_id) else request_id)


def _is_json(frame: bytes) -> bool:
    try:
        _raw_decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _decoded(raw: msgspec.Raw | msgspec.UnsetType, kind: Any) -> Any:
    """Return the member as `kind`, or None if it is none."""
    try:
        return None if isinstance(raw, msgspec.UnsetType) else msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError:
        return None


def _id_problem(request_id: RequestId | None) -> str | None:
    if isinstance(request_id, int) and abs(request_id) > SAFE_INTEGER:
        return "The id is larger than 2^53 - 1. Use a smaller one or a string."
    if isinstance(request_id, str) and len(request_id) > MAX_ID_CHARACTERS:
        return f"The id is longer than {MAX_ID_CHARACTERS} characters. Use a shorter one."
    return None


def _invalid_params(message: str) -> InvalidParams:
    """Turn "Expected `int`, got `str` - at `$.stop[...]`" into a problem and a path."""
    problem, _, place = message.partition(" - at `$")
    path = place.rstrip("`").lstrip(".")
    problem = problem.replace("`", "'")
    for phrase in ("Object contains unknown field '", "Object missing required field '"):
        if problem.startswith(phrase):
            field = problem.removeprefix(phrase).rstrip("'")
            path = f"{path}.{field}" if path else field
            problem = "is not known" if "unknown" in phrase else "is required"
    return InvalidParams(path, problem[0].lower() + problem[1:])
