"""Sequences with LoRA adapters in one batch against the base model alone: the same prompts, in turn.

    .venv/bin/python benchmarks/adapters.py [--rounds N] [--rank R]

The demo model in float32 in the engine's own batches, without a server around them: one batch for each side,
all over the same weights, a step of each in turn. The adapters are random and change every linear layer of
every block, as much as those of mlx-lm and PEFT usually do or more. Ratios are of tokens/s; prompts take
their time, but are not counted. Ten minutes. Linux CPU only.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine_bench import Refusal, make_folder
from benchmarks.report import publish
from benchmarks.sides.measures import Figures
from benchmarks.sides.prompts import Prompts
from mlx_sidecar.native.blas import Blas
from mlx_sidecar.runtime.engine.mlx_start import start_mlx
from mlx_sidecar.runtime.engine.sequence import Sampling, Sequence

PROMPT_TOKENS, NEW_TOKENS = 32, 48
CHUNK_TOKENS = 256
ROWS = (4, 8)
NAMES = ("a", "b", "c", "d")
SIDES: dict[str, tuple[str | None, ...]] = {
    "base": (None,),
    "1 adapter": ("a",),
    "4 adapters": NAMES,
    "4 adapters and base": (*NAMES, None, None, None, None),
}
"""The adapters that rows have, again and again."""


def make_batches(folder: Path, rank: int) -> dict[str, Any]:
    """Return a batch for each side; all but the base have four adapters, whether they use them or not."""
    import mlx.core as mx
    import mlx_lm.utils as mlx_lm

    from mlx_sidecar.runtime.engine.adapted_linear import LowRank, sizes
    from mlx_sidecar.runtime.engine.adapters import AdapterWeights
    from mlx_sidecar.runtime.engine.model_batch import ModelBatch

    networks = [cast(Any, mlx_lm).load_model(folder, lazy=True)[0] for _ in SIDES]
    for network in networks[1:]:
        network.update(networks[0].parameters())
    mx.eval(networks[0].parameters())
    modules: Any = networks[0].named_modules()
    layers = {path: found for path, module in modules if ".layers." in path and (found := sizes(module))}
    batches: dict[str, Any] = {}
    for side, network in zip(SIDES, networks, strict=True):
        batches[side] = ModelBatch(network, prefill_chunk_tokens=CHUNK_TOKENS)
        for name in NAMES if side != "base" else ():
            parts = {path: LowRank(*_random(rank, *sizes)) for path, sizes in layers.items()}
            mx.eval(parts)
            batches[side].attach_adapter(name, AdapterWeights(parts))
        while batches[side].prepare():
            pass
    return batches


def _random(rank: int, inputs: int, outputs: int) -> tuple[Any, Any]:
    import mlx.core as mx

    return mx.random.normal((rank, inputs)) / inputs**0.5, 0.02 * mx.random.normal((rank, outputs))


def run(batches: dict[str, Any], prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """Run the prompts on every side, a step of each in turn, and return the seconds that each took."""
    import mlx.core as mx

    for side, batch in batches.items():
        for row, prompt in enumerate(prompts):
            adapter = SIDES[side][row % len(SIDES[side])]
            batch.add(
                Sequence("", prompt, new_tokens, Sampling(), frozenset(), lambda _: None, adapter=adapter)
            )
    seconds = dict.fromkeys(batches, 0.0)
    order = list(batches)
    while any(len(batch) for batch in batches.values()):
        order.reverse()
        for side in order:
            began = time.monotonic()
            if len(batches[side]):
                batches[side].step()
            mx.synchronize()
            seconds[side] += time.monotonic() - began
    return seconds


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        folder = make_folder()
    except Refusal as refusal:
        sys.exit(f"benchmarks/adapters.py: {refusal}")
    start_mlx(Blas())
    batches, supply, figures = make_batches(folder, arguments.rank), Prompts(folder), Figures()
    for rows in ROWS:
        run(batches, [prompt.tokens for prompt in supply.some(rows, PROMPT_TOKENS)], 2)
        for _ in range(arguments.rounds):
            prompts = [prompt.tokens for prompt in supply.some(rows, PROMPT_TOKENS)]
            seconds = run(batches, prompts, NEW_TOKENS)
            for side in SIDES:
                figures.add(f"{rows} rows, {side}: tokens/s", rows * NEW_TOKENS / seconds[side])
            for side in list(SIDES)[1:]:
                figures.add(f"{rows} rows, {side} / base", seconds["base"] / seconds[side])
    publish("adapters", f"benchmarks/adapters.py --rank {arguments.rank}", "tokens/s, ratios", figures)


if __name__ == "__main__":
    main()
