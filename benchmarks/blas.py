"""What the BLAS shim buys: a plain float32 product, prefill and decode of the demo model, with and without.

    make bench, or: .venv/bin/python benchmarks/blas.py [ROUNDS]

MLX binds its BLAS once in a process, so every round starts a process for each side, in turn. Linux CPU only.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from report import publish

from mlx_sidecar.config.settings import default_home
from mlx_sidecar.native.blas import SWITCH, THREADS, Blas
from mlx_sidecar.runtime.models.store import ModelStore

MODEL = "smollm2-135m"
PROMPT_TOKENS = 32
NEW_TOKENS = 6
SIDES = {
    "default": {},
    "a thread on every processor": {THREADS: str(os.cpu_count())},
    "MLX's own": {SWITCH: "off"},
}


def measure() -> dict[str, float]:
    """Return the speeds of this process; the caller has set or not set the switch."""
    from mlx_sidecar.runtime.engine.mlx_start import start_mlx

    blas = Blas()
    device = start_mlx(blas)
    import mlx.core as mx

    from mlx_sidecar.runtime.engine.model_batch import ModelBatch
    from mlx_sidecar.runtime.engine.sequence import Sampling, Sequence
    from mlx_sidecar.runtime.models.loader import load_network

    size = 1024
    a, b = mx.random.normal((size, size)), mx.random.normal((size, size))
    mx.eval(a @ b)
    began = time.perf_counter()
    mx.eval(a @ b)
    gflops = 2 * size**3 / (time.perf_counter() - began) / 1e9

    folder = ModelStore(default_home(os.environ)).find(MODEL)
    assert folder is not None, "run: make demo"
    batch = ModelBatch(load_network(folder, "auto", device.kind).module, prefill_chunk_tokens=128)
    sequence = Sequence("", [5] * PROMPT_TOKENS, NEW_TOKENS, Sampling(), frozenset(), lambda _: None)
    batch.add(sequence)
    while len(batch):
        batch.step()
    assert sequence.started_at is not None
    assert sequence.first_token_at is not None
    assert sequence.finished_at is not None
    mx.clear_streams()
    return {
        "1024x1024 product, GFLOP/s": gflops,
        "prefill, tokens/s": PROMPT_TOKENS / (sequence.first_token_at - sequence.started_at),
        "decode, tokens/s": (NEW_TOKENS - 1) / (sequence.finished_at - sequence.first_token_at),
    }


def run_side(environment: dict[str, str]) -> Any:
    """Measure in a fresh process with these variables set."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "--one"],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


@contextmanager
def busy_machine() -> Generator[None]:
    """Keep every processor busy with something else while the block runs."""
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    """Measure every side in turn, first on a quiet machine and then on a busy one."""
    if sys.argv[1:] == ["--one"]:
        print(json.dumps(measure()))
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    figures: dict[str, list[float]] = {}
    for condition, context in (("quiet", nullcontext), ("busy", busy_machine)):
        for _ in range(rounds):
            with context():
                sides = {side: run_side(environment) for side, environment in SIDES.items()}
            for name in sides["default"]:
                for side, speeds in sides.items():
                    figures.setdefault(f"{condition}: {name}, {side}", []).append(speeds[name])
                ratio = sides["default"][name] / sides["MLX's own"][name]
                figures.setdefault(f"{condition}: {name}, default / MLX's own", []).append(ratio)
    publish("blas", "benchmarks/blas.py", "speeds and ratios", figures)


if __name__ == "__main__":
    main()
