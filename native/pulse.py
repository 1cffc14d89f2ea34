"""`ping` without the interpreter's lock.

Some libraries keep the lock for hundreds of milliseconds, and no Python thread runs meanwhile. A native
thread reads each connection ahead of Python's, and answers plain pings itself. Without the native module
Python reads and answers everything.
"""

import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ._core import Pulse

try:
    from . import _core
except ImportError:
    _core = None

SWITCH = "MLX_SIDECAR_PULSE"
"""Environment variable; `off` leaves every ping to Python, for comparisons."""


class PulseReport(NamedTuple):
    """`answered` counts pings; `overtook` those of them that did not wait for what was said before them."""

    active: bool
    reason: str | None
    answered: int = 0
    overtook: int = 0


class Pulses:
    """Makes the pulse of each connection, and tells them all how the process is.

    `started_at` and the times of steps are those of `time.monotonic`.
    """

    def __init__(self, started_at: float) -> None:
        self._reason = _obstacle()
        self._vitals = _core.Vitals(started_at) if _core is not None and self._reason is None else None

    def over(self, read: int, write: int, framing: str = "") -> "Pulse | None":
        """Return the pulse of a connection, to be started once; None if there is none.

        `framing` is `ndjson`, `lsp`, or empty if the first byte is to tell.
        """
        if _core is None or self._vitals is None:
            return None
        return _core.Pulse(self._vitals, read, write, framing)

    def note_state(self, state: str) -> None:
        """Say what the engine's state is: a word that needs no escapes."""
        if self._vitals is not None:
            self._vitals.note_state(state)

    def note_step(self, at: float | None) -> None:
        """Say when the engine has made progress; None while it is idle."""
        if self._vitals is not None:
            self._vitals.note_step(at)

    def report(self) -> PulseReport:
        """Return what is true now."""
        if self._vitals is None:
            return PulseReport(active=False, reason=self._reason)
        return PulseReport(True, None, self._vitals.answered, self._vitals.overtook)


class IdsInFlight(set[int | str]):
    """A set of ids of which a pulse is told."""

    def __init__(self, pulse: "Pulse") -> None:
        super().__init__()
        self._pulse = pulse

    def add(self, element: int | str) -> None:
        """Add an id."""
        super().add(element)
        self._pulse.add(_json(element))

    def discard(self, element: object) -> None:
        """Remove an id."""
        super().discard(element)
        self._pulse.discard(_json(element))


def _json(request_id: object) -> bytes:
    # Exact for every id that a plain ping can have; the others need only differ from those.
    text = f'"{request_id}"' if isinstance(request_id, str) else str(request_id)
    return text.encode(errors="surrogatepass")


def _obstacle() -> str | None:
    if os.environ.get(SWITCH) == "off":
        return f"switched off by {SWITCH}=off"
    return "the native module was not built" if _core is None else None
