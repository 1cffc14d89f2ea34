"""How a pull looks: a bar on a terminal, lines elsewhere, or JSON for programs."""

import json
import sys
import threading
import time
from typing import Any

from mlx_sidecar.protocol.messages import PullPhase

_LINES_PER_PHASE = 10
_SECONDS_BETWEEN_JSON = 0.1


class Lines:
    """Lines on stderr: what happens, and every tenth of what takes longer."""

    def __init__(self) -> None:
        self._said: tuple[str, int] = ("", 0)

    def say(self, line: str) -> None:
        """Print a line."""
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def progress(self, phase: PullPhase, done_bytes: int, total_bytes: int) -> None:
        """Print a line each time that another tenth has been fetched."""
        tenth = _LINES_PER_PHASE * done_bytes // total_bytes if total_bytes else 0
        if phase == "fetching" and (phase, tenth) > self._said:
            self._said = (phase, tenth)
            self.say(f"fetched {size(done_bytes)} of {size(total_bytes)}")

    def close(self) -> None:
        """Do nothing more."""


class Bar(Lines):
    """A bar on a terminal that knows how long it will still take."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as SpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), SpeedColumn())
        self._bars = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self._tasks: dict[str, Any] = {}
        self._bars.start()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bars.console.print(line, markup=False, highlight=False)

    def progress(self, phase: PullPhase, done_bytes: int, total_bytes: int) -> None:
        """Move the bar of a phase."""
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total_bytes)
        self._bars.update(self._tasks[phase], completed=done_bytes, total=total_bytes)

    def close(self) -> None:
        """Leave the bars as they are now."""
        self._bars.stop()


class JsonLines(Lines):
    """Progress on stdout, one object a line, in the members of `PullProgress`; lines for people on stderr."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._phase = ""
        self._began = self._spoke = 0.0
        self._first = self._last = 0

    def progress(self, phase: PullPhase, done_bytes: int, total_bytes: int) -> None:
        """Print how far a phase is, but not too often, and never less far than before."""
        with self._lock:
            now = time.monotonic()
            if phase != self._phase:
                self._phase, self._began, self._first, self._last = phase, now, done_bytes, -1
                self._spoke = 0.0
            ended = done_bytes == total_bytes
            if done_bytes <= self._last or (now - self._spoke < _SECONDS_BETWEEN_JSON and not ended):
                return
            self._spoke, self._last = now, done_bytes
            said: dict[str, Any] = {"phase": phase, "doneBytes": done_bytes, "totalBytes": total_bytes}
            if (gained := done_bytes - self._first) > 0:
                said["remainingMs"] = round(
                    1000 * (now - self._began) * (total_bytes - done_bytes) / gained, 1
                )
            print_json({"progress": said})


def report_for(*, as_json: bool) -> Lines:
    """Return what suits whoever is looking."""
    if as_json:
        return JsonLines()
    return Bar() if sys.stderr.isatty() else Lines()


def print_json(value: object) -> None:
    """Print an object as a line of its own."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:  # noqa: PLR2004 - a thousand, as disks are sold
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
