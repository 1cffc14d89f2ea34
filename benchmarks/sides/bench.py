"""Sides that stay loaded, and are asked the same in turn."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from . import measures
from .prompts import Prompts
from .rounds import Answer, Request
from .side import Side

OURS, BATCH, SERVER = "sidecar", "BatchGenerator", "mlx_lm.server"

Answers = dict[str, list[Answer]]
"""What each side said, by its name."""


class Bench(ABC):
    """The sides of one run, each started when it is first needed and warm from then on."""

    def __init__(self, folder: Path, rounds: int, seconds: float) -> None:
        self.folder = folder
        self.prompts = Prompts(folder)
        self._rounds = rounds
        self._seconds = seconds
        self._sides: dict[str, Side] = {}

    @abstractmethod
    def start(self, name: str) -> Side:
        """Start a side."""

    @abstractmethod
    def check(self) -> None:
        """Raise if figures from the sides started so far would not mean what they say."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_sides()

    def end_sides(self) -> None:
        """End every side; the next one asked for starts afresh."""
        while self._sides:
            self._sides.popitem()[1].end()

    def rounds(self) -> Iterator[int]:
        """Yield the numbers of the rounds for which there is time."""
        return measures.rounds(self._rounds, self._seconds)

    def side(self, name: str) -> Side:
        """Return a side."""
        if name not in self._sides:
            self._sides[name] = self.start(name)
            self.check()
        return self._sides[name]

    def ask(self, number: int, names: Sequence[str], requests: list[Request]) -> Answers:
        """Have sides answer the same, in an order that turns round with every round."""
        order = names if number % 2 else names[::-1]
        answers = {name: self.side(name).ask(requests, name) for name in order}
        return {name: answers[name] for name in names}
