"""Chat templates: the Jinja source in a model folder, rendered in a sandbox that ends.

The environment is the one that Hugging Face templates are written for: `trim_blocks`, `lstrip_blocks`, loop
controls, and the names `raise_exception`, `strftime_now` and `tojson`.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from mlx_sidecar.protocol.errors import InvalidParams, Unsupported
from mlx_sidecar.protocol.messages import Message

if TYPE_CHECKING:
    from jinja2 import Template

_MAX_COMPLAINT = 300
_FAILURES = (
    *(TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError),
)
"""What a template that is wrong, or means harm, may raise besides Jinja's own errors."""


class ChatTemplate:
    """One compiled template with the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Compile `source`.

        Raises:
            ValueError: the source is not a valid template.
        """
        # Here and not above: Jinja costs more to import than the whole answer to `initialize` may take.
        from jinja2 import TemplateError

        try:
            self._template, self._begin = _compile(source)
        except (TemplateError, *_FAILURES) as error:
            raise ValueError("its chat template is not valid") from error
        self._special_tokens = special_tokens

    def render(self, messages: list[Message]) -> str:
        """Return the prompt for `messages`, open for the assistant's turn.

        Raises:
            InvalidParams: the template itself refuses the messages, and says why.
            Unsupported: the template fails on them.
        """
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        self._begin()
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._special_tokens)
        except _Refusal as refusal:
            raise InvalidParams("messages", str(refusal)[:_MAX_COMPLAINT]) from None
        except (TemplateError, *_FAILURES) as error:
            raise Unsupported(
                "The model's chat template cannot render these messages. Send 'prompt' instead."
            ) from error


class _Refusal(Exception):
    """The template called `raise_exception`."""


def _compile(source: str) -> "tuple[Template, Callable[[], None]]":
    """Return the template, and what to call before it is rendered."""
    from .template_limits import BoundedEnvironment

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.add_filter("tojson", _to_json)
    environment.globals["raise_exception"] = _refuse  # pyright: ignore[reportArgumentType]
    environment.globals["strftime_now"] = _now  # pyright: ignore[reportArgumentType]
    return environment.from_string(source), environment.begin


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise _Refusal(message)


def _now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)
