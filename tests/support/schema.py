"""Whether a frame is what the protocol promises, by the checked-in OpenRPC document."""

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any, cast

from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from mlx_sidecar.protocol import openrpc
from mlx_sidecar.protocol.jsonrpc import MAX_BATCH_MEMBERS

Json = dict[str, Any]
MethodsById = Mapping[int | str, str]

_DOCUMENT = "urn:openrpc"
_FRAMES = "components/schemas"
_CODES_WITHOUT_ID = {-32700, -32600}
_CODES_WITHOUT_METHOD = {-32700, -32600, -32601}


class Frames:
    """Checks frames as parsed JSON; an AssertionError says what is wrong where, and shows the frame.

    A client must take members that it does not know, but a server of this very version has none to send, so
    here every object is closed.
    """

    def __init__(self, document: Json) -> None:
        resource = Resource[Any].from_contents(_closed(document), default_specification=DRAFT202012)
        self._registry = Registry[Any]().with_resource(_DOCUMENT, resource)
        self._validators: dict[str, Draft202012Validator] = {}
        self._errors: Json = document["components"]["errors"]
        self._calls: dict[str, str] = {}
        self._codes: dict[str, set[int]] = {}
        self._notes: dict[str, str] = {}
        for at, entry in enumerate(document["methods"]):
            if "result" in entry:
                kinds = (error["$ref"].rpartition("/")[2] for error in entry["errors"])
                self._codes[entry["name"]] = {self._errors[kind]["code"] for kind in kinds}
                self._calls[entry["name"]] = f"methods/{at}"
            else:
                self._notes[entry["name"]] = f"methods/{at}"
        self._pushes: dict[str, str] = {
            entry["name"]: f"x-notifications/{at}" for at, entry in enumerate(document["x-notifications"])
        }

    def sent(self, message: Any) -> None:
        """Check what a client says: a request, a notification, or a batch of them."""
        for member in _members(message):
            if isinstance(member, dict) and "id" in member:
                self._message("RequestFrame", self._calls, member)
            else:
                self._message("NotificationFrame", self._notes, member)

    def received(self, message: Any, methods: MethodsById | None = None) -> None:
        """Check what a server says; `methods` holds the method of each request by its id, as far as known."""
        if isinstance(message, dict) and "method" in message:
            self._message("NotificationFrame", self._pushes, message)
            return
        for member in _members(message):
            if isinstance(member, dict) and "error" in member:
                self._error(member, methods or {})
            else:
                self._result(member, methods or {})

    def _message(self, frame: str, known: dict[str, str], message: Any) -> None:
        self._check(f"{_FRAMES}/{frame}", message, message)
        place = known.get(message["method"])
        assert place is not None, f"{message['method']!r} cannot be said like this: {_shown(message)}"
        self._check(f"{place}/x-params", message.get("params", {}), message)

    def _result(self, message: Any, methods: MethodsById) -> None:
        self._check(f"{_FRAMES}/ResultFrame", message, message)
        if (method := methods.get(message["id"])) is not None:
            place = self._calls.get(method)
            assert place is not None, f"{method!r} has no result: {_shown(message)}"
            self._check(f"{place}/result/schema", message["result"], message)

    def _error(self, message: Any, methods: MethodsById) -> None:
        self._check(f"{_FRAMES}/ErrorFrame", message, message)
        code, data = message["error"]["code"], message["error"]["data"]
        listed = self._errors[data["kind"]]
        assert code == listed["code"], f"{data['kind']} has the code {listed['code']}: {_shown(message)}"
        assert listed["data"].items() <= data.items(), f"{listed['data']} is promised: {_shown(message)}"
        possible = self._codes_for(message["id"], methods)
        assert code in possible, f"This request cannot fail like this: {_shown(message)}"

    def _codes_for(self, request_id: int | str | None, methods: MethodsById) -> set[int]:
        if request_id is None:
            return _CODES_WITHOUT_ID
        if request_id not in methods:
            return {error["code"] for error in self._errors.values()}
        return self._codes.get(methods[request_id], _CODES_WITHOUT_METHOD)

    def _check(self, place: str, value: Any, message: Any) -> None:
        if place not in self._validators:
            schema = {"$ref": f"{_DOCUMENT}#/{place}"}
            self._validators[place] = Draft202012Validator(schema, registry=self._registry)
        problem = next(self._validators[place].iter_errors(value), None)
        assert problem is None, f"{problem.json_path}: {problem.message}, by {place}: {_shown(message)}"


class Conversation:
    """Remembers what one client has asked, so that every answer is checked against its question."""

    def __init__(self) -> None:
        self._asked: dict[int | str, list[str]] = {}

    def said(self, data: bytes) -> None:
        """Note the requests in what a client writes, as far as they are whole lines of JSON."""
        for line in data.split(b"\n"):
            with suppress(ValueError, RecursionError):
                self._note(json.loads(line))

    def heard(self, message: Any) -> None:
        """Check what the server says."""
        # An id that stands for two methods at once says nothing about either.
        known = {key: methods[0] for key, methods in self._asked.items() if len({*methods}) == 1}
        frames().received(message, known)
        for member in _members(message):
            if "method" not in member and member["id"] in known:
                self._answered(member["id"])

    def _answered(self, request_id: int | str) -> None:
        methods = self._asked[request_id]
        methods.pop()
        if not methods:
            del self._asked[request_id]

    def _note(self, message: Any) -> None:
        match message:
            case list():
                for member in cast(list[Any], message):
                    self._note(member)
            case {"id": bool()}:
                pass  # To Python it would be the id 0 or 1.
            case {"id": int() | str() as request_id, "method": str() as method}:
                self._asked.setdefault(request_id, []).append(method)
            case _:
                pass


@cache
def frames() -> Frames:
    """Return the checks for this version; made once, because compiling takes longer than checking."""
    return Frames(json.loads(openrpc.stored()))


def _members(message: Any) -> list[Any]:
    if not isinstance(message, list):
        return [message]
    members = cast(list[Any], message)
    assert 0 < len(members) <= MAX_BATCH_MEMBERS, f"A batch of {len(members)}: {_shown(members)}"
    return members


def _closed(schema: Any) -> Any:
    """Return a copy in which objects have no members but those that are listed."""
    if isinstance(schema, list):
        return [_closed(item) for item in cast(list[Any], schema)]
    if not isinstance(schema, dict):
        return schema
    copy: Json = {key: _closed(value) for key, value in cast(Json, schema).items()}
    return {"additionalProperties": False, **copy} if "properties" in copy else copy


def _shown(message: Any) -> str:
    return json.dumps(message)[:1000]
