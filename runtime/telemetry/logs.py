"""The log: lines on stderr, for people or for programs."""

import json
import logging
import sys
from datetime import UTC, datetime

from mlx_sidecar.config.settings import LogFormat, LogLevel


def start_log(level: LogLevel, layout: LogFormat) -> None:
    """Send every record of at least `level` to stderr, one line each if `layout` is "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if layout == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(handlers=[handler], level=level.upper())


_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


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
