"""From 1 to 256 streams on a GPU: throughput and memory, with a chart."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.bench import GpuBench
from benchmarks.plot import Chart, write_charts
from benchmarks.sides.bench import OURS
from benchmarks.sides.measures import Figures, sums
from benchmarks.sides.side import HERE

RUNNING, WAITING = 32, 224


def measure_growth(bench: GpuBench, folder: Path | None) -> Figures:
    """Return throughput and memory of ours for each number of streams, and what a waiting stream costs.

    The chart goes to `folder`. MLX's peak never falls, so it is that of this number of streams and fewer.
    """
    figures, side = Figures(), bench.side(OURS)
    for count in bench.sizes.growth:
        for number in range(3):
            prompts = bench.prompts.some(count, bench.sizes.prompt)
            answers = side.ask([prompt.asking_for(bench.sizes.growth_new) for prompt in prompts])
            if not number:
                continue
            for name, value in sums(answers).items():
                figures.add(f"{count} streams: {name}", value)
        memory = side.stats()["memory"]
        figures.add(f"{count} streams: MLX peak MiB", memory["mlxPeakBytes"] / 2**20)
        figures.add(f"{count} streams: resident MiB", memory["residentBytes"] / 2**20)
    figures.add("KiB for each waiting stream", _waiting(bench))
    if folder is not None:
        _draw(figures, bench.sizes.growth, folder / "gpu_engine_growth.svg")
    return figures


def _waiting(bench: GpuBench) -> float:
    numbers = [str(RUNNING), str(WAITING)]
    command = [sys.executable, str(HERE / "waiting.py"), str(bench.make_model("tiny")), "auto", *numbers]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=120)
    return json.loads(done.stdout)["kibPerStream"]


def _draw(figures: Figures, counts: tuple[int, ...], path: Path) -> None:
    def medians(name: str) -> list[float]:
        return [statistics.median(figures[f"{count} streams: {name}"]) for count in counts]

    rates = {"prompts included": medians("total tokens/s")}
    memory = {"MLX's peak": medians("MLX peak MiB"), "resident": medians("resident MiB")}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_charts(
        path,
        [
            Chart("tokens/s", "streams at once", counts, rates),
            Chart("memory, MiB", "streams at once", counts, memory),
        ],
    )
