"""What the parts of engine.py share: the model's folder, the sides and the rounds."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from sides import measures
from sides.measures import Figures
from sides.prompts import Prompts
from sides.rounds import Answer, Request
from sides.side import HERE, NODE_CLIENT, Side, in_process, mlx_lm_server, sidecar

from mlx_sidecar.config.settings import default_home
from mlx_sidecar.runtime.models.store import ModelStore

OURS, BATCH, SERVER = "sidecar", "BatchGenerator", "mlx_lm.server"
MODEL = "smollm2-135m"
FLOAT32_FOLDER = Path(__file__).parents[1] / "build" / "benchmarks" / f"{MODEL}-float32"
STARTS = {OURS: sidecar, BATCH: in_process, SERVER: mlx_lm_server}


Answers = dict[str, list[Answer]]
"""What each side said, by its name."""


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


class Bench:
    """The sides, each started when it is first needed and warm from then on."""

    def __init__(self, folder: Path, rounds: int, limit: float) -> None:
        self.folder = folder
        self.stored = stored_folder()
        self.prompts = Prompts(folder)
        self._rounds = rounds
        self._limit = limit
        self._sides: dict[str, Side] = {}

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self.end_sides()

    def end_sides(self) -> None:
        """End every side; the next one asked for starts afresh."""
        while self._sides:
            self._sides.popitem()[1].end()

    def rounds(self) -> Iterator[int]:
        """Yield the numbers of the rounds for which there is time."""
        return measures.rounds(self._rounds, self._limit)

    def side(self, name: str) -> Side:
        """Return a side that has answered a first request."""
        if name not in self._sides:
            self._sides[name] = STARTS[name](self.folder, self.prompts.one(16).asking_for(4))
            self.matrix_products()
        return self._sides[name]

    def warm(self, names: Sequence[str], streams: int, length: int) -> None:
        """Have sides answer shortly what they will be asked for."""
        for name in names:
            prompts = self.prompts.some(streams, length)
            self.side(name).ask([prompt.asking_for(2) for prompt in prompts], name)

    def ask(
        self, number: int, names: Sequence[str], requests: list[Request]
    ) -> dict[str, list[Answer]] | None:
        """Have sides answer the same in turn; None if they do not say the same."""
        order = names if number % 2 else names[::-1]
        answers = {name: self.side(name).ask(requests, name) for name in order}
        return answers if self.agree(number, answers) else None

    def agree(self, number: int, answers: Answers) -> bool:
        """Return whether all sides say what ours says, and print where they do not."""
        agreed = True
        for name, theirs in answers.items():
            for stream, (mine, other) in enumerate(zip(answers[OURS], theirs, strict=True)):
                at = measures.first_difference(mine, other, self.prompts.decode)
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
