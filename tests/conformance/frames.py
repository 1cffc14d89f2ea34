"""What holds for every single frame that a server sends, whatever the conversation is about.

It is UTF-8 and strict JSON without the three characters that some line readers take for line ends. It is a
response, a notification, or an array of responses. Every error has a code, a message and the `data` that
clients switch on.
"""

import json
from typing import Any, NoReturn, cast

_SEPARATORS = tuple(character.encode() for character in "\u2028\u2029\u0085")


class Violation(Exception):
    """A frame breaks one of the rules; the message says which."""


def decode(frame: bytes) -> Any:
    """Return the message in one frame.

    Raises:
        Violation: the frame breaks a rule.
    """
    try:
        message: Any = json.loads(frame.decode(), parse_constant=_refuse, object_pairs_hook=_members)
        json.dumps(message, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Violation(f"the frame is not JSON in UTF-8: {error}") from None
    if any(separator in frame for separator in _SEPARATORS):
        raise Violation("the frame has a U+2028, U+2029 or U+0085 that is not escaped")
    if isinstance(message, list):
        _check_batch(cast(list[Any], message))
    else:
        _check(message)
    return cast(Any, message)


def _check_batch(messages: list[Any]) -> None:
    if not messages:
        raise Violation("an array without responses is no answer")
    for message in messages:
        _check(message)
        if "method" in message:
            raise Violation("an array may hold responses only")


def _check(message: Any) -> None:
    if not isinstance(message, dict):
        raise Violation("the frame is not a JSON object")
    members = cast(dict[str, Any], message)
    if members.get("jsonrpc") != "2.0":
        raise Violation('the member "jsonrpc" is not "2.0"')
    if "method" in members:
        _check_notification(members)
    else:
        _check_response(members)


def _check_notification(members: dict[str, Any]) -> None:
    if not isinstance(members["method"], str):
        raise Violation('the member "method" is not a string')
    if "id" in members:
        raise Violation("a server sends no requests")
    if not isinstance(members.get("params", {}), dict | list):
        raise Violation('the member "params" is neither an object nor an array')


def _check_response(members: dict[str, Any]) -> None:
    identity = members.get("id", members)
    if isinstance(identity, bool) or not isinstance(identity, int | float | str | None):
        raise Violation('the member "id" of a response is missing, or not a string, a number or null')
    if ("result" in members) == ("error" in members):
        raise Violation('a response has either the member "result" or the member "error"')
    if "error" in members:
        _check_error(members["error"])
    elif identity is None:
        raise Violation("a result must say which request it belongs to")


def _check_error(error: Any) -> None:
    if not isinstance(error, dict):
        raise Violation('the member "error" is not an object')
    members = cast(dict[str, Any], error)
    code, message, data = members.get("code"), members.get("message"), members.get("data")
    if not isinstance(code, int) or isinstance(code, bool):
        raise Violation("an error has an integer as its code")
    if not isinstance(message, str) or not message:
        raise Violation("an error has a message")
    if not isinstance(data, dict):
        raise Violation('an error has "data" with its kind')
    details = cast(dict[str, Any], data)
    if not isinstance(details.get("kind"), str) or not isinstance(details.get("retryable"), bool):
        raise Violation('the "data" of an error has a "kind" and says whether it is "retryable"')


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is there twice")
    return members
