"""Spawn -> `initialize` answered, and spawn -> first token of the demo model, split into phases.

    make bench, or: .venv/bin/python benchmarks/startup.py [ROUNDS]

A plain pipe and no client library: what is measured is the sidecar.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from report import publish

COMMAND = [str(Path(sys.executable).parent / "mlx-sidecar"), "serve", "--log-level", "error"]
MODEL = "smollm2-135m"
# As on a user's machine: with this variable Python compiles our modules anew at every start.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
# What any server on these libraries pays before its first line: times drift with the machine, ratios do not.
FLOOR = "import asyncio, anyio, anyio._backends._asyncio, msgspec, uvloop"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def measure_round() -> dict[str, float]:
    """Start a sidecar, ask it one question, and return milliseconds by phase."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", FLOOR], env=ENVIRONMENT, check=True)
    floor = time.perf_counter() - began
    began = time.perf_counter()
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        initialized = _exchange(process, 1, "initialize", {"protocolVersion": 1})[0]
        loaded, load = _exchange(process, 2, "load", {"model": MODEL})
        params = {"model": MODEL, "messages": QUESTION, "maxTokens": 2, "partialResultToken": "t"}
        first_token, _ = _exchange(process, 3, "generate", params)
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    return {
        "floor: Python with its libraries": floor * 1000,
        "initialize / floor, ratio": (initialized - began) / floor,
        "spawn -> initialize answered": (initialized - began) * 1000,
        "MLX starts": load["phases"]["runtimeMs"],
        "weights": load["phases"]["weightsMs"],
        "warm-up": load["phases"]["warmupMs"],
        "initialize -> load answered": (loaded - initialized) * 1000,
        "load answered -> first token": (first_token - loaded) * 1000,
        "spawn -> first token": (first_token - began) * 1000,
    }


def _exchange(
    process: "subprocess.Popen[bytes]", request_id: int, method: str, params: dict[str, Any]
) -> tuple[float, Any]:
    """Send a request; return when its first frame came back, and the result (None for a notification)."""
    assert process.stdin is not None
    assert process.stdout is not None
    request = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    frame = process.stdout.readline()
    return time.perf_counter(), json.loads(frame).get("result")


def main() -> None:
    """Measure, after one round that warms the page cache."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    measure_round()
    measured = [measure_round() for _ in range(rounds)]
    figures = {name: [one[name] for one in measured] for name in measured[0]}
    publish("startup", "benchmarks/startup.py", "ms", figures)


if __name__ == "__main__":
    main()
