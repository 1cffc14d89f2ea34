"""The protocol as an OpenRPC 1.4 document: built from the types and the tables, and the checked-in copy.

What OpenRPC has no word for stands in members of our own:

    x-protocolVersion    the integer that `initialize` agrees on
    x-notifications      what the server sends unasked; what a client sends are methods without a result
    x-params             the whole params object of a method, closed: an unknown member is an error
    x-partialResult      the value of each `$/progress` that a `partialResultToken` asks for
    x-beforeInitialize   whether the method may come before `initialize`
    x-inBatch            whether the method may stand in a batch

OpenRPC wants one error per code in a method's list. Where several kinds share a code, the first of them
stands for all.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec

from . import envelope
from . import errors as e
from .messages import PROTOCOL_VERSION
from .methods import CLIENT_NOTIFICATIONS, METHODS, SERVER_NOTIFICATIONS, Method, Notification
from .version import VERSION

Json = dict[str, Any]

_FILE = Path(__file__).with_name("openrpc.json")
_REF = "#/components/schemas/"


def stored() -> bytes:
    """Return the checked-in document on one line; cheap, because nothing is built or decoded."""
    return msgspec.json.format(_FILE.read_bytes(), indent=-1)


def text() -> str:
    """Return what the checked-in file must hold."""
    return msgspec.json.format(msgspec.json.encode(document()), indent=2).decode() + "\n"


def document() -> Json:
    """Return the document, built anew."""
    types = _Types()
    return {
        "openrpc": "1.4.1",
        "info": {
            "title": "mlx-sidecar",
            "version": VERSION,
            "description": "JSON-RPC 2.0 with a process that runs language models on MLX.",
            "license": {"name": "Apache-2.0"},
        },
        "x-protocolVersion": PROTOCOL_VERSION,
        "methods": [
            *(_method(entry, types) for entry in METHODS.values()),
            *(_message(entry, types) for entry in CLIENT_NOTIFICATIONS.values()),
        ],
        "x-notifications": [_message(entry, types) for entry in SERVER_NOTIFICATIONS.values()],
        "components": {
            "schemas": dict(sorted(types.named.items())),
            "errors": {error.kind: _error(error) for error in error_types()},
        },
    }


def error_types() -> list[type[e.SidecarError]]:
    """Return every kind of error, in the order in which `errors` defines them."""
    kinds = [kind for kind in vars(e).values() if isinstance(kind, type) and issubclass(kind, e.SidecarError)]
    return [kind for kind in kinds if kind is not e.SidecarError]


class _Types:
    """Schemas of the types in the tables; those with a name stand in `named` and are referred to."""

    def __init__(self) -> None:
        entries = [*METHODS.values(), *CLIENT_NOTIFICATIONS.values(), *SERVER_NOTIFICATIONS.values()]
        kinds: list[Any] = [entry.params for entry in entries]
        for method in METHODS.values():
            kinds += [method.result, method.progress]
        found, named = msgspec.json.schema_components(kinds, ref_template=_REF + "{name}")
        self.named: Json = {}
        self._found = dict(zip(kinds, found, strict=True))
        for name, schema in (named | envelope.schemas([error.kind for error in error_types()])).items():
            self.named[name] = self._tidy(schema, named=True)

    def schema(self, kind: Any) -> Json:
        """Return the schema of a type, or the reference to it."""
        return self._found[kind]

    def _tidy(self, node: Any, named: bool = False) -> Any:
        """Return `node` with descriptions as prose, and with everything that has a title moved to `named`."""
        if isinstance(node, list):
            return [self._tidy(item) for item in cast(list[Any], node)]
        if not isinstance(node, dict):
            return node
        schema: Json = {key: self._tidy(value) for key, value in cast(Json, node).items()}
        if isinstance(schema.get("description"), str):
            schema["description"] = _prose(schema["description"])
        if named or not isinstance(schema.get("title"), str):
            return schema
        default = {"default": schema.pop("default")} if "default" in schema else {}
        if self.named.setdefault(schema["title"], schema) != schema:
            raise ValueError(f"There are two different types named {schema['title']}.")
        return {"$ref": _REF + schema["title"], **default}


def _method(entry: Method, types: _Types) -> Json:
    method = _message(entry, types) | {
        "result": {"name": "result", "schema": types.schema(entry.result)},
        "errors": [{"$ref": f"#/components/errors/{error.kind}"} for error in _errors_of(entry)],
        "x-beforeInitialize": entry.before_initialize,
        "x-inBatch": entry.in_batch,
    }
    if entry.progress is not None:
        method["x-partialResult"] = {"name": "value", "schema": types.schema(entry.progress)}
    return method


def _message(entry: Method | Notification, types: _Types) -> Json:
    whole = types.named[entry.params.__name__]
    params = [_param(name, name in whole["required"], schema) for name, schema in whole["properties"].items()]
    return {
        "name": entry.name,
        "description": entry.doc,
        "paramStructure": "by-name",
        "params": sorted(params, key=lambda param: not param["required"]),
        "x-params": types.schema(entry.params),
    }


def _param(name: str, required: bool, schema: Json) -> Json:
    described = {"description": schema["description"]} if "description" in schema else {}
    bare = {key: value for key, value in schema.items() if key != "description"}
    return {"name": name, **described, "required": required, "schema": bare}


def _errors_of(entry: Method) -> Iterator[type[e.SidecarError]]:
    """Yield one error per code: those that any request can meet, then the method's own."""
    yield from (e.ParseError, e.InvalidRequest, e.InvalidParams, e.InternalError)
    if not entry.before_initialize:
        yield from (e.NotInitialized, e.Overloaded, e.ResponseTooLarge)
        # A result with a finish reason says itself that it was cancelled.
        if "finish_reason" not in getattr(entry.result, "__struct_fields__", ()):
            yield e.RequestCancelled
    yield from (error for error in entry.errors if error is not e.InvalidRequest)


def _error(error: type[e.SidecarError]) -> Json:
    data = {"kind": error.kind, "retryable": error.retryable}
    return {"code": error.code, "message": _prose(error.__doc__ or ""), "data": data}


def _prose(docstring: str) -> str:
    """Return a docstring with one line per paragraph."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in docstring.split("\n\n"))
