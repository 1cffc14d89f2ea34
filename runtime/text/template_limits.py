"""A Jinja sandbox that also ends: what a template may compute, and how long its texts may become, is bounded.

Jinja's own keeps a template from attributes and from `range` without end. It does not keep it from loops in
loops, from doubling a text forty times, or from `'a' * 2500000000`, and nothing can stop a thread.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 500_000
"""Turns of loops, calls and operations in one rendering."""
MAX_SECONDS = 2.0
"""Of one thread's processor time: a busy machine does not make a template a bad one."""
MAX_CHARACTERS = 32 * 1024 * 1024
MAX_PRODUCT = 8 * MAX_CHARACTERS
"""Of the two longest, or largest, things that a filter or method is given."""
MAX_NUMBER = 1_000_000
"""That a filter or method may be given: it could be a width."""
MAX_POWER = 64

_ITEM_CHARACTERS = 32
"""What an item of a list counts for."""
_WIDTH = re.compile(r"[0-9]{4}|\*|\{[^}]*:[^}]*\{")


class TooCostly(TemplateError):
    """The template wants to compute or write more than any prompt needs."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates that raise TooCostly when they go too far. Each thread renders one at a time."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._spent = threading.local()
        self.filters = {name: self._guarded(function) for name, function in self.filters.items()}
        self.filters |= {"_counted": self._counted, "_joined": self._joined, "_sized": _sized}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Give templates another filter."""
        self.filters[name] = self._guarded(function)

    def begin(self) -> None:
        """Count anew, for the template that this thread renders next."""
        self._spent.steps, self._spent.until = 0, time.thread_time() + MAX_SECONDS

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute, if the result cannot be too large."""
        self._step()
        if operator == "**" and abs(right) > MAX_POWER:
            raise TooCostly("a power that is too large")
        if operator == "*":
            _check_size(max(_size(left) * _number(right), _size(right) * _number(left)))
        if operator == "%":
            _check_format(left)
        return _sized(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call, if the arguments are no larger than a template's are."""
        self._step()
        if isinstance(obj, LoopContext) and args:  # A loop that calls itself.
            args = (self._counted(args[0]), *args[1:])
        # The sandbox wraps the methods that format.
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        _check_arguments((owner, *args, *options.values()))
        if getattr(obj, "__name__", "").startswith("format"):
            _check_format(owner)
        return _sized(super().call(context, obj, *args, **options))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in list(template.find_all(nodes.For)):
            loop.iter = self._filter(loop.iter, "_counted")
        for block in list(template.find_all(nodes.AssignBlock)):
            block.filter = self._filter(block.filter, "_sized")
        for parent in [template, *template.find_all(nodes.Node)]:
            self._replace_joins(parent)
        return template

    def _replace_joins(self, parent: nodes.Node) -> None:
        for field, value in parent.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(parent, field, self._join(value))
            elif isinstance(value, list):
                setattr(parent, field, [self._join(item) for item in value])  # pyright: ignore[reportUnknownVariableType]

    def _join(self, node: Any) -> Any:
        if not isinstance(node, nodes.Concat):
            return node
        parts = nodes.List(node.nodes, lineno=node.lineno, environment=self)
        return self._filter(parts, "_joined")

    def _filter(self, node: Any, name: str) -> nodes.Filter:
        lineno = 0 if node is None else node.lineno
        return nodes.Filter(node, name, [], [], None, None, lineno=lineno, environment=self)

    def _step(self) -> None:
        # While a template is compiled nothing is counted: only what is constant is worked out then.
        if (steps := getattr(self._spent, "steps", None)) is None:
            return
        self._spent.steps = steps + 1
        if steps >= MAX_STEPS or time.thread_time() > self._spent.until:
            raise TooCostly("more steps than any prompt needs")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def _joined(self, parts: list[Any]) -> str:
        self._step()
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # Also what tells Jinja to pass a context first.
        def guarded(*args: Any, **options: Any) -> Any:
            self._step()
            _check_arguments((*args, *options.values()))
            if function.__name__ == "do_format":
                _check_format(args[0])
            return _sized(function(*args, **options))

        return guarded


def _check_arguments(values: tuple[Any, ...]) -> None:
    """Refuse large numbers, and what could make a text too long together, as in `replace` and `indent`."""
    if any(_number(value) > MAX_NUMBER for value in values):
        raise TooCostly("a number that is too large")
    first, second = [0, 0, *sorted(max(_size(value), _number(value)) for value in values)][-2:]
    if first * second > MAX_PRODUCT:
        raise TooCostly("a text that could become too long")


def _check_format(layout: object) -> None:
    # A width in it is a number that nobody else sees; a star or a brace within takes one from the arguments.
    if isinstance(layout, str) and _WIDTH.search(layout):
        raise TooCostly("a format that is too wide")


def _number(value: object) -> int:
    return value if isinstance(value, int) else 1


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return _ITEM_CHARACTERS * len(value) if isinstance(value, list | tuple) else 0  # pyright: ignore[reportUnknownArgumentType]


def _sized(value: Any) -> Any:
    _check_size(_size(value))
    return value


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TooCostly("a text that is too long")
