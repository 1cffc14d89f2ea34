"""What a host sees when the device fails or stands still: an error for every request, and an exit code."""

import sys
from pathlib import Path

import pytest
from support.faulty_server import PILL
from support.wire import Wire

SERVER = str(Path(__file__).parents[1] / "support" / "faulty_server.py")


@pytest.mark.parametrize(("how", "options"), [("lose", []), ("hang", ["--stall-ms", "500"])])
def test_an_engine_that_cannot_go_on_fails_every_request_and_ends_with_code_70(
    how: str, options: list[str], roomy: str
) -> None:
    with Wire(*options, command=(sys.executable, SERVER, how)) as wire:
        wire.initialize()
        wire.result("load", model=roomy)
        running = wire.send(
            "generate", model=roomy, prompt="on and on", maxTokens=10**6, partialResultToken=1
        )
        assert wire.read()["method"] == "$/progress"
        last = wire.send("generate", model=roomy, tokens=[1, 2, PILL], maxTokens=5)
        for request in (running, last):
            error = wire.response(request)["error"]
            assert error["data"] == {"kind": "engine_failed", "retryable": True}
        assert wire.wait() == 70
