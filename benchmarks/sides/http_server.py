"""`mlx_lm.server` through streaming HTTP on loopback: one round for every line on stdin.

python http_server.py FOLDER FIRST_REQUEST

It tells text and not ids. A token whose text is held back comes with a later part; how many tokens there were
in all is its own count.
"""

import http.client
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import msgspec
from child import answer_rounds, first_request
from rounds import Answer, Ready, Request, Round

HOST = "127.0.0.1"
START_SECONDS = 120
SERVER = [sys.executable, str(Path(__file__).parent / "mlx_lm_server.py")]


def main() -> None:
    """Start the server, answer the first request, then every line."""
    folder, first = sys.argv[1:]
    port = _free_port()
    command = [*SERVER, "--model", folder, "--host", HOST, "--port", str(port), "--log-level", "ERROR"]
    spawned = time.perf_counter()
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as server,
    ):
        try:
            assert server.stdout is not None
            ready = _ready(server.stdout.readline(), log)
            _wait_until_listening(port)
            if (request := first_request(first)) is not None:
                ready.first_token_ms = _ask(port, request, spawned, lambda _: None).parts[0][0]
            answer_rounds(ready, partial(_ask_all, port))
        finally:
            server.kill()


def _ready(line: bytes, log: BinaryIO) -> Ready:
    if line:
        return msgspec.json.decode(line, type=Ready)
    log.seek(0)
    raise SystemExit(f"mlx_lm.server did not start:\n{log.read().decode(errors='replace')[-2000:]}")


def _ask_all(port: int, asked: Round) -> list[Answer]:
    began = time.perf_counter()
    early = [number for number, request in enumerate(asked.requests) if not request.after_tokens]
    counts = dict.fromkeys(early, 0)
    grown = threading.Condition()

    def count(number: int, tokens: int) -> None:
        if number in counts:
            with grown:
                counts[number] += tokens
                grown.notify_all()

    def ask(number: int) -> Answer:
        request = asked.requests[number]
        with grown:
            grown.wait_for(lambda: min(counts.values()) >= request.after_tokens)
        return _ask(port, request, began, partial(count, number))

    with ThreadPoolExecutor(len(asked.requests)) as threads:
        return list(threads.map(ask, range(len(asked.requests))))


def _ask(port: int, request: Request, began: float, on_tokens: Callable[[int], None]) -> Answer:
    body = {
        "prompt": request.text,
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer, texts, total = Answer((time.perf_counter() - began) * 1000, []), list[str](), 0
    connection = http.client.HTTPConnection(HOST, port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        now = (time.perf_counter() - began) * 1000
        event = json.loads(line[len(b"data: ") :])
        if (usage := event.get("usage")) is not None:
            total = usage["completion_tokens"]
            assert usage["prompt_tokens"] == len(request.tokens), "the server reads another prompt"
        elif text := event["choices"][0]["text"]:
            answer.parts.append((now, 1))
            texts.append(text)
            on_tokens(1)
    connection.close()
    last, _ = answer.parts[-1]
    answer.parts[-1] = (last, 1 + total - answer.tokens)
    answer.text = "".join(texts)
    return answer


def _wait_until_listening(port: int) -> None:
    deadline = time.perf_counter() + START_SECONDS
    while time.perf_counter() < deadline:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
        except OSError:
            time.sleep(0.005)
        else:
            return
    raise SystemExit("mlx_lm.server does not listen")


def _free_port() -> int:
    with socket.socket() as any_socket:
        any_socket.bind((HOST, 0))
        return any_socket.getsockname()[1]


if __name__ == "__main__":
    main()
