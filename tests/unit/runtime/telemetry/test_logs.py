import io
import json
import logging
import sys
from collections.abc import Callable, Generator
from datetime import datetime, timedelta

import pytest

from mlx_sidecar.config.settings import LogFormat, LogLevel
from mlx_sidecar.runtime.telemetry.logs import start_log

Start = Callable[[LogLevel, LogFormat], io.StringIO]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Generator[Start]:
    """Start a log of one's own in place of pytest's; returns what goes to stderr."""
    root = logging.getLogger()
    before = root.level

    def begin(level: LogLevel, layout: LogFormat) -> io.StringIO:
        root.handlers.clear()
        stderr = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stderr)
        start_log(level, layout)
        return stderr

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
