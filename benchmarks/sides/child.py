"""What the Python sides share: the loop over their lines, and the check of their matrix products."""

import sys
import time
from collections.abc import Callable

import msgspec
from rounds import Answer, Ready, Request, Round

from mlx_sidecar.native.blas import Blas

SIZE = 512


def answer_rounds(ready: Ready, ask: Callable[[Round], list[Answer]]) -> None:
    """Say that this side is ready, then answer every line on stdin until it ends."""
    say(ready)
    for line in sys.stdin:
        say(ask(msgspec.json.decode(line, type=Round)))


def say(value: object) -> None:
    """Print one line of JSON."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def first_request(argument: str) -> Request | None:
    """Return the request that a side is started with, if there is one."""
    return msgspec.json.decode(argument, type=Request) if argument else None


def matrix_products(blas: Blas) -> tuple[float, int | None]:
    """Return the rate of float32 products in GFLOP/s, and OpenBLAS's threads if they go through it."""
    import mlx.core as mx

    a, b = mx.random.normal((SIZE, SIZE)), mx.random.normal((SIZE, SIZE))
    blas.confirm(lambda: mx.eval(a @ b))
    mx.eval(a @ b)
    began = time.perf_counter()
    mx.eval(a @ b)
    rate = 2 * SIZE**3 / (time.perf_counter() - began) / 1e9
    report = blas.report()
    return rate, report.threads if report.active else None
