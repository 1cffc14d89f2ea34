"""What there is to set, read from the struct: one field per key, with its names in every layer."""

from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from msgspec import NODEFAULT
from msgspec.structs import FieldInfo, fields

from .settings import Settings

PREFIX = "MLX_SIDECAR_"


class Field(NamedTuple):
    """One setting.

    `type` is what msgspec checks, `kind` the same without bounds and null, `bounds` the least and the most of
    a number. `default` is None where the machine decides.
    """

    key: str
    type: Any
    kind: Any
    bounds: tuple[int, int] | None
    default: Any
    description: str
    live: bool

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return PREFIX + self.key.upper()

    @property
    def flag(self) -> str:
        """Its flag on the command line; of a boolean, the one for true."""
        return f"--{self.key.replace('_', '-')}"

    @property
    def negated_flag(self) -> str:
        """The flag for false, of a boolean."""
        return f"--no-{self.key.replace('_', '-')}"

    def names(self, origin: str) -> bool:
        """Whether it is what a variable or flag says, which go before any file."""
        return origin in (self.variable, self.flag, self.negated_flag)

    @property
    def is_text(self) -> bool:
        """Whether any text is meant as it stands, also one that looks like a number."""
        return self.kind is Path or get_origin(self.kind) is Literal

    @property
    def written(self) -> str:
        """Its default as it stands in a file."""
        import json

        return self.default if isinstance(self.default, str) else json.dumps(self.default)

    @property
    def expects(self) -> str:
        """What its values are, in words."""
        if get_origin(self.kind) is Literal:
            words = f"one of {', '.join(get_args(self.kind))}"
        elif self.bounds is not None:
            words = f"a whole number from {self.bounds[0]} to {self.bounds[1]}"
        else:
            words = {bool: "true or false", Path: "a path"}.get(self.kind, "a list of models")
        return words + (" or null" if self.default is None else "")


def _field(info: FieldInfo) -> Field:
    kind, notes = _bare(info.type)
    default: Any = None if info.default is NODEFAULT else info.default
    if callable(info.default_factory):
        default = info.default_factory()
    about = notes.pop()
    if NoneType in get_args(kind):
        kind, notes = _bare(get_args(kind)[0])
    bounds = next(((note.ge, note.le) for note in notes if note.ge is not None), None)
    live: bool = about.extra["live"]
    return Field(info.name, info.type, kind, bounds, default, about.description, live)


def _bare(kind: Any) -> tuple[Any, list[Any]]:
    """Return a type without its annotations, and those."""
    if get_origin(kind) is Annotated:
        return kind.__origin__, list(kind.__metadata__)
    return kind, []


FIELDS = {info.name: _field(info) for info in fields(Settings)}
"""Every setting by its key, in the order of the file."""
