"""How far a load is, for whoever asked to be told."""

import time
from collections.abc import Callable

from msgspec import UNSET

from mlx_sidecar.protocol import messages as m

Tell = Callable[[m.LoadProgress], None]

_LEAST_SECONDS = 0.05
"""Between two that say the same phase: people and their screens can do no more with them."""


class LoadWatch:
    """What is known of a load that is under way. Lives on the event loop."""

    def __init__(self) -> None:
        self._listeners: dict[int, tuple[Tell, int]] = {}
        self._phase: m.LoadPhase = "queued"
        self._done = self._total = self._tensors = self._total_tensors = 0
        self._began = self._told_at = 0.0

    def listen(self, tell: Tell) -> int:
        """Tell somebody from now on, and at once how it stands; return what `leave` takes."""
        number = max(self._listeners, default=0) + 1
        self._listeners[number] = (tell, 0)
        self._tell()
        return number

    def leave(self, number: int) -> None:
        """Tell somebody no more."""
        self._listeners.pop(number, None)

    def enter(self, phase: m.LoadPhase) -> None:
        """Note that another phase has begun."""
        self._phase, self._began = phase, time.monotonic()
        self._tell()

    def note(self, done_bytes: int, total_bytes: int, tensors: int, total_tensors: int) -> None:
        """Note what is in memory."""
        self._done, self._total = done_bytes, total_bytes
        self._tensors, self._total_tensors = tensors, total_tensors
        if done_bytes == total_bytes or time.monotonic() >= self._told_at + _LEAST_SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        for number, (tell, seq) in list(self._listeners.items()):
            self._listeners[number] = (tell, seq + 1)
            tell(self._progress(seq + 1))

    def _progress(self, seq: int) -> m.LoadProgress:
        progress = m.LoadProgress(
            seq=seq,
            phase=self._phase,
            done_bytes=self._done,
            total_bytes=self._total,
            tensors=self._tensors,
            total_tensors=self._total_tensors,
            remaining_ms=UNSET,
        )
        if self._phase == "weights" and self._done:
            elapsed = time.monotonic() - self._began
            progress.remaining_ms = round(elapsed * (self._total - self._done) / self._done * 1000, 3)
        return progress
