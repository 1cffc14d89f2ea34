"""What an answer must look like: JSON, in which strings that begin with `$` and a small letter are matchers.

    "$any" "$string" "$integer" "$number" "$boolean" "$object" "$array"    a value of that kind
    "$absent"                       the member must not be there
    "$range:1..64" "$range:0.."     a number within bounds, which belong to it
    "$contains:text"                a string with that in it
    "$one-of:[1, null]"             one of these values
    "$text-of:t" "$tokens-of:t"     all the text, or all the ids, of the stream with the token t
    "$integer>name"                 any of the above, and its value is saved as `name`
    ["$some", a, b]                 an array with a value like a and one like b in it
    ["$each", a]                    an array of values like a, at least one
    ["$any-order", a, b]            an array of two values, one like a and one like b

Everything else stands for itself. Objects may have more members than the pattern, unless it says
`"$closed": true`; arrays may not have more values.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

_MATCHER = re.compile(r"\$([a-z][a-z-]*)(?::(.*?))?(?:>(\w+))?$", re.DOTALL)
_RANGE = re.compile(r"(-?\d*\.?\d*)\.\.(-?\d*\.?\d*)$")
_ARRAYS = ("$some", "$each", "$any-order")
_CLOSED = "$closed"


class PatternError(Exception):
    """A pattern has no meaning."""


ABSENT: Any = object()
"""The value of a member that is not there."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "any": lambda value: value is not ABSENT,
    "absent": lambda value: value is ABSENT,
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": _is_number,
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
}
_WITH_ARGUMENT = ("range", "contains", "one-of", "text-of", "tokens-of")


class Matcher:
    """Compares values with patterns. `saves` holds what the last successful comparison has saved.

    `streams` maps a progress token to the whole text and all ids of its stream.
    """

    def __init__(self, streams: Mapping[str, tuple[str, list[int]]] | None = None) -> None:
        self._streams = streams or {}
        self.saves: dict[str, Any] = {}

    def mismatch(self, pattern: Any, value: Any) -> str | None:
        """Return where and why `value` is not like `pattern`, or None if it is."""
        self.saves = {}
        return self._compare(pattern, value, "")

    def _compare(self, pattern: Any, value: Any, path: str) -> str | None:
        if isinstance(pattern, str) and (found := _MATCHER.match(pattern)) is not None:
            return self._match(found, value, path)
        if isinstance(pattern, dict):
            return self._compare_objects(cast(dict[str, Any], pattern), value, path)
        if isinstance(pattern, list):
            return self._compare_arrays(cast(list[Any], pattern), value, path)
        return None if _same(pattern, value) else _complaint(path, _show(pattern), value)

    def _match(self, found: re.Match[str], value: Any, path: str) -> str | None:
        name, argument, save = found[1], found[2], found[3]
        fits = _KINDS[name](value) if name in _KINDS else self._fits(name, argument, value)
        if not fits:
            return _complaint(path, found[0], value)
        if save is not None:
            self.saves[save] = value
        return None

    def _fits(self, name: str, argument: str, value: Any) -> bool:
        match name:
            case "range":
                return _is_number(value) and _within(argument, value)
            case "contains":
                return isinstance(value, str) and argument in value
            case "one-of":
                return any(_same(choice, value) for choice in json.loads(argument))
            case _:
                stream = self._streams.get(argument, ("", []))
                return _same(stream[0] if name == "text-of" else stream[1], value)

    def _compare_objects(self, pattern: dict[str, Any], value: Any, path: str) -> str | None:
        if not isinstance(value, dict):
            return _complaint(path, "an object", value)
        members = cast(dict[str, Any], value)
        for name, expected in pattern.items():
            if name != _CLOSED:
                problem = self._compare(expected, members.get(name, ABSENT), f"{path}.{name}")
                if problem is not None:
                    return problem
        if pattern.get(_CLOSED) and (surplus := members.keys() - pattern.keys()):
            return _complaint(f"{path}.{min(surplus)}", "nothing", members[min(surplus)])
        return None

    def _compare_arrays(self, pattern: list[Any], value: Any, path: str) -> str | None:
        if not isinstance(value, list):
            return _complaint(path, "an array", value)
        values = cast(list[Any], value)
        rule = pattern[0] if pattern and pattern[0] in _ARRAYS else None
        expected = pattern[1:] if rule else pattern
        if rule == "$each":
            expected = expected * max(len(values), 1)
        if rule != "$some" and len(values) != len(expected):
            return _complaint(path, f"an array of {len(expected)}", values)
        if rule in ("$some", "$any-order"):
            return self._compare_somewhere(expected, values, path)
        for index, (one, item) in enumerate(zip(expected, values, strict=True)):
            problem = self._compare(one, item, f"{path}[{index}]")
            if problem is not None:
                return problem
        return None

    def _compare_somewhere(self, expected: list[Any], values: list[Any], path: str) -> str | None:
        left = list(values)
        for one in expected:
            place = next((i for i, item in enumerate(left) if self._compare(one, item, path) is None), None)
            if place is None:
                return _complaint(path, f"somewhere in the array {_show(one)}", left)
            del left[place]
        return None


def check_pattern(pattern: Any) -> None:
    """Raise PatternError if `pattern` has a matcher that does not exist or lacks its argument."""
    if isinstance(pattern, str):
        found = _MATCHER.match(pattern)
        if found is not None:
            _check_matcher(found[0], found[1], found[2])
    elif isinstance(pattern, dict):
        for value in cast(dict[str, Any], pattern).values():
            check_pattern(value)
    elif isinstance(pattern, list):
        values = cast(list[Any], pattern)
        for value in values[1:] if values and values[0] in _ARRAYS else values:
            check_pattern(value)


def _check_matcher(text: str, name: str, argument: str | None) -> None:
    if (name not in _KINDS) if argument is None else (name not in _WITH_ARGUMENT):
        raise PatternError(f"there is no matcher {text!r}")
    if name == "range" and _RANGE.match(argument or "") is None:
        raise PatternError(f"not a range: {text!r}")
    if name == "one-of":
        json.loads(argument or "")


def _same(expected: Any, value: Any) -> bool:
    """Equality of JSON values, in which true is not 1 and the integer 1 is not 1.0."""
    if isinstance(expected, list) and isinstance(value, list):
        ours, theirs = cast(list[Any], expected), cast(list[Any], value)
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(expected, dict) and isinstance(value, dict):
        our, their = cast(dict[str, Any], expected), cast(dict[str, Any], value)
        return our.keys() == their.keys() and all(_same(our[name], their[name]) for name in our)
    if isinstance(expected, float):
        return _is_number(value) and expected == value
    same_kind = type(cast(object, expected)) is type(cast(object, value))
    return same_kind and bool(expected == value)


def _within(bounds: str, value: float) -> bool:
    found = _RANGE.match(bounds)
    assert found is not None
    low, high = found[1], found[2]
    return (not low or float(low) <= value) and (not high or value <= float(high))


def _complaint(path: str, expected: str, value: object) -> str:
    return f"{path.lstrip('.') or 'the whole'}: expected {expected}, got {_show(value)}"


def _show(value: object) -> str:
    text = "nothing" if value is ABSENT else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
