"""Plain YAML: keys and values, with the line of each.

What is clever about YAML is refused: anchors, tags, duplicate keys. Unquoted text means what it does in
YAML 1.2.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .values import ConfigError, plain


class Entry(NamedTuple):
    """What stands behind a key: the value, and its line, counted from 1."""

    value: Any
    line: int
    node: yaml.Node

    def line_of(self, path: str) -> int:
        """Return the line of a part of the value, such as `[0].model`; of what lacks it, if it is missing."""
        if not path:
            return self.line
        node = self.node
        for index, name in re.findall(r"\[(\d+)\]|\.(\w+)", path):
            if isinstance(node, yaml.SequenceNode) and index:
                node = node.value[int(index)]
            elif isinstance(node, yaml.MappingNode):
                node = {key.value: value for key, value in node.value}.get(name, node)
        return node.start_mark.line + 1


def entries(text: str, path: Path) -> dict[str, Entry]:
    """Return what the text of the file at `path` sets, by key, whatever those are.

    Raises:
        ConfigError: it is not plain YAML.
    """
    try:
        node = _compose(text)
        if node is None or node.value == "":
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise _NotPlainError("it must be lines of `key: value`", node)
        return {key: Entry(_value(child), line, child) for key, line, child in _members(node)}
    except RecursionError:
        raise ConfigError(f"{path}:1: it is nested too deeply. Write plain keys and values.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}:{line}: {_sentence(error)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: a character is not allowed in YAML. Remove it.") from None


class _NotPlainError(yaml.MarkedYAMLError):
    """Well-formed YAML that is more than plain keys and values."""

    def __init__(self, problem: str, place: Any) -> None:
        super().__init__(problem=problem, problem_mark=place.start_mark)


class _Composer(yaml.SafeLoader):
    """Builds nodes. It stops at the first anchor, so that a few lines cannot stand for millions."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # pyright: ignore[reportUnknownVariableType]
        if event.anchor is not None:
            raise _NotPlainError("anchors and aliases are not supported; write the value again", event)
        if event.tag is not None:
            raise _NotPlainError("tags are not supported; write the value alone", event)
        return super().compose_node(parent, index)


def _compose(text: str) -> yaml.Node | None:
    composer = _Composer(text)
    try:
        return composer.get_single_node()
    finally:
        composer.dispose()


def _members(node: yaml.MappingNode) -> Iterator[tuple[str, int, yaml.Node]]:
    seen: dict[str, int] = {}
    for key, child in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise _NotPlainError("a key must be a name", key)
        if key.value in seen:
            raise _NotPlainError(f"{key.value}: it is set already on line {seen[key.value]}; keep one", key)
        seen[key.value] = line
        yield key.value, line, child


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key: _value(child) for key, _, child in _members(node)}
    if isinstance(node, yaml.ScalarNode) and not node.style:
        return plain(node.value)
    return [_value(child) for child in node.value] if isinstance(node, yaml.SequenceNode) else node.value


def _sentence(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "it is not YAML"
    if "\\t" in problem:
        problem = "there is a tab; YAML is indented with spaces"
    return f"{problem}."
