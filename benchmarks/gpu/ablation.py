"""What each change of the decode step bought on a GPU: `python -m benchmarks.gpu.ablation [--tiny]`.

Milliseconds a step, in process, 256 tokens deep, greedy, the next step begun before the tokens of the last
one are read. In each round every variant takes its turn. Writes `results/gpu_ablation.json`; `--tiny`
rehearses on a CPU, without the variants that need the kernel, and writes nothing.
"""

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.random_llama import SHAPES
from benchmarks.gpu.report import Report
from benchmarks.report import RESULTS
from benchmarks.sides.measures import Figures
from mlx_sidecar.native.blas import Blas
from mlx_sidecar.runtime.engine.mlx_start import start_mlx

if TYPE_CHECKING:
    from benchmarks.gpu.decode_steps import Step, Variant

ROWS, STEPS = (1, 8, 32), 48


def main() -> None:
    """Measure every variant with every number of rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, which also runs on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    arguments = parser.parse_args()
    on_cuda = start_mlx(Blas()).kind == "cuda"
    if not (on_cuda or arguments.tiny):
        parser.error("without a GPU only --tiny makes sense")
    name = "tiny" if arguments.tiny else "3b"
    report = Report(
        "python -m benchmarks.gpu.ablation",
        {"name": name} | SHAPES[name]._asdict(),
        None if arguments.tiny else RESULTS,
        "gpu_ablation",
    )
    import mlx.core as mx

    from benchmarks.gpu.decode_steps import VARIANTS, make_llama

    variants = [variant for variant in VARIANTS if on_cuda or not variant.needs_cuda]
    dtype = mx.bfloat16 if on_cuda else mx.float32
    models = {fused: make_llama(SHAPES[name], dtype, fused) for fused in (False, True)}
    for rows in ROWS:
        report.add(f"ms a step, {rows} rows", measure(variants, models, rows, arguments.rounds))


def measure(variants: "list[Variant]", models: dict[bool, Any], rows: int, rounds: int) -> Figures:
    """Return what a step takes, in ms, of each variant; its first round is thrown away."""
    import mlx.core as mx

    taken: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(rounds + 1):
        for variant in variants[:: 1 if number % 2 else -1]:
            step = variant.begin(models[variant.fused], rows, variant.ragged and rows > 1)
            taken[variant.name].append(pace(step, rows))
            del step
            mx.clear_cache()
    return Figures({name: values[1:] for name, values in taken.items()})


def pace(step: "Step", rows: int) -> float:
    """Return the median of what steps take, in ms."""
    import mlx.core as mx

    times: list[float] = []
    given = step(mx.zeros(rows, mx.int32))
    mx.async_eval(given)
    for _ in range(STEPS):
        began = time.perf_counter()
        following = step(given[0])
        mx.async_eval(following)
        given[0].tolist()
        given = following
        times.append((time.perf_counter() - began) * 1000)
    mx.eval(given)
    # The first ones grow the caches and compile.
    return statistics.median(times[STEPS // 4 :])


if __name__ == "__main__":
    main()
