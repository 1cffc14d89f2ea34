"""A batch of sequences that decode together: one forward pass gives each its next token.

The next step is handed to the device before the tokens of the last one are read, so that the host works while
the device does. A sequence that ended is therefore in one more step, whose token for it is not looked at.
"""

from collections.abc import Container
from typing import NamedTuple, cast

import mlx.core as mx

from .log_probs import RowLogProbs
from .row_sampler import RowSampler
from .rows import Rows
from .self_check import Step
from .sequence import LogProbs, Sequence

_EVALUATE_ALL_EVERY = 64
"""Steps after which also the arrays are evaluated that no output needs. In recurrent caches each step would
otherwise add to a graph that nothing ever runs."""


class Chosen(NamedTuple):
    """What one step gave one sequence. `usable` is false if its logits were not numbers."""

    sequence: Sequence
    token: int
    usable: bool
    log_probs: LogProbs | None = None


class _Dispatched(NamedTuple):
    slots: list[Sequence | None]
    chosen: mx.array
    log_probs: RowLogProbs | None


class DecodeBatch:
    """Rows of one model that advance together. Inference thread only.

    A row whose sequence has ended may stay, with nobody in its slot, where that spares the step a new shape.
    An exception out of any method leaves the batch in no state to go on: its sequences must begin again.
    `slots` says whose row each is.
    """

    def __init__(self, step: Step, sequences: list[Sequence], rows: Rows) -> None:
        """Begin with `rows` that hold each sequence's tokens but the last one."""
        self.rows = rows
        self.step = step
        self.slots: list[Sequence | None] = list(sequences)
        self._sampler = RowSampler(sequences)
        self._inputs = mx.array([sequence.last_token for sequence in sequences])
        self._asked = [len(sequence.tokens) for sequence in sequences]
        self._dispatched: list[_Dispatched] = []
        self._unread: list[_Dispatched] = []
        self._steps = 0

    @property
    def sequences(self) -> list[Sequence]:
        """Whoever is decoded here."""
        return [sequence for sequence in self.slots if sequence is not None]

    def settle(self, live: Container[Sequence]) -> bool:
        """Drop the sequences that have ended or will have with what is unread; return whether any is left."""
        self.slots = [
            sequence if sequence is not None and sequence in live and asked < sequence.max_tokens else None
            for sequence, asked in zip(self.slots, self._asked, strict=True)
        ]
        return any(self.slots)

    def arrange(self) -> None:
        """Give up rows that nobody needs, or add some, so that the step has a shape that it likes."""
        taken = [row for row, sequence in enumerate(self.slots) if sequence is not None]
        count = self.step.rows_for(len(taken))
        if count == len(self.slots):
            return
        rows = taken + taken[:1] * (count - len(taken))
        self.rows.keep(rows)
        self._sampler.keep(rows)
        self._inputs = self._inputs[mx.array(rows)]
        self._asked = [self._asked[row] for row in rows]
        self.slots = [self.slots[row] for row in taken] + [None] * (count - len(taken))

    def dispatch(self) -> None:
        """Hand the next step to the device."""
        self._steps += 1
        logits = self.step(self._inputs, self.rows)
        chosen = self._sampler(logits)
        log_probs = RowLogProbs.of(self.slots, logits, chosen[0])
        self._inputs = chosen[0]
        self._asked = [asked + 1 for asked in self._asked]
        others = self.rows.arrays() if self._steps % _EVALUATE_ALL_EVERY == 0 else ()
        mx.async_eval(chosen, *(log_probs.arrays if log_probs else ()), *others)
        self._dispatched.append(_Dispatched(self.slots, chosen, log_probs))

    def read(self, *, last: bool = False) -> list[Chosen]:
        """Return what the steps before the last dispatched one gave, or that one also, waiting for them."""
        steps, self._unread, self._dispatched = self._unread, self._dispatched, []
        if last:
            steps, self._unread = steps + self._unread, []
        return [chosen for step in steps for chosen in _read(step)]

    def awaits(self, live: Container[Sequence]) -> bool:
        """Return whether what is unread holds anything for a sequence in `live`."""
        return any(
            sequence is not None and sequence in live for step in self._unread for sequence in step.slots
        )

    def join(self, other: "DecodeBatch") -> None:
        """Take in the rows of another batch, and what of it is unread. It is used up."""
        self._unread += other._unread
        self.rows.join(other.rows)
        self._sampler.extend(other._sampler)
        self._inputs = mx.concatenate([self._inputs, other._inputs])
        self._asked += other._asked
        self.slots = [*self.slots, *other.slots]


def _read(step: _Dispatched) -> list[Chosen]:
    tokens, flaws = cast(list[list[int]], step.chosen.tolist())
    log_probs = step.log_probs.read() if step.log_probs else {}
    return [
        Chosen(sequence, token, not flaw, log_probs.get(row))
        for row, (sequence, token, flaw) in enumerate(zip(step.slots, tokens, flaws, strict=True))
        if sequence is not None
    ]
