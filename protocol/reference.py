"""The OpenRPC document as Markdown for people: docs/protocol.md."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from .introduction import INTRODUCTION
from .jsonrpc import SAFE_INTEGER

Json = dict[str, Any]

_BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "from",
    "minItems": "from",
    "minLength": "from",
    "maximum": "up to",
    "maxItems": "up to",
    "maxLength": "up to",
    "maxProperties": "up to",
}
_UNITS = {"string": " characters", "object": " members"}
_NUMBERS: dict[float, str] = {
    2**31 - 1: "2^31 - 1",
    SAFE_INTEGER: "2^53 - 1",
    -SAFE_INTEGER: "-(2^53 - 1)",
}
_TYPES = "What stands inside the messages above, and the frames around them."
_ERRORS = """\
`data` always holds `kind` and `retryable`. Switch on `kind`, never on the message. The methods list only what
not every request can meet. Any can meet {common};
what names no method gets `method_not_found`."""


def markdown(document: Json) -> str:
    """Return the reference for an OpenRPC document."""
    components = document["components"]
    errors = components["errors"]
    calls = [entry for entry in document["methods"] if "result" in entry]
    messages = [entry for entry in document["methods"] if "result" not in entry]
    common = _common_codes(calls, errors)
    parts = [INTRODUCTION, "## Methods"]
    for entry in calls:
        own = [error for error in _errors_of(entry, errors) if error["code"] not in common]
        parts += [*_message(entry, components), *_answer(entry, components), _own_errors(own)]
    parts.append("## Notifications from the client")
    for entry in messages:
        parts += _message(entry, components)
    parts.append("## Notifications from the server")
    for entry in document["x-notifications"]:
        parts += _message(entry, components)
    parts += ["## Types", _TYPES]
    for schema in _types_inside(document):
        parts += [f"### Type `{schema['title']}`", *_described(schema)]
    kinds = ", ".join(f"`{kind}`" for kind, error in errors.items() if error["code"] in common)
    parts += ["## Errors", _ERRORS.format(common=kinds), _error_table(errors)]
    return "\n\n".join(parts) + "\n"


def _message(entry: Json, components: Json) -> Iterator[str]:
    yield f"### `{entry['name']}`"
    yield entry["description"]
    if entry["params"]:
        yield f"**Parameters.** {_named(entry['x-params'], components)['description']}"
        yield _table(("parameter", "type", "default", "meaning"), map(_param, entry["params"]))
    else:
        yield "**Parameters.** None."


def _answer(entry: Json, components: Json) -> Iterator[str]:
    result = entry["result"]["schema"]
    if "$ref" in result:
        description, *rest = _described(_named(result, components))
        yield f"**Result.** {description}"
        yield from rest
    else:
        yield f"**Result.** {_type(result).capitalize()}."
    yield f"**Rules.** {_rules(entry)}"


def _rules(entry: Json) -> str:
    progress = entry.get("x-partialResult")
    rules = ["Works before `initialize`." if entry["x-beforeInitialize"] else "Needs `initialize` first."]
    if progress:
        rules.append(f"Can be streamed, as {_type(progress['schema'])}.")
    if not entry["x-inBatch"]:
        rules.append("Never in a batch.")
    elif progress:
        rules.append("Not in a batch when it is streamed.")
    return " ".join(rules)


def _types_inside(document: Json) -> list[Json]:
    """Return the types other than whole params and results, which stand beside their methods."""
    entries = [*document["methods"], *document["x-notifications"]]
    whole = [entry["x-params"] for entry in entries]
    whole += [entry["result"]["schema"] for entry in entries if "result" in entry]
    beside = {_name(schema) for schema in whole if "$ref" in schema}
    return [schema for name, schema in document["components"]["schemas"].items() if name not in beside]


def _described(schema: Json) -> Iterator[str]:
    yield schema["description"]
    if "properties" not in schema:
        yield f"{_type(schema)}."
        return
    rows: list[tuple[str, ...]] = []
    for name, member in schema["properties"].items():
        absent = "" if name in schema["required"] else ", or absent"
        if member.get("default") is not None:
            absent += f" for {json.dumps(member['default'])}"
        rows.append((f"`{name}`", _type(member) + absent, member.get("description", "")))
    yield _table(("member", "type", "meaning"), rows)


def _errors_of(entry: Json, errors: Json) -> list[Json]:
    return [errors[_name(reference)] for reference in entry["errors"]]


def _common_codes(calls: list[Json], errors: Json) -> set[int]:
    codes: list[set[int]] = [{error["code"] for error in _errors_of(entry, errors)} for entry in calls]
    return codes[0].intersection(*codes)


def _own_errors(errors: list[Json]) -> str:
    named: list[str] = []
    for error in errors:
        retryable = ", retryable" if error["data"]["retryable"] else ""
        named.append(f"`{error['data']['kind']}` ({error['code']}{retryable})")
    return f"**Errors.** {', '.join(named) or 'None of its own'}."


def _error_table(errors: Json) -> str:
    rows = (
        (f"`{kind}`", str(error["code"]), "yes" if error["data"]["retryable"] else "no", error["message"])
        for kind, error in errors.items()
    )
    return _table(("kind", "code", "retryable", "meaning"), rows)


def _param(param: Json) -> tuple[str, ...]:
    schema = param["schema"]
    default = f"`{json.dumps(schema['default'])}`" if "default" in schema else ""
    return (
        f"`{param['name']}`",
        _type(schema),
        "required" if param["required"] else default,
        param.get("description", ""),
    )


def _type(schema: Json) -> str:
    """Return a type with its bounds, in words."""
    bounds = _bounds(schema)
    match schema:
        case {"$ref": _}:
            words = f"[`{_name(schema)}`](#type-{_name(schema).lower()})"
        case {"anyOf": choices}:
            words = " or ".join(_type(choice) for choice in choices)
        case {"enum": values}:
            words = " or ".join(f"`{json.dumps(value)}`" for value in values)
        case {"const": value}:
            words = f"`{json.dumps(value)}`"
        case {"type": "array", "items": items}:
            words = f"list{bounds} of {_type(items)}"
        case {"type": "object", "additionalProperties": values}:
            words = f"object{bounds} of {_type(values)}"
        case _:
            words = schema.get("type", "anything") + bounds
    return words


def _bounds(schema: Json) -> str:
    words = [f"{word} {_number(schema[key])}" for key, word in _BOUNDS.items() if key in schema]
    return f" ({' '.join(words)}{_UNITS.get(schema['type'], '')})" if words else ""


def _number(value: float) -> str:
    return _NUMBERS.get(value) or f"{value:,}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _named(reference: Json, components: Json) -> Json:
    schema: Json = components["schemas"][_name(reference)]
    return schema


def _name(reference: Json) -> str:
    name: str = reference["$ref"].rpartition("/")[2]
    return name
