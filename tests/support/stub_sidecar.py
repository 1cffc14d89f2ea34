"""A sidecar without a model, for what a client does when things take for ever or go wrong.

A generation gives one part and goes on until it is cancelled. So does a load, but not of the model `small`.
What else happens stands in a generation's prompt:

noisy       lines that are no messages, on stdout
talkative   a megabyte on stderr, before the part
leaving     after the part a child that keeps our stdout and stderr open until stdin ends, and SIGKILL

As an argument, `deaf` says nothing, reads nothing and ignores SIGTERM.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, __file__)
WELCOME = Path(__file__).parents[1] / "clients" / "welcome.json"

FAR = ("seq", "doneBytes", "totalBytes", "tensors", "totalTensors")

Json = dict[str, Any]
LOADED: Json = {
    "model": "small",
    "state": "ready",
    "dtype": "float32",
    "parameters": 1,
    "contextLength": 1,
    "vocabulary": 1,
    "bytes": 1,
    "loadMs": 1,
    "phases": {"runtimeMs": 1, "weightsMs": 1, "warmupMs": 1},
}


def main() -> None:
    """Serve stdin."""
    cancels: dict[int, Callable[[int], None]] = {}
    for line in sys.stdin:
        request: Json = json.loads(line)
        match request:
            case {"method": "initialize", "id": request_id}:
                answer(request_id, json.loads(WELCOME.read_text()))
            case {"method": "ping", "id": request_id}:
                state = {"state": "ready", "uptimeMs": 0, "inFlight": len(cancels), "lastStepAgeMs": None}
                answer(request_id, state)
            case {"method": "generate", "id": request_id, "params": params}:
                cancels[request_id] = cancel_generation
                generate(params)
            case {"method": "load", "id": request_id, "params": params}:
                progress(params, {"phase": "weights"} | dict.fromkeys(FAR, 1))
                if params["model"] == "small":
                    answer(request_id, LOADED)
                else:
                    cancels[request_id] = cancel_load
            case {"method": "$/cancelRequest", "params": {"id": request_id}}:
                cancels.pop(request_id)(request_id)
            case {"method": "shutdown", "id": request_id}:
                for cancelled, cancel in cancels.items():
                    cancel(cancelled)
                answer(request_id, None)
            case _:
                return


def generate(params: Json) -> None:
    """Give the one part, and what the prompt asks for."""
    if params["prompt"] == "noisy":
        sys.stdout.write('Loading 100%\n{"id": 2}\n{"jsonrpc": "2.0", "method": "$/progress"}\n')
        sys.stdout.write("[" * 5000 + "\n")
    if params["prompt"] == "talkative":
        sys.stderr.write("x" * 1024 * 1024)
        sys.stderr.flush()
    progress(params, {"seq": 1, "text": "Once", "tokens": [1]})
    if params["prompt"] == "leaving":
        subprocess.Popen(["cat"])
        signal.raise_signal(signal.SIGKILL)


def cancel_load(request_id: int) -> None:
    """End a load."""
    data = {"kind": "cancelled", "retryable": False}
    write({"id": request_id, "error": {"code": -32800, "message": "Cancelled, as asked.", "data": data}})


def cancel_generation(request_id: int) -> None:
    """End a generation."""
    timings = dict.fromkeys(("queueMs", "prefillMs", "ttftMs", "decodeMs", "tokensPerSecond"), 0)
    usage = {"promptTokens": 1, "completionTokens": 1}
    answer(request_id, {"finishReason": "cancelled", "usage": usage, "timings": timings, "lastSeq": 1})


def progress(params: Json, value: Json) -> None:
    """Send a part of what comes in parts."""
    write({"method": "$/progress", "params": {"token": params["partialResultToken"], "value": value}})


def answer(request_id: int, result: object) -> None:
    """Send a response."""
    write({"id": request_id, "result": result})


def write(message: Json) -> None:
    """Send a message."""
    sys.stdout.write(json.dumps({"jsonrpc": "2.0"} | message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:] == ["deaf"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            signal.pause()
    main()
