"""What scheduling needs to know of a sequence, and no more."""

from collections.abc import Sized
from typing import Protocol, TypeVar

from .priority import Priority


class Item(Protocol):
    """Something that waits and then runs, told apart by identity; `engine.sequence.Sequence` is one."""

    @property
    def model(self) -> str:
        """The model that it is for."""
        ...

    @property
    def owner(self) -> int:
        """The connection that it came from."""
        ...

    @property
    def priority(self) -> Priority:
        """How urgent it is."""
        ...

    @property
    def prompt(self) -> Sized:
        """The tokens to prefill."""
        ...

    @property
    def max_tokens(self) -> int:
        """How many tokens it may produce."""
        ...

    @property
    def submitted_at(self) -> float:
        """When it was asked for, in `time.monotonic()` seconds."""
        ...


ItemT = TypeVar("ItemT", bound=Item)
