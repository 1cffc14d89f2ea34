"""The target that the conformance tests rely on: it lets good frames pass, and it can fail."""

import json
import sys
from typing import Any

import pytest
from support.checked_target import CheckedTarget

from mlx_sidecar.conformance.target import ProcessTarget
from mlx_sidecar.protocol.framing import Framing

PATIENCE_SECONDS = 60.0
PING = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'
PONG: dict[str, Any] = {"state": "ready", "uptimeMs": 1, "inFlight": 0, "lastStepAgeMs": None}
SERVER = "import os, sys; os.read(0, 1000); os.write(1, sys.argv[1].encode()); os.read(0, 1)"


def ask(framing: Framing, result: Any) -> None:
    """Ping a server that answers like this."""
    says = framing.wrap(json.dumps({"jsonrpc": "2.0", "id": 1, "result": result}).encode())
    target = CheckedTarget(ProcessTarget([sys.executable, "-c", SERVER, says.decode()]))
    assert target.offers == {"process"}
    channel = target.open()
    try:
        channel.write(framing.wrap(PING), PATIENCE_SECONDS)
        assert channel.read(PATIENCE_SECONDS) == says
    finally:
        channel.close()


@pytest.mark.parametrize("framing", list(Framing))
def test_what_the_schema_allows_passes_unchanged(framing: Framing) -> None:
    ask(framing, PONG)


@pytest.mark.parametrize("framing", list(Framing))
def test_what_the_schema_forbids_is_found_out(framing: Framing) -> None:
    with pytest.raises(AssertionError, match="'tired' is not one of"):
        ask(framing, PONG | {"state": "tired"})
