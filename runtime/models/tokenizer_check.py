"""Whether a tokenizer.json can be meant to be used: some make a short text huge, or one match take for ever.

Neither can be stopped once it runs, and the regex engine panics when it gives up. So it is looked for before.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec

from .bounded_json import MAX_JSON_DEPTH, MIB, BadFile, children, depth_exceeds, read_bounded

MAX_TOKENIZER_BYTES = 64 * MIB
MAX_TEMPLATE_BYTES = MIB
MAX_GROWTH = 64
"""By how much all replacements together may lengthen a text."""
MAX_PATTERN = 4096
MAX_ADDED = 1024
"""Tokens that may be put around every text, and characters in front of it."""

_MANY = 1000
"""A repetition with a higher bound than this is as good as endless."""


class _Pipeline(msgspec.Struct):
    """What happens to a text. The vocabulary, nearly all of the file, is skipped."""

    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


def check_tokenizer(path: Path) -> None:
    """Check the steps that a tokenizer.json prescribes.

    Raises:
        BadFile: it is not one, or a step could keep us busy without end, or fill the memory.
        OSError: it cannot be read.
    """
    try:
        pipeline = msgspec.json.decode(read_bounded(path, MAX_TOKENIZER_BYTES), type=_Pipeline)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise BadFile(f"its {path.name} is not valid") from None
    for part in (pipeline.normalizer, pipeline.pre_tokenizer, pipeline.post_processor, pipeline.decoder):
        if depth_exceeds(part, MAX_JSON_DEPTH):
            raise BadFile(f"its {path.name} is nested deeper than {MAX_JSON_DEPTH} levels")
        _check_steps(path, list(_objects(part)))


def _check_steps(path: Path, steps: list[dict[str, Any]]) -> None:
    growth = 1.0
    for step in steps:
        if any(runs_away(pattern) for pattern in _patterns(step)):
            raise BadFile(f"its {path.name} has a pattern that could be tried without end")
        growth *= _growth(step)
        if growth > MAX_GROWTH:
            raise BadFile(f"its {path.name} has replacements that could make a short text huge")
        if max(len(step.get(name) or "") for name in ("prepend", "single", "pair")) > MAX_ADDED:
            raise BadFile(f"its {path.name} adds more than {MAX_ADDED} tokens to every text")


def check_template(settings: dict[str, Any]) -> None:
    """Check the chat template in tokenizer_config.json, if there is one.

    Raises:
        BadFile: it is neither a text nor a list of named ones, or too long.
    """
    template = settings.get("chat_template")
    try:
        templates = msgspec.convert([] if template is None else template, list[_NamedTemplate] | str)
    except msgspec.ValidationError:
        raise BadFile("its tokenizer_config.json has a chat_template of an unknown form") from None
    texts = [templates] if isinstance(templates, str) else [entry.template for entry in templates]
    if sum(map(len, texts)) > MAX_TEMPLATE_BYTES:
        raise BadFile(f"its chat template is too large: more than {MAX_TEMPLATE_BYTES // MIB} MiB")


def check_template_file(path: Path) -> None:
    """Check that a template's file is text, and not too long.

    Raises:
        BadFile: it is not.
        OSError: it cannot be read.
    """
    try:
        read_bounded(path, MAX_TEMPLATE_BYTES).decode()
    except UnicodeDecodeError:
        raise BadFile(f"its {path.name} is not UTF-8") from None


def runs_away(pattern: str) -> bool:
    """Tell whether a regex repeats without bound what itself has such a repetition, or is absurdly long.

    `(a+)+b` tries a number of ways that doubles with every character of a text that does not match.
    """
    if len(pattern) > MAX_PATTERN:
        return True
    open_groups, repeated, position = [False], False, 0
    while position < len(pattern):
        sign, after = pattern[position], position + 1
        if sign == "(":
            open_groups.append(False)
            after += pattern.startswith("?", after)
        elif sign == ")" and len(open_groups) > 1:
            repeated = open_groups.pop()
            open_groups[-1] |= repeated
        elif sign in "*+" or (sign == "{" and _is_endless(pattern[position:])):
            if repeated:
                return True
            open_groups[-1], repeated = True, True
            after += len(pattern[after:]) - len(pattern[after:].lstrip("?+"))
        elif sign not in "?{},0123456789":
            after, repeated = _behind_atom(pattern, position), False
        position = after
    return False


def _is_endless(text: str) -> bool:
    bounds = text[1 : text.find("}")].split(",")
    last = bounds[-1].strip()
    return len(bounds) > 1 and (not last or (last.isdigit() and int(last) > _MANY))


def _behind_atom(pattern: str, position: int) -> int:
    """Return where one character, escape or class of characters ends."""
    if pattern[position] == "\\":
        braces = pattern.startswith("{", position + 2) and pattern[position + 1] in "pPxuk"
        return pattern.find("}", position) + 1 if braces else position + 2
    if pattern[position] != "[":
        return position + 1
    depth, start = 0, position
    while position < len(pattern):
        sign = pattern[position]
        # A bracket that comes first in a class is one of its characters.
        first = position in (start + 1, start + 2) and pattern[start + 1 : position] in ("", "^")
        depth += (sign == "[") - (sign == "]" and not first)
        position += 2 if sign == "\\" else 1
        if depth == 0:
            break
    return position


def _growth(step: dict[str, Any]) -> float:
    if step.get("type") != "Replace":
        return 1.0
    pattern: Any = step.get("pattern")
    text = cast(dict[str, Any], pattern).get("String") if isinstance(pattern, dict) else None
    replaced = len(text) if isinstance(text, str) else 1
    return max(1.0, len(str(step.get("content"))) / max(replaced, 1))


def _patterns(step: dict[str, Any]) -> Iterator[str]:
    pattern: Any = step.get("pattern")
    regex = cast(dict[str, Any], pattern).get("Regex") if isinstance(pattern, dict) else None
    if isinstance(regex, str):
        yield regex


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield cast(dict[str, Any], value)
    for inner in children(cast(object, value)):
        yield from _objects(inner)
