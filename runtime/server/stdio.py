"""The process's own stdin and stdout, claimed for the wire.

`claim_stdio` runs before any heavy import. Afterwards descriptor 1 leads to stderr and descriptor 0 to
nothing, so a print, a C library's banner or a child process can neither write into the wire nor read from it.
"""

import fcntl
import os
from typing import NamedTuple

_STANDARD_ERROR = 2
_FIRST_PRIVATE_DESCRIPTOR = 10


class Wire(NamedTuple):
    """Private descriptors of the host's pipes, closed in child processes."""

    read: int
    write: int


def claim_stdio() -> Wire:
    """Move stdin and stdout to private descriptors and divert the standard ones. Call once, first."""
    opened = os.open(os.devnull, os.O_RDWR)  # Perhaps as one of the three, if that was closed.
    nowhere = _duplicate(opened)
    if opened > _STANDARD_ERROR:
        os.close(opened)
    wire = Wire(_private(0, nowhere), _private(1, nowhere))
    os.dup2(nowhere, 0)
    try:
        os.dup2(2, 1)
    except OSError:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    os.close(nowhere)
    return wire


def _private(descriptor: int, nowhere: int) -> int:
    try:
        return _duplicate(descriptor)
    except OSError:  # It was closed when we were started.
        return _duplicate(nowhere)


def _duplicate(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_PRIVATE_DESCRIPTOR)
