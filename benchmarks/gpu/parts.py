"""What is measured on a GPU, one function for each part."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.gpu.bench import NO_TF32, PLAIN, STREAM, GpuBench
from benchmarks.sides.bench import BATCH, OURS, SERVER
from benchmarks.sides.measures import Figures, first_difference, gaps, sums
from benchmarks.sides.prompts import Prompt
from benchmarks.sides.rounds import Answer
from benchmarks.sides.side import in_process, sidecar

Part = Callable[[GpuBench], Figures]


def parts(bench: GpuBench) -> dict[str, Part]:
    """Return what can be asked for by name, in order of worth."""
    sizes = bench.sizes
    return {
        "tokens": measure_tokens,
        **{f"streams-{count}": partial(measure_streams, count=count) for count in sizes.streams},
        "gap": measure_gap,
        **{f"ragged-{count}": partial(measure_ragged, count=count) for count in sizes.ragged_streams},
        "first": measure_first,
    }


def measure_streams(bench: GpuBench, count: int) -> Figures:
    """Return what so many equal streams at once reach."""
    sides = [OURS, PLAIN, *([STREAM] if count == 1 else []), BATCH, *([SERVER] if bench.has_server() else [])]
    return _side_by_side(bench, sides, lambda: bench.prompts.some(count, bench.sizes.prompt))


def measure_ragged(bench: GpuBench, count: int) -> Figures:
    """Return what streams with prompts of a half to four times the usual length reach."""
    prompt = bench.sizes.prompt
    return _side_by_side(bench, [OURS, BATCH], lambda: bench.prompts.ragged(count, prompt // 2, prompt * 4))


def _side_by_side(bench: GpuBench, sides: list[str], prompts: Callable[[], list[Prompt]]) -> Figures:
    figures = Figures()

    def ask(number: int) -> dict[str, list[Answer]]:
        return bench.ask(number, sides, [prompt.asking_for(bench.sizes.new) for prompt in prompts()])

    ask(0)  # Kernels are compiled for shapes that come for the first time.
    for number in bench.rounds():
        answers = ask(number)
        reached = {side: sums(one) for side, one in answers.items()}
        for side, one in reached.items():
            for name, value in one.items():
                figures.add(f"{side}: {name}", value)
        for side in sides[1:]:
            for name in ("total tokens/s", "steady tokens/s", "first token p50 ms"):
                if name in reached[side] and name in reached[OURS]:
                    figures.add(f"{OURS} / {side}: {name}", reached[OURS][name] / reached[side][name])
        # In 16 bits ties and near ties fall as the shape of a product wills; this share is no verdict.
        figures.add(f"streams that say what {BATCH} says", _share(bench, answers[OURS], answers[BATCH]))
    return figures


def _share(bench: GpuBench, ours: list[Answer], theirs: list[Answer]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return statistics.mean(first_difference(*pair, bench.prompts.decode) is None for pair in pairs)


def measure_tokens(bench: GpuBench) -> Figures:
    """Return the share of streams that say in company what a plain forward pass says alone; 1 or wrong.

    A tiny model in float32 without TF32; ragged prompts, at once and joining late.
    """
    figures, folder = Figures(), bench.make_model("tiny")
    with (
        sidecar(folder, None, "float32", NO_TF32) as ours,
        in_process(folder, None, "float32", NO_TF32) as theirs,
    ):
        for number in range(4):
            prompts = bench.prompts.ragged(8, 5, 700 if number % 2 else 60)
            alone = [theirs.ask([prompt.asking_for(64)], PLAIN)[0] for prompt in prompts]
            late = [0, 0, 0, 1, 5, 9, 20, 40]
            asked = [prompt.asking_for(64, after_tokens=at) for prompt, at in zip(prompts, late, strict=True)]
            together = ours.ask([prompt.asking_for(64) for prompt in prompts])
            figures.add("the same at once", _share(bench, together, alone))
            figures.add("the same joining late", _share(bench, ours.ask(asked), alone))
            batch = theirs.ask([prompt.asking_for(64) for prompt in prompts], BATCH)
            figures.add(f"the same in {BATCH}", _share(bench, batch, alone))
    return figures


def measure_gap(bench: GpuBench) -> Figures:
    """Return the gaps of running streams while a long prompt is read, against their median before."""
    figures, sizes = Figures(), bench.sizes

    def ask(number: int) -> dict[str, list[Answer]]:
        running = [
            one.asking_for(sizes.running_new) for one in bench.prompts.some(sizes.running, sizes.prompt)
        ]
        late = bench.prompts.one(sizes.long_prompt).asking_for(2, after_tokens=sizes.running_new // 8)
        return bench.ask(number, [OURS], [*running, late])

    ask(0)
    for number in bench.rounds():
        for side, (*running, late) in ask(number).items():
            # Not the very first tokens: the streams have not begun together.
            began = max(answer.parts[8][0] for answer in running)
            arrived, read = late.sent, late.parts[0][0]
            before = [gap for answer in running for gap in gaps(answer, began, arrived)]
            during = [gap for answer in running for gap in gaps(answer, arrived, read)]
            if not before or not during:
                bench.report.note(f"{side}: no stream was still running when the long prompt came")
                continue
            figures.add(f"{side}: median gap before, ms", statistics.median(before))
            figures.add(f"{side}: worst gap before, ms", max(before))
            figures.add(f"{side}: median gap during, ms", statistics.median(during))
            figures.add(f"{side}: worst gap during, ms", max(during))
            figures.add(f"{side}: worst gap during / median before", max(during) / statistics.median(before))
            figures.add(f"{side}: first token of the long prompt, ms", read - arrived)
    return figures


def measure_first(bench: GpuBench) -> Figures:
    """Return what the first requests after `load` cost against later ones, with no kernel compiled before.

    A second server then shows what the kernels on disk save.
    """
    figures = Figures()
    bench.end_sides()  # They keep memory that they do not use.
    caches = {name: bench.empty_folder(name) for name in ("MLX_PTX_CACHE_DIR", "CUDA_CACHE_PATH")}
    for state in ("cold", "kernels on disk"):
        with bench.sidecar(caches) as server:
            figures.add(f"{state}: load ms", server.ready.load_ms or 0.0)
            alone = [_one_round(bench, server, 1) for _ in range(10)]
            together = [_one_round(bench, server, bench.sizes.running) for _ in range(3)]
        for name in ("first token p50 ms", "whole ms"):
            figures.add(f"{state}: first, {name}", alone[0][name])
            figures.add(f"{state}: first / tenth, {name}", alone[0][name] / alone[-1][name])
            count = bench.sizes.running
            figures.add(
                f"{state}: first / third time of {count} at once, {name}",
                together[0][name] / together[-1][name],
            )
    return figures


def _one_round(bench: GpuBench, server: Any, count: int) -> dict[str, float]:
    answers = server.ask([one.asking_for(32) for one in bench.prompts.some(count, bench.sizes.prompt)])
    return sums(answers) | {"whole ms": max(answer.parts[-1][0] for answer in answers)}
