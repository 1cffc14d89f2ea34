"""What the parts share: the models, the sides, which stay loaded, and the rounds."""

import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from benchmarks.gpu.random_llama import SHAPES, make_random_llama
from benchmarks.gpu.report import Report
from benchmarks.sides import measures
from benchmarks.sides.prompts import Prompts
from benchmarks.sides.rounds import Answer, Request
from benchmarks.sides.side import Side, SideError, in_process, mlx_lm_server, sidecar

OURS, PLAIN, STREAM, BATCH, SERVER = (
    "sidecar",
    "plain",
    "stream_generate",
    "BatchGenerator",
    "mlx_lm.server",
)
IN_PROCESS = (PLAIN, STREAM, BATCH)
NO_TF32 = {"MLX_ENABLE_TF32": "0"}
"""Else products of float32 are rounded to 10 bits on the way, and depend on how many rows there are."""

Answers = dict[str, list[Answer]]


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


class GpuBench:
    """The sides of one run. On a CPU only the tiny model makes sense, and both sides then run in float32."""

    def __init__(self, model: str, rounds: int, seconds: float, report: Report) -> None:
        self.tiny = model == "tiny"
        self.sizes = TINY if self.tiny else Sizes()
        self.report = report
        self._model = model
        self._rounds = rounds
        self._seconds = seconds
        self._sides: dict[str, Side] = {}
        self._without_server = find_spec("transformers") is None
        self._work = tempfile.TemporaryDirectory(prefix="engine-")
        self.folder = self.make_model(model)
        self.prompts = Prompts(self.folder)

    def __enter__(self) -> "GpuBench":
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.end_sides()
        self._work.cleanup()

    def end_sides(self) -> None:
        """End every side; the next one asked for starts afresh."""
        while self._sides:
            self._sides.popitem()[1].end()

    def make_model(self, name: str) -> Path:
        """Return the folder of a model, made at the first call."""
        folder = Path(self._work.name) / name
        return folder if folder.exists() else make_random_llama(folder, SHAPES[name])

    def empty_folder(self, name: str) -> str:
        """Return the path of a new empty folder, gone after the run."""
        return tempfile.mkdtemp(prefix=name, dir=self._work.name)

    def rounds(self) -> Iterator[int]:
        """Yield the numbers of the rounds for which there is time."""
        return measures.rounds(self._rounds, self._seconds)

    def sidecar(self, environment: dict[str, str] | None = None) -> Side:
        """Start a server of ours that has answered nothing yet."""
        return sidecar(self.folder, None, "float32" if self.tiny else "auto", environment)

    def side(self, name: str) -> Side:
        """Return the side that answers as `name`."""
        key = BATCH if name in IN_PROCESS else name
        if key not in self._sides:
            first = self.prompts.one(16).asking_for(4)
            dtype = "float32" if self.tiny else "stored"
            if key == OURS:
                self._sides[key] = self.sidecar()
                self._check_device()
            else:
                self._sides[key] = (
                    in_process(self.folder, first, dtype)
                    if key == BATCH
                    else mlx_lm_server(self.folder, first)
                )
        return self._sides[key]

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

    def ask(self, number: int, names: Sequence[str], requests: list[Request]) -> Answers:
        """Have sides answer the same in turn."""
        order = names if number % 2 else names[::-1]
        answers = {name: self.side(name).ask(requests, name) for name in order}
        return {name: answers[name] for name in names}

    def _check_device(self) -> None:
        if not self.tiny and self._sides[OURS].stats()["engine"].get("device") == "cpu":
            raise SideError("MLX runs on the CPU here; without a GPU only --tiny makes sense")
