import json
import logging
import os
from collections.abc import Callable, Generator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from mlx_sidecar.config.settings import LogFormat, LogLevel
from mlx_sidecar.runtime.telemetry.logs import finish_log, start_log


class Log:
    """What was logged so far."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def getvalue(self) -> str:
        finish_log()
        return self._path.read_text()


Start = Callable[[LogLevel, LogFormat], Log]


@pytest.fixture
def start(tmp_path: Path) -> Generator[Start]:
    """Start a log of one's own in place of pytest's; returns what is written."""
    root = logging.getLogger()
    before = root.level

    def begin(level: LogLevel, layout: LogFormat) -> Log:
        root.handlers.clear()
        path = tmp_path / "log"
        start_log(level, layout, os.open(path, os.O_WRONLY | os.O_CREAT))
        return Log(path)

    yield begin
    root.handlers.clear()
    root.setLevel(before)


def test_text_is_a_line_with_level_and_logger(start: Start) -> None:
    log = start("info", "text")
    logging.getLogger("engine").warning("it is %s", "hot")
    assert log.getvalue().endswith(" WARNING engine: it is hot\n")


@pytest.mark.parametrize("layout", ["text", "json"])
def test_what_is_less_severe_is_left_out(start: Start, layout: LogFormat) -> None:
    log = start("warning", layout)
    logging.getLogger("engine").info("quiet")
    logging.getLogger("engine").error("loud")
    assert len(log.getvalue().splitlines()) == 1


def test_json_is_an_object_a_line_whatever_the_message_holds(start: Start) -> None:
    log = start("debug", "json")
    message = 'quotes " newline \n separator \u2028 nul \x00 not-utf-8 \udcff'
    logging.getLogger("models").debug("%s", message)
    logging.getLogger("models").info("next")
    first, second = (json.loads(line) for line in log.getvalue().split("\n")[:-1])
    assert first["message"].startswith('quotes " newline \n separator \u2028 nul \x00 not-utf-8 ')
    assert (first["level"], first["logger"]) == ("debug", "models")
    assert second["message"] == "next"
    assert datetime.fromisoformat(first["time"]).utcoffset() == timedelta(0)


def test_an_exception_stays_on_its_line(start: Start) -> None:
    log = start("info", "json")
    try:
        raise ValueError("what went wrong")
    except ValueError:
        logging.getLogger("engine").exception("a step failed")
    (line,) = log.getvalue().splitlines()
    entry = json.loads(line)
    assert entry["message"] == "a step failed"
    assert "ValueError: what went wrong" in entry["error"]
