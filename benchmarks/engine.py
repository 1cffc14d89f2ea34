"""Many streams through the sidecar, against `BatchGenerator` in process and against `mlx_lm.server`.

    .venv/bin/python benchmarks/engine.py [--only PART ...] [--rounds N] [--limit SECONDS]

The demo model in float32; every side makes its matrix products with the same OpenBLAS and as many threads.
The sidecar is asked through its Node client over stdio, `mlx_lm.server` through streaming HTTP. In each round
all sides get the same new prompts, in turn, and must say the same: a round in which they do not is not
counted. A part begins no round that would likely end later than its limit; all parts together take about a
quarter of an hour, and five rounds of the largest need `--limit 600`. Linux CPU only.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine_bench import CpuBench, Refusal, check_requirements, make_folder
from benchmarks.engine_growth import measure_growth
from benchmarks.report import publish
from benchmarks.sides.bench import BATCH, OURS, SERVER
from benchmarks.sides.measures import Figures, gaps, sums
from benchmarks.sides.rounds import Answer
from benchmarks.sides.side import SideError, mlx_lm_server, sidecar

PROMPT_TOKENS, NEW_TOKENS = 128, 64
SHORT_PROMPT_TOKENS, LONG_PROMPT_TOKENS = 64, 512
# A running stream long enough to be still running when the other one's prompt has been read.
RUNNING_TOKENS = 40


def measure_streams(bench: CpuBench, streams: int) -> Figures:
    """Return what so many streams at once reach, prompts included."""
    sides = (OURS, BATCH, SERVER)
    bench.warm(sides, streams, PROMPT_TOKENS)
    figures = Figures()
    for number in bench.rounds():
        prompts = bench.prompts.some(streams, PROMPT_TOKENS)
        before = {side: bench.side(side).processor_seconds() for side in sides}
        answers = bench.ask_alike(number, sides, [prompt.asking_for(NEW_TOKENS) for prompt in prompts])
        if answers is None:
            continue
        work = {side: bench.side(side).processor_seconds() - before[side] for side in sides}
        reached = {side: sums(one) for side, one in answers.items()}
        for side in sides:
            for name in ("total tokens/s", "first token p50 ms", "gap p50 ms", "gap p99 ms"):
                figures.add(f"{side}: {name}", reached[side][name])
        for side in (BATCH, SERVER):
            ratio = reached[OURS]["total tokens/s"] / reached[side]["total tokens/s"]
            figures.add(f"total tokens/s, {OURS} / {side}", ratio)
            # Steadier than time where others use the machine too, and blind to waiting.
            figures.add(f"processor time, {OURS} / {side}", work[OURS] / work[side])
    if figures:
        figures |= bench.matrix_products()
    return figures


def measure_first_token(bench: CpuBench) -> Figures:
    """Return the time to the first token of a short prompt beside one running stream."""
    return _beside_one(bench, SHORT_PROMPT_TOKENS, "first token ms", _first_token)


def measure_gap(bench: CpuBench) -> Figures:
    """Return the worst gap of a running stream while a long prompt is read."""
    return _beside_one(bench, LONG_PROMPT_TOKENS, "worst gap ms", _worst_gap)


def _first_token(_: Answer, late: Answer) -> float:
    return late.parts[0][0] - late.sent


def _worst_gap(running: Answer, late: Answer) -> float:
    return max(gaps(running, late.sent, late.parts[0][0]))


def _beside_one(
    bench: CpuBench, length: int, name: str, measure: Callable[[Answer, Answer], float]
) -> Figures:
    sides = (OURS, SERVER)
    bench.warm(sides, 1, PROMPT_TOKENS)
    figures = Figures()
    for number in bench.rounds():
        running = bench.prompts.one(PROMPT_TOKENS).asking_for(RUNNING_TOKENS)
        # At another moment each time: a server that looks for new requests now and then may be lucky.
        late = bench.prompts.one(length).asking_for(4, after_tokens=6 + number % 5)
        answers = bench.ask_alike(number, sides, [running, late])
        if answers is None:
            continue
        values = {side: measure(*one) for side, one in answers.items()}
        for side, value in values.items():
            figures.add(f"{side}: {name}", value)
        figures.add(f"{OURS} / {SERVER}", values[OURS] / values[SERVER])
    return figures


def measure_start(bench: CpuBench) -> Figures:
    """Return the time from the start of the server's process to its first token, the model loaded between."""
    figures = Figures()
    for number in bench.rounds():
        first = bench.prompts.one(SHORT_PROMPT_TOKENS).asking_for(2)
        starts: dict[str, Callable[[], Any]] = {
            OURS: partial(sidecar, bench.folder, first),
            SERVER: partial(mlx_lm_server, bench.folder, first),
            f"{OURS}, model as it is stored": partial(sidecar, bench.stored, first),
        }
        times: dict[str, float] = {}
        for side in list(starts)[:: 1 if number % 2 else -1]:
            with starts[side]() as started:
                times[side] = started.ready.first_token_ms
        for side, value in times.items():
            figures.add(f"{side}: start to first token ms", value)
        figures.add(f"{OURS} / {SERVER}", times[OURS] / times[SERVER])
    return figures


def measure_memory(bench: CpuBench) -> Figures:
    """Return the most that a fresh server holds until 16 streams have ended, loading included."""
    figures = Figures()
    for number in bench.rounds():
        prompts = bench.prompts.some(16, PROMPT_TOKENS)
        requests = [prompt.asking_for(NEW_TOKENS) for prompt in prompts]
        starts = {OURS: sidecar, SERVER: mlx_lm_server}
        peaks: dict[str, float] = {}
        answers: dict[str, list[Answer]] = {}
        for side in list(starts)[:: 1 if number % 2 else -1]:
            with starts[side](bench.folder, None) as started:
                answers[side] = started.ask(requests)
                peaks[side] = started.peak_memory_mib()
        if not bench.agree(number, answers):
            continue
        for side, value in peaks.items():
            figures.add(f"{side}: peak MiB", value)
        figures.add(f"{OURS} / {SERVER}", peaks[OURS] / peaks[SERVER])
    return figures


def measure_identical(bench: CpuBench) -> Figures:
    """Return how long eight identical streams take, against one."""
    bench.warm((OURS, BATCH), 1, PROMPT_TOKENS)
    bench.warm((OURS,), 8, PROMPT_TOKENS)
    figures = Figures()
    for number in bench.rounds():
        one, same = (prompt.asking_for(NEW_TOKENS) for prompt in bench.prompts.some(2, PROMPT_TOKENS))
        asked = {"1 stream": [one], "8 identical streams": [same] * 8}
        answers = {
            name: bench.side(OURS).ask(asked[name]) for name in list(asked)[:: 1 if number % 2 else -1]
        }
        (reference,) = bench.side(BATCH).ask([same], BATCH)
        if any(answer.ids != reference.ids for answer in answers["8 identical streams"]):
            print(f"round {number} does not count: not every stream says what {BATCH} says")
            continue
        times = {name: max(answer.parts[-1][0] for answer in these) for name, these in answers.items()}
        for name, value in times.items():
            figures.add(f"{name}: ms", value)
        figures.add("8 identical / 1", times["8 identical streams"] / times["1 stream"])
    return figures


PARTS: dict[str, Callable[[CpuBench], Figures]] = {
    **{f"streams-{count}": partial(measure_streams, streams=count) for count in (1, 4, 8, 16)},
    "first-token": measure_first_token,
    "gap": measure_gap,
    "start": measure_start,
    "memory": measure_memory,
    "identical": measure_identical,
    "growth": measure_growth,
}


def main() -> None:
    """Measure what was asked for and publish each part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=" ".join(PARTS)
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each part, at most (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=90, help="seconds for each part (default: %(default)s)"
    )
    arguments = parser.parse_args()
    failed = False
    # So that the sides are ended on the way out.
    signal.signal(signal.SIGTERM, _end)
    try:
        check_requirements()
        folder = make_folder()
    except Refusal as refusal:
        sys.exit(f"benchmarks/engine.py: {refusal}")
    with CpuBench(folder, arguments.rounds, arguments.limit) as bench:
        for part in arguments.only:
            try:
                figures = PARTS[part](bench)
                if not figures:
                    raise Refusal("the sides never said the same")
                publish(f"engine_{part}", f"benchmarks/engine.py --only {part}", "see names", figures)
            except (Refusal, SideError) as reason:
                print(f"\nengine_{part}: no figures: {reason}", file=sys.stderr)
                bench.end_sides()
                failed = True
    sys.exit(failed)


def _end(*_: object) -> None:
    sys.exit(1)


if __name__ == "__main__":
    main()
