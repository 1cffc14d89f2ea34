"""Nothing but frames reaches the host, whoever prints inside the server's process."""

import itertools
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import END, make_tokenizer
from support.wire import Wire

NO_END = {str(make_tokenizer().token_to_id(END)): -1000}
FINITE: dict[str, Any] = {"tokens": [1], "maxTokens": 50, "logitBias": NO_END}

# Until the server has claimed its stdout, the first thing that it does, any print would be in the wire. The
# import of MLX waits for a round of noise; what comes after is repeated until there has been some.
SITECUSTOMIZE = """
import ctypes, itertools, os, subprocess, sys, threading, time

libc = ctypes.CDLL(None)
numbers = itertools.count(1)
turn = threading.RLock()

def puts(line):
    libc.puts(line.encode())
    libc.fflush(None)

def system(line):
    # The shell cannot be started while another thread sets a variable of the environment.
    while os.system(f"echo {line}"):
        pass

WAYS = {
    "print": lambda line: print(line, flush=True),
    "write": lambda line: os.write(1, line.encode() + b"\\n"),
    "system": system,
    "puts": puts,
    "child": lambda line: subprocess.run(["echo", line], check=True),
}

def make_noise(phase):
    with turn:
        number = next(numbers)
        for way, say in WAYS.items():
            say(f"noise {way} {number} {phase}")

def go_on():
    while not os.path.sameopenfile(1, 2):
        time.sleep(0.001)
    while True:
        make_noise("whenever")
        time.sleep(0.005)

def watch(event, arguments):
    if event == "import" and arguments[0] == "mlx.core":
        make_noise("import")

sys.addaudithook(watch)
threading.Thread(target=go_on, daemon=True).start()
"""
WAYS = {"print", "write", "system", "puts", "child"}
# Whoever else writes to stderr may come between a text and its line end.
NOISE = re.compile(r"noise (\w+) (\d+) (import|whenever)")


def noise(wire: Wire, phase: str = "") -> dict[str, list[int]]:
    """Return the numbers of the rounds that have come to stderr, by the way they were printed."""
    found: dict[str, list[int]] = {way: [] for way in WAYS}
    for way, number, when in NOISE.findall(wire.stderr.decode(errors="replace")):
        if phase in ("", when):
            found[way].append(int(number))
    return found


def rounds(wire: Wire, phase: str = "") -> int:
    """Return how many rounds have been made in every way."""
    return min(map(len, noise(wire, phase).values()))


@pytest.fixture
def noisy(tmp_path: Path) -> dict[str, str]:
    """An environment in which the server prints all the time, in every way that there is."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {"PYTHONPATH": str(tmp_path)}


def during(wire: Wire) -> Generator[int]:
    """Count up until a few rounds of noise have been made since the first."""
    before, count = rounds(wire), itertools.count()
    while rounds(wire) < before + 3:
        yield next(count)


def test_whatever_is_printed_during_import_load_and_generation_goes_to_stderr(
    noisy: dict[str, str], tiny_server: Wire, model: str
) -> None:
    expected = tiny_server.result("generate", model=model, **FINITE)
    with Wire(env=noisy) as wire:
        wire.initialize()
        wire.result("load", model=model)
        for _ in during(wire):
            wire.result("unload", model=model)
            assert wire.result("load", model=model)["state"] == "ready"
        for n in during(wire):
            streamed = wire.send("generate", model=model, **FINITE, partialResultToken=n)
            whole = wire.result("generate", model=model, **FINITE)
            assert (whole["text"], whole["tokens"]) == (expected["text"], expected["tokens"])
            assert "error" not in wire.response(streamed)
            assert "".join(piece["text"] for piece in wire.progress(n)) == expected["text"]
        wire.result("shutdown")
        wire.notify("exit")
        # Reading a line checks that it is a frame.
        wire.rest()
        assert wire.wait() == 0
        assert rounds(wire, "import") >= 1
        # Nothing of it is missing; the end may have cut the last round short.
        for numbers in noise(wire).values():
            assert numbers == list(range(1, len(numbers) + 1))
            assert len(numbers) <= rounds(wire) + 1
