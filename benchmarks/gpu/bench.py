"""What the parts share: the models, the sides, which stay loaded, and the rounds."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.random_llama import SHAPES, make_random_llama
from benchmarks.gpu.report import Report
from benchmarks.sides.bench import BATCH, OURS, SERVER, Bench
from benchmarks.sides.side import Side, SideError, in_process, mlx_lm_server, sidecar

PLAIN, STREAM = "plain", "stream_generate"
IN_PROCESS = (PLAIN, STREAM, BATCH)
NO_TF32 = {"MLX_ENABLE_TF32": "0"}
"""Else products of float32 are rounded to 10 bits on the way, and depend on how many rows there are."""


class Sizes(NamedTuple):
    """How much is asked for: tokens of prompts and answers, and numbers of streams."""

    streams: tuple[int, ...] = (1, 8, 32)
    ragged_streams: tuple[int, ...] = (8, 32)
    growth: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    prompt: int = 128
    new: int = 128
    growth_new: int = 64
    long_prompt: int = 16000
    running: int = 8
    running_new: int = 512


TINY = Sizes(
    streams=(1, 4),
    ragged_streams=(4,),
    growth=(1, 4, 16),
    prompt=32,
    new=16,
    growth_new=8,
    long_prompt=1200,
    running=3,
    running_new=600,
)


class GpuBench(Bench):
    """The sides of one run. On a CPU only the tiny model makes sense, and both sides then run in float32."""

    def __init__(self, model: str, rounds: int, seconds: float, report: Report) -> None:
        self.tiny = model == "tiny"
        self.sizes = TINY if self.tiny else Sizes()
        self.report = report
        self._without_server = find_spec("transformers") is None
        self._work = tempfile.TemporaryDirectory(prefix="engine-")
        super().__init__(self.make_model(model), rounds, seconds)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._work.cleanup()

    def make_model(self, name: str) -> Path:
        """Return the folder of a model, made at the first call."""
        folder = Path(self._work.name) / name
        return folder if folder.exists() else make_random_llama(folder, SHAPES[name])

    def empty_folder(self, name: str) -> str:
        """Return the path of a new empty folder, gone after the run."""
        return tempfile.mkdtemp(prefix=name, dir=self._work.name)

    def sidecar(self, environment: dict[str, str] | None = None) -> Side:
        """Start a server of ours that has answered nothing yet."""
        return sidecar(self.folder, None, "float32" if self.tiny else "auto", environment)

    def start(self, name: str) -> Side:
        """Start a side; only the peers then answer a first request."""
        if name == OURS:
            return self.sidecar()
        first = self.prompts.one(16).asking_for(4)
        if name == SERVER:
            return mlx_lm_server(self.folder, first)
        return in_process(self.folder, first, "float32" if self.tiny else "stored")

    def check(self) -> None:
        """Raise SideError if ours is not on a GPU and should be."""
        ours = self._sides.get(OURS)
        if ours is not None and not self.tiny and ours.stats()["engine"].get("device") == "cpu":
            raise SideError("MLX runs on the CPU here; without a GPU only --tiny makes sense")

    def side(self, name: str) -> Side:
        """Return the side that answers as `name`."""
        return super().side(BATCH if name in IN_PROCESS else name)

    def has_server(self) -> bool:
        """Return whether `mlx_lm.server` runs here, and note why not."""
        if self._without_server or SERVER in self._sides:
            return not self._without_server
        try:
            self.side(SERVER)
        except SideError as error:
            self.report.note(f"no {SERVER}: {error}")
            self._without_server = True
        return not self._without_server
