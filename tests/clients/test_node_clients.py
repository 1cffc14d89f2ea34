"""Clients from npm, each driven by a file of Node's own test runner in `node/`."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from support.wire import Json

NODE = Path(__file__).parent / "node"
PATIENCE_SECONDS = 110


@pytest.mark.parametrize("file", sorted(NODE.glob("*.test.mjs")), ids=lambda file: file.name)
def test_a_client_from_npm_drives_the_sidecar(file: Path, case: Json, command: str, tmp_path: Path) -> None:
    assert (NODE / "node_modules").is_dir(), f"run: npm ci --prefix {NODE}"
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            ["node", "--test-reporter=spec", file],
            env=os.environ | {"SIDECAR_CASE": json.dumps(case | {"command": command})},
            stdout=output,
            stderr=output,
            # Whatever it started ends with it, however it ends.
            start_new_session=True,
        ) as node,
    ):
        try:
            with suppress(subprocess.TimeoutExpired):
                node.wait(PATIENCE_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
    assert node.returncode == 0, log.read_text()
    # The sidecar's own log is in there too; no client that behaves makes it stumble.
    assert "Traceback" not in log.read_text(), log.read_text()
