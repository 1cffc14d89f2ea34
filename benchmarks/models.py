"""Many models in one memory: what loading costs who decodes, what switching costs, and what thrashing drops.

    .venv/bin/python benchmarks/models.py [--only PART ...] [--rounds N] [--limit SECONDS]

The real sidecar over stdio, through its Python client. The demo model decodes in float32; what is loaded
beside it has random weights. All ratios are of one stream or of one round. A part begins no round that would
likely end later than its limit.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
from msgspec import UNSET

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine_bench import Refusal, make_folder
from benchmarks.model_folders import bfloat16_folder, float32_bytes, float32_folder, small_folders
from benchmarks.report import publish
from benchmarks.sides.measures import Figures, rounds
from benchmarks.sides.prompts import Prompts
from mlx_sidecar.client import Sidecar, SidecarRequestError

COMMAND = (sys.executable, "-P", "-m", "mlx_sidecar.runtime", "serve", "--log-level", "error")
MODEL = "smollm2-135m"
FIRST, AROUND = 4, 30
"""Tokens of a stream that do not count, and so many before and after a load that do."""
PROMPT_TOKENS = 16
NEVER_ENDS = {"0": -1000.0, "2": -1000.0}
"""The tokens that end an answer of the demo model are never chosen."""
SWITCHES = 4
CYCLES = 200
PATIENCE_SECONDS = 120.0
MIB = 1 << 20

Rounds = Callable[[], Iterator[int]]


@asynccontextmanager
async def sidecar(*arguments: str) -> AsyncGenerator[Sidecar]:
    """Yield a sidecar that has nothing loaded, with MLX started."""
    async with Sidecar.spawn((*COMMAND, *arguments), start_timeout=120) as started:
        with anyio.fail_after(PATIENCE_SECONDS):
            while (await started.stats()).memory.budget_bytes is UNSET:
                await anyio.sleep(0.05)
        yield started


class Stream:
    """An endless answer that is read as it comes; `times` has a time for each token."""

    def __init__(self, sidecar: Sidecar, prompt: list[int]) -> None:
        # The context is full before this ends; it is left long before.
        self._generation = sidecar.generate(MODEL, tokens=prompt, maxTokens=4000, logitBias=NEVER_ENDS)
        self.times: list[float] = []
        self._grown = anyio.Event()

    async def read(self) -> None:
        """Read until the task is cancelled, which cancels the answer."""
        async with self._generation as parts:
            async for part in parts:
                self.times += [time.perf_counter()] * len(part.tokens)
                grown, self._grown = self._grown, anyio.Event()
                grown.set()

    async def more(self, tokens: int) -> None:
        """Wait for so many tokens more."""
        enough = len(self.times) + tokens
        while len(self.times) < enough:
            await self._grown.wait()

    def rate(self, begin: float, end: float) -> float:
        """Return tokens per second between two moments, from the first token in between to the last."""
        times = [at for at in self.times if begin < at <= end]
        return (len(times) - 1) / (times[-1] - times[0])

    def worst_gap(self, begin: float, end: float) -> float:
        """Return the longest time without a token that touches the time between two moments."""
        return max(later - at for at, later in pairwise(self.times) if later > begin and at < end)


async def measure_pace(rounds: Rounds) -> Figures:
    """Return how fast a model decodes while another loads, against just before and just after."""
    folders = {"float32 on disk": float32_folder(), "bfloat16 on disk, converted": bfloat16_folder()}
    prompts, figures = Prompts(make_folder()), Figures()
    async with sidecar() as server:
        await server.load(MODEL, dtype="float32")
        await _warm_up(server, MODEL, prompts)
        for number in rounds():
            for name in list(folders)[:: 1 if number % 2 else -1]:
                folder = str(folders[name])
                began = time.perf_counter()
                await server.load(folder, dtype="float32")
                figures.add(f"{name}: load alone, s", time.perf_counter() - began)
                await server.unload(folder)
                for key, value in (await _pace_beside(server, prompts, folder)).items():
                    figures.add(f"{name}: {key}", value)
    return figures


async def _pace_beside(server: Sidecar, prompts: Prompts, folder: str) -> dict[str, float]:
    stream = Stream(server, prompts.one(PROMPT_TOKENS).tokens)
    found: dict[str, float] = {}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.read)
        await stream.more(FIRST)
        before = time.perf_counter()
        await stream.more(AROUND)
        began = time.perf_counter()
        loaded = await server.load(folder, dtype="float32")
        ended = time.perf_counter()
        await stream.more(AROUND)
        after = time.perf_counter()
        tasks.cancel_scope.cancel()
        around = statistics.mean((stream.rate(before, began), stream.rate(ended, after)))
        read = ended - loaded.phases.warmup_ms / 1000
        found = {
            "tokens/s around": around,
            "during / around": stream.rate(began, ended) / around,
            "while weights are read / around": stream.rate(began, read) / around,
            "worst gap during, ms": 1000 * stream.worst_gap(began, ended),
            "worst gap around, ms": 1000
            * max(stream.worst_gap(before, began), stream.worst_gap(ended, after)),
            "load beside the stream, s": ended - began,
            "of that warm-up, s": loaded.phases.warmup_ms / 1000,
        }
    await server.unload(folder)
    return found


async def measure_switch(rounds: Rounds) -> Figures:
    """Return how much later the first token comes from a model that was not the last one asked."""
    models = (MODEL, str(make_folder()))
    prompts, figures = Prompts(make_folder()), Figures()
    async with sidecar() as server:
        for model in models:
            await server.load(model, dtype="float32")
            await _warm_up(server, model, prompts)
        for _ in rounds():
            firsts: dict[bool, list[float]] = {False: [], True: []}
            steps: list[float] = []
            last = models[1]
            # Every model twice, so that each is asked as often after itself as after the other.
            for model in [each for each in models for _ in range(2)] * SWITCHES:
                first, step = await _first_token_and_step(server, model, prompts)
                firsts[model != last].append(first)
                steps.append(step)
                last = model
            stay, switch, step = map(statistics.median, (firsts[False], firsts[True], steps))
            figures.add("first token, same model, ms", 1000 * stay)
            figures.add("first token, other model, ms", 1000 * switch)
            figures.add("decode step, ms", 1000 * step)
            figures.add("extra for the switch, in decode steps", (switch - stay) / step)
    return figures


async def _first_token_and_step(server: Sidecar, model: str, prompts: Prompts) -> tuple[float, float]:
    began = time.perf_counter()
    times: list[float] = []
    prompt = prompts.one(PROMPT_TOKENS).tokens
    async for part in server.generate(model, tokens=prompt, maxTokens=6, logitBias=NEVER_ENDS):
        times += [time.perf_counter()] * len(part.tokens)
    return times[0] - began, statistics.median(later - at for at, later in pairwise(times))


class Client:
    """One of two who load, use and unload as they like, each models of its own."""

    def __init__(self, server: Sidecar, models: list[str], prompts: Prompts, seed: int) -> None:
        self._server = server
        self._models = models
        self._prompts = prompts
        self._dice = random.Random(seed)
        self._loaded: set[str] = set()
        self.asked = self.dropped = 0

    async def run(self, cycles: int) -> None:
        """Do so many things at random, some of them at once, and unload everything at the end."""
        for _ in range(cycles):
            model = self._dice.choice(self._models)
            if model not in self._loaded:
                self._loaded.add(model)
                await self._try(partial(self._server.load, model, dtype="float32"))
            elif self._dice.random() < 0.3:
                self._loaded.discard(model)
                await self._try(partial(self._server.unload, model))
            else:
                async with anyio.create_task_group() as tasks:
                    for each in [model, *self._dice.sample(sorted(self._loaded), 1)]:
                        tasks.start_soon(self._try, partial(self._generate, each))
        for model in sorted(self._loaded):
            await self._try(partial(self._server.unload, model))

    async def _generate(self, model: str) -> None:
        prompt = self._prompts.one(self._dice.randint(1, 48)).tokens
        await self._server.generate(model, tokens=prompt, maxTokens=self._dice.randint(1, 24)).result()

    async def _try(self, what: Callable[[], Awaitable[Any]]) -> None:
        self.asked += 1
        try:
            await what()
        except SidecarRequestError as error:
            self.dropped += 1
            print(f"dropped: {error}")


async def measure_cycles(rounds: Rounds) -> Figures:
    """Return what two clients see of a memory for three of six models that they use and unload at random."""
    folders = small_folders()
    budget = sum(sorted(map(float32_bytes, folders))[-3:]) + float32_bytes(folders[0]) - 1
    arguments = ("--memory-budget-bytes", str(budget), "--prefill-chunk-tokens-cpu", "8")
    prompts, figures = Prompts(folders[0]), Figures()
    for number in rounds():
        async with sidecar(*arguments) as server:
            before = await server.stats()
            clients = [
                Client(server, [str(folder) for folder in folders[half::2]], prompts, 2 * number + half)
                for half in range(2)
            ]
            began = time.perf_counter()
            try:
                with anyio.fail_after(PATIENCE_SECONDS):
                    async with anyio.create_task_group() as tasks:
                        for client in clients:
                            tasks.start_soon(client.run, CYCLES // len(clients))
            except TimeoutError:
                raise Refusal(f"some requests were not answered within {PATIENCE_SECONDS:.0f} s") from None
            after = await server.stats()
            kept = after.memory.mlx_active_bytes - before.memory.mlx_active_bytes
            figures.add("requests", sum(client.asked for client in clients))
            figures.add("dropped", sum(client.dropped for client in clients))
            figures.add("MLX active memory kept, MiB", kept / MIB)
            figures.add("evicted", after.residency.evicted)
            figures.add("brought back", after.residency.brought_back)
            figures.add("whole, s", time.perf_counter() - began)
    return figures


async def _warm_up(server: Sidecar, model: str, prompts: Prompts) -> None:
    await server.generate(model, tokens=prompts.one(PROMPT_TOKENS).tokens, maxTokens=8).result()


PARTS: dict[str, Callable[[Rounds], Awaitable[Figures]]] = {
    "pace": measure_pace,
    "switch": measure_switch,
    "cycles": measure_cycles,
}


def main() -> None:
    """Measure what was asked for and publish each part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=" ".join(PARTS)
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each part, at most (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=180, help="seconds for each part (default: %(default)s)"
    )
    arguments = parser.parse_args()
    failed = False
    for part in arguments.only:
        try:
            figures = anyio.run(PARTS[part], partial(rounds, arguments.rounds, arguments.limit))
            publish(f"models_{part}", f"benchmarks/models.py --only {part}", "see names", figures)
        except Refusal as reason:
            print(f"\nmodels_{part}: no figures: {reason}", file=sys.stderr)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
