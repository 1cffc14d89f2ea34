"""The engine on a GPU, against mlx-lm in process and, where transformers is installed, `mlx_lm.server`.

    python benchmarks/gpu/engine.py [--model 3b|1b] [--only PART ...] [--limit SECONDS] [--out FOLDER]
    python benchmarks/gpu/engine.py --tiny    # a rehearsal, which also runs on a CPU

Needs MLX's CUDA build, mlx-lm and an importable `mlx_sidecar`; the models are made here, of random weights.
The sidecar is asked over stdio, by the Node client or, where there is no Node, by the Python client. All
sides get the same new prompts in every round, in turn, greedy; the first round is thrown away.
"""

import argparse
import signal
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.bench import GpuBench
from benchmarks.gpu.growth import measure_growth
from benchmarks.gpu.parts import parts
from benchmarks.gpu.random_llama import SHAPES
from benchmarks.gpu.report import Report


class OutOfTime(BaseException):
    """The limit of the whole run was reached; no handler of a part's errors may take it."""


def main() -> None:
    """Measure what was asked for, as far as time allows."""
    arguments = _arguments()
    command = "benchmarks/gpu/engine.py " + " ".join(sys.argv[1:])
    model = "tiny" if arguments.tiny else arguments.model
    report = Report(command.strip(), {"name": model} | SHAPES[model]._asdict(), arguments.out)
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.signal(signal.SIGTERM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, arguments.limit)
    try:
        with GpuBench(model, arguments.rounds, arguments.part_limit, report) as bench:
            complete = _measure(bench, arguments.only, arguments.out)
    except OutOfTime:
        report.note("The time limit was reached; what is missing was not measured.")
        sys.exit(3)
    sys.exit(not complete)


def _measure(bench: GpuBench, only: list[str], out: Path | None) -> bool:
    known = parts(bench) | {"growth": partial(measure_growth, folder=out)}
    if unknown := set(only) - set(known):
        bench.report.note(f"There is no {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
        return False
    complete = True
    for name in only or list(known):
        began = time.monotonic()
        try:
            figures = known[name](bench)
        except Exception as error:
            bench.report.note(f"{name}: no figures: {error!r}")
            bench.end_sides()
            complete = False
        else:
            bench.report.add(name, figures)
            print(f"({time.monotonic() - began:.0f} s)", flush=True)
    return complete


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["3b", "1b"], default="3b", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="a wrong one lists them")
    parser.add_argument("--rounds", type=int, default=5, help="of each part, at most (default: %(default)s)")
    parser.add_argument("--part-limit", type=float, default=60, help="seconds a part (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=540, help="seconds in all (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the figures are kept (default: only printed)")
    return parser.parse_args()


def _out_of_time(*_: object) -> None:
    raise OutOfTime


if __name__ == "__main__":
    main()
