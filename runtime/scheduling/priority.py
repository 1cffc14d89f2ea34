"""How urgent a request is."""

from enum import IntEnum


class Priority(IntEnum):
    """Lower goes first."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3
