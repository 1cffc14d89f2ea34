"""From 1 to 256 streams: throughput and memory, with a chart, and what a stream costs that waits."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.engine_bench import CpuBench
from benchmarks.gpu.random_llama import SHAPES, make_random_llama
from benchmarks.plot import Chart, write_charts
from benchmarks.report import RESULTS
from benchmarks.sides.bench import BATCH, OURS
from benchmarks.sides.measures import Figures, sums
from benchmarks.sides.side import HERE

STREAMS = (1, 4, 16, 64, 256)
PROMPT_TOKENS, NEW_TOKENS = 8, 8
RUNNING, WAITING = 32, 224


def measure_growth(bench: CpuBench) -> Figures:
    """Return throughput of both sides and memory of ours for each number of streams."""
    sides = (OURS, BATCH)
    bench.warm(sides, 4, PROMPT_TOKENS)
    figures = Figures()
    for number in bench.rounds():
        for streams in STREAMS:
            prompts = bench.prompts.some(streams, PROMPT_TOKENS)
            bench.side(OURS).forget_peak_memory()
            answers = bench.ask_alike(number, sides, [prompt.asking_for(NEW_TOKENS) for prompt in prompts])
            if answers is None:
                continue
            for side in sides:
                figures.add(
                    f"{streams} streams, {side}: total tokens/s", sums(answers[side])["total tokens/s"]
                )
            figures.add(f"{streams} streams, {OURS}: peak MiB", bench.side(OURS).peak_memory_mib())
    for value in measure_waiting():
        figures.add("KiB for each waiting stream", value)
    _draw(figures)
    return figures


def measure_waiting(rounds: int = 3) -> list[float]:
    """Return the KiB that a waiting stream costs, from fresh servers with a tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        make_random_llama(Path(folder), SHAPES["tiny"])
        command = [sys.executable, str(HERE / "waiting.py"), folder, "auto", str(RUNNING), str(WAITING)]
        lines = [subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout for _ in range(rounds)]
    return [json.loads(line)["kibPerStream"] for line in lines]


def _draw(figures: Figures) -> None:
    def medians(name: str) -> list[float]:
        return [statistics.median(figures.get(f"{streams} streams, {name}", [0.0])) for streams in STREAMS]

    throughput = {side: medians(f"{side}: total tokens/s") for side in (OURS, BATCH)}
    charts = [
        Chart("tokens/s", "streams at once", STREAMS, throughput),
        Chart(
            "peak memory of the server, MiB", "streams at once", STREAMS, {OURS: medians(f"{OURS}: peak MiB")}
        ),
    ]
    RESULTS.mkdir(exist_ok=True)
    write_charts(RESULTS / "engine_growth.svg", charts)
