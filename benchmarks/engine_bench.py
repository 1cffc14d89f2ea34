"""What the parts of engine.py share: the model's folder, the sides and the rounds."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.sides.bench import BATCH, OURS, SERVER, Answers, Bench
from benchmarks.sides.measures import Figures, first_difference
from benchmarks.sides.rounds import Request
from benchmarks.sides.side import HERE, NODE_CLIENT, Side, in_process, mlx_lm_server, sidecar
from mlx_sidecar.config.settings import default_home
from mlx_sidecar.runtime.models.store import ModelStore

MODEL = "smollm2-135m"
FLOAT32_FOLDER = Path(__file__).parents[1] / "build" / "benchmarks" / f"{MODEL}-float32"
STARTS = {OURS: sidecar, BATCH: in_process, SERVER: mlx_lm_server}


class Refusal(Exception):
    """Something is missing, or a figure would not mean what its name says."""


def check_requirements() -> None:
    """Raise Refusal, saying what to do, if a side could not run here."""
    if shutil.which("node") is None or not NODE_CLIENT.exists():
        raise Refusal("needs Node and the TypeScript client; run: make demo")
    if find_spec("transformers") is None:
        raise Refusal(
            "needs mlx_lm.server, and that needs transformers; run: .venv/bin/pip install transformers"
        )
    if sys.platform != "linux" or find_spec("scipy_openblas32") is None:
        raise Refusal("compares on Linux with OpenBLAS; run: .venv/bin/pip install -e '.[cpu]'")


def make_folder() -> Path:
    """Return the folder of the demo model in float32, made at the first call."""
    stored = stored_folder()
    if not (FLOAT32_FOLDER / "config.json").exists():
        script = str(HERE / "float32_model.py")
        subprocess.run([sys.executable, script, str(stored), str(FLOAT32_FOLDER)], check=True)
    return FLOAT32_FOLDER


def stored_folder() -> Path:
    """Return the folder of the demo model as it was brought here."""
    folder = ModelStore(default_home(os.environ)).find(MODEL)
    if folder is None:
        raise Refusal("needs the demo model; run: make demo")
    return folder


class CpuBench(Bench):
    """The sides of one run, which must say the same on one BLAS."""

    def __init__(self, folder: Path, rounds: int, limit: float) -> None:
        super().__init__(folder, rounds, limit)
        self.stored = stored_folder()

    def start(self, name: str) -> Side:
        """Start a side and have it answer a first request."""
        return STARTS[name](self.folder, self.prompts.one(16).asking_for(4))

    def check(self) -> None:
        """Raise Refusal as `matrix_products` does."""
        self.matrix_products()

    def warm(self, names: Sequence[str], streams: int, length: int) -> None:
        """Have sides answer shortly what they will be asked for."""
        for name in names:
            prompts = self.prompts.some(streams, length)
            self.side(name).ask([prompt.asking_for(2) for prompt in prompts], name)

    def ask_alike(self, number: int, names: Sequence[str], requests: list[Request]) -> Answers | None:
        """Have sides answer the same in turn; None if they do not say the same."""
        answers = self.ask(number, names, requests)
        return answers if self.agree(number, answers) else None

    def agree(self, number: int, answers: Answers) -> bool:
        """Return whether all sides say what ours says, and print where they do not."""
        agreed = True
        for name, theirs in answers.items():
            for stream, (mine, other) in enumerate(zip(answers[OURS], theirs, strict=True)):
                at = first_difference(mine, other, self.prompts.decode)
                if at is not None:
                    print(f"round {number} does not count: {name} differs in stream {stream} at {at}")
                    agreed = False
        return agreed

    def matrix_products(self) -> Figures:
        """Return the rates of matrix products in the peers' processes.

        Raises:
            Refusal: a side runs without OpenBLAS, or with another number of threads.
        """
        figures, threads = Figures(), dict[str, int | None]()
        for name, side in self._sides.items():
            if name == OURS:
                threads[name] = side.stats()["native"]["blas"].get("threads")
            else:
                threads[name] = side.ready.blas_threads
                figures.add(f"{name}: float32 product GFLOP/s", side.ready.gflops or 0.0)
        if None in threads.values() or len(set(threads.values())) > 1:
            raise Refusal(f"the sides do not share one BLAS with one number of threads: {threads}")
        return figures
