"""What can be said of the process at any moment, from any thread, event loop or not."""

import time

from mlx_sidecar.native.pulse import Pulses
from mlx_sidecar.protocol.messages import EngineState


class Vitals:
    """Written by the inference thread, read by everybody; each member is one word, so no lock is needed.

    Whatever is written here `pulses` is told, which answers where Python cannot.
    """

    def __init__(self) -> None:
        self._started_at = time.monotonic()
        self.pulses = Pulses(self._started_at)
        self.state = "starting"
        self.last_step_at = None

    @property
    def state(self) -> EngineState:
        """The state of the engine."""
        return self._state

    @state.setter
    def state(self, state: EngineState) -> None:
        self._state: EngineState = state
        self.pulses.note_state(state)

    @property
    def last_step_at(self) -> float | None:
        """The monotonic time of the last finished step while there is work, in seconds; None when idle."""
        return self._last_step_at

    @last_step_at.setter
    def last_step_at(self, at: float | None) -> None:
        self._last_step_at = at
        self.pulses.note_step(at)

    def uptime_ms(self) -> float:
        """Return milliseconds since the process began to serve."""
        return (time.monotonic() - self._started_at) * 1000

    def last_step_age_ms(self) -> float | None:
        """Return milliseconds since the last finished step while there is work; None when idle."""
        last = self.last_step_at
        return None if last is None else (time.monotonic() - last) * 1000
