"""The log: lines on stderr, for people or for programs."""

import json
import logging
import os
import queue
import threading
from contextlib import suppress
from datetime import UTC, datetime

from mlx_sidecar.config.settings import LogFormat, LogLevel

_STDERR = 2
_LINES_AHEAD = 1000
_FLUSH_SECONDS = 0.2
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def start_log(level: LogLevel, layout: LogFormat, descriptor: int = _STDERR) -> None:
    """Send every record of at least `level` to stderr, one line each if `layout` is "json"."""
    logging.basicConfig(handlers=[_Unhurried(descriptor)])
    adjust_log(level, layout)


def adjust_log(level: LogLevel, layout: LogFormat) -> None:
    """Change what is logged from now on, and how."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    for handler in root.handlers:
        handler.setFormatter(_JsonLines() if layout == "json" else logging.Formatter(_TEXT))


def finish_log() -> None:
    """Let what has been logged be written, if anybody reads it."""
    for handler in logging.getLogger().handlers:
        handler.flush()


class _Unhurried(logging.Handler):
    """Writes on a thread of its own, so that nobody waits for whoever reads it; says how much was dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._dropped = 0
        self._lines: queue.Queue[bytes] = queue.Queue(_LINES_AHEAD)
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self._line(record))
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, _FLUSH_SECONDS)

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def _write_all(self) -> None:
        while line := self._lines.get():
            dropped, self._dropped = self._dropped, 0
            if dropped:
                text = f"{dropped} lines were dropped: nobody reads the log fast enough"
                line += self._line(logging.LogRecord("log", logging.WARNING, "", 0, text, None, None))
            with suppress(OSError):
                while line:
                    line = line[os.write(self._descriptor, line) :]
            self._lines.task_done()


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)
