"""The batch under test, and rows that come to it, go from it and end in it, one step at a time."""

import logging
from collections.abc import Callable, Generator
from collections.abc import Sequence as Rows
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_sidecar.runtime.engine.sequence import Emission, FinishReason, Sampling, Sequence

if TYPE_CHECKING:
    from mlx_sidecar.runtime.engine.batch import Batch

GREEDY = Sampling()


def make_batch(module: Any, prefill_chunk_tokens: int, prefill_shapes: tuple[int, ...] = ()) -> "Batch":
    """Return the batch that the engine uses, which has shapes for prefill on CUDA."""
    from mlx_sidecar.runtime.engine.model_batch import ModelBatch

    batch = ModelBatch(module, prefill_chunk_tokens=prefill_chunk_tokens)
    if prefill_shapes:
        batch.chunks = batch.chunks._replace(shapes=prefill_shapes)
    return batch


@dataclass(frozen=True)
class Row:
    """What is asked for, the step at which it comes, and how many steps later it is cancelled, if ever."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = GREEDY
    stops: frozenset[int] = frozenset()
    joins: int = 0
    leaves_after: int | None = None
    adapter: str | None = None

    def sequence(self) -> Sequence:
        """Return what a batch is given."""
        prompt = list(self.prompt)
        return Sequence(
            "", prompt, self.max_tokens, self.sampling, self.stops, lambda _: None, adapter=self.adapter
        )


@dataclass
class Outcome:
    """What became of a row: its tokens, and every end that it was given."""

    tokens: list[int] = field(default_factory=list[int])
    ends: list[FinishReason] = field(default_factory=list[FinishReason])

    def take(self, emission: Emission) -> None:
        """Note an emission."""
        assert not self.ends, f"{emission.finish or emission.token} after {self.ends}"
        if emission.token is not None:
            self.tokens.append(emission.token)
        if emission.finish is not None:
            self.ends.append(emission.finish)


def play(batch: "Batch", rows: Rows[Row], meanwhile: Callable[[int], None] = lambda _: None) -> list[Outcome]:
    """Run rows through an empty batch until each has ended, and return what became of them.

    `meanwhile` is called before each step, with its number.
    Fails if the batch gets nowhere, if anything is left in it, or if it had to mend something: a batch that
    begins again from the tokens would be exact all the same.
    """
    sequences = [row.sequence() for row in rows]
    outcomes = {sequence: Outcome() for sequence in sequences}
    with _nothing_to_complain_about():
        for step in range(_more_steps_than_needed(rows)):
            for row, sequence in zip(rows, sequences, strict=True):
                if step == row.joins:
                    batch.add(sequence)
                if row.leaves_after is not None and step == row.joins + row.leaves_after:
                    _cancel(batch, sequence, outcomes[sequence])
            meanwhile(step)
            for emission in batch.step() if len(batch) else []:
                outcomes[emission.sequence].take(emission)
            if all(outcome.ends for outcome in outcomes.values()):
                break
    assert len(batch) == 0
    return [outcomes[sequence] for sequence in sequences]


def play_alone(module: Any, row: Row) -> Outcome:
    """Return what becomes of a row that has a fresh batch for itself and is not cancelled."""
    alone = Row(row.prompt, row.max_tokens, row.sampling, row.stops)
    return play(make_batch(module, 64), [alone])[0]


def _cancel(batch: "Batch", sequence: Sequence, outcome: Outcome) -> None:
    running = not outcome.ends
    assert batch.remove(sequence) is running
    if running:
        outcome.ends.append("cancelled")


def _more_steps_than_needed(rows: Rows[Row]) -> int:
    """Return what suffices in any order of work: one row after the other, a token of prompt a step."""
    return max(row.joins for row in rows) + sum(len(row.prompt) + row.max_tokens + 5 for row in rows)


@contextmanager
def _nothing_to_complain_about() -> Generator[None]:
    complaints: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: complaints.append(record.getMessage())
    log = logging.getLogger("engine")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
    assert not complaints
