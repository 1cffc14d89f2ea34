"""JSON Schemas of the frames themselves: what stands around the params and results of `messages`."""

from typing import Any

from .jsonrpc import MAX_ID_CHARACTERS, SAFE_INTEGER

Json = dict[str, Any]

_REQUEST_ID: Json = {
    "title": "RequestId",
    "description": "Chosen by the client; no two requests in flight share one. Never a fraction, never null.",
    "anyOf": [
        {"type": "integer", "minimum": -SAFE_INTEGER, "maximum": SAFE_INTEGER},
        {"type": "string", "maxLength": MAX_ID_CHARACTERS},
    ],
}


def schemas(error_kinds: list[str]) -> Json:
    """Return the schema of every kind of frame, and of what only frames hold, by name."""
    version: Json = {"const": "2.0"}
    params: Json = {"type": "object"}
    request_id = _ref("RequestId")
    frames = [
        _object(
            "RequestFrame",
            "A call. It gets exactly one response, whatever happens to it.",
            {"jsonrpc": version, "id": request_id, "method": {"type": "string"}},
            {"params": params},
        ),
        _object(
            "NotificationFrame",
            "A message that is never answered, not even with an error.",
            {"jsonrpc": version, "method": {"type": "string"}},
            {"params": params},
        ),
        _object(
            "ResultFrame",
            "The response to a call that succeeded.",
            {"jsonrpc": version, "id": request_id, "result": {}},
        ),
        _object(
            "ErrorFrame",
            "The response to a call that failed. `id` is null where the frame did not tell it.",
            {
                "jsonrpc": version,
                "id": {"anyOf": [request_id, {"type": "null"}]},
                "error": _ref("ErrorObject"),
            },
        ),
    ]
    return {schema["title"]: schema for schema in [_REQUEST_ID, *frames, *_error(error_kinds)]}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(title: str, description: str, required: Json, optional: Json | None = None) -> Json:
    return {
        "title": title,
        "description": description,
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
    }


def _error(kinds: list[str]) -> list[Json]:
    return [
        _object(
            "ErrorObject",
            "`message` is for people: what happened, whose fault it is, what to do. Programs read `data`.",
            {"code": {"type": "integer"}, "message": {"type": "string"}, "data": _ref("ErrorData")},
        ),
        {
            "title": "ErrorKind",
            "description": "What went wrong. A newer server may know more of them.",
            "enum": sorted(kinds),
        },
        _object(
            "ErrorData",
            "`retryable` says whether the same request may succeed when it is sent again. The other members "
            "belong to one kind or another.",
            {"kind": _ref("ErrorKind"), "retryable": {"type": "boolean"}},
            {
                "id": {"description": "Of `duplicate_id`."} | _ref("RequestId"),
                "method": {"description": "Of `method_not_found`.", "type": "string"},
                "path": {"description": "Of `invalid_params`: where, such as `stop[1]`.", "type": "string"},
                "model": {"description": "Of the kinds that are about a model.", "type": "string"},
                "adapter": {"description": "Of the kinds that are about an adapter.", "type": "string"},
                "promptTokens": {"description": "Of `context_overflow`.", "type": "integer"},
                "contextLength": {"description": "Of `context_overflow`.", "type": "integer"},
                "maxUnsentBytes": {"description": "Of `slow_consumer`.", "type": "integer"},
                "maxSentFrameBytes": {"description": "Of `response_too_large`.", "type": "integer"},
                "maxInFlight": {"description": "Of `overloaded`.", "type": "integer"},
                "retryAfterMs": {"description": "Of `overloaded`: try again then.", "type": "integer"},
                "deadlineMs": {"description": "Of `deadline_exceeded`.", "type": "integer"},
                "neverStarted": {
                    "description": "Of `deadline_exceeded`: no time of the engine was spent on it.",
                    "type": "boolean",
                },
                "neededBytes": {"description": "Of `out_of_memory`.", "type": "integer"},
                "availableBytes": {"description": "Of `out_of_memory`.", "type": "integer"},
            },
        ),
    ]
