"""What can be said of the process at any moment, from any thread, event loop or not."""

import time

from mlx_sidecar.protocol.messages import EngineState


class Vitals:
    """Written by the inference thread, read by everybody; each member is one word, so no lock is needed."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()
        self.state: EngineState = "starting"
        self.last_step_at: float | None = None

    def uptime_ms(self) -> float:
        """Return milliseconds since the process began to serve."""
        return (time.monotonic() - self._started_at) * 1000

    def last_step_age_ms(self) -> float | None:
        """Return milliseconds since the last finished step while there is work; None when idle."""
        last = self.last_step_at
        return None if last is None else (time.monotonic() - last) * 1000
