"""A batch of sequences that decode together: one forward pass gives each its next token.

The next step is handed to the device before the tokens of the last one are read, so that the host works while
the device does. A sequence that ended is therefore in one more step, whose token for it is not looked at.
"""

from collections.abc import Container
from typing import Any, NamedTuple, cast

import mlx.core as mx

from .row_sampler import RowSampler
from .rows import Rows
from .sequence import Sequence

_EVALUATE_ALL_EVERY = 64
"""Steps after which also the arrays are evaluated that no output needs. In recurrent caches each step would
otherwise add to a graph that nothing ever runs."""


class Chosen(NamedTuple):
    """What one step gave one sequence. `usable` is false if its logits were not numbers."""

    sequence: Sequence
    token: int
    usable: bool


class _Step(NamedTuple):
    sequences: list[Sequence]
    chosen: mx.array


class DecodeBatch:
    """Rows of one model that advance together. Inference thread only.

    An exception out of any method leaves it in no state to go on: its sequences must begin again.
    """

    def __init__(self, model: Any, sequences: list[Sequence], rows: Rows) -> None:
        """Begin with `rows` that hold each sequence's tokens but the last one."""
        self.sequences = sequences
        self.rows = rows
        self._model = model
        self._sampler = RowSampler(sequences)
        self._inputs = mx.array([sequence.last_token for sequence in sequences])
        self._asked = [len(sequence.tokens) for sequence in sequences]
        self._dispatched: list[_Step] = []
        self._unread: list[_Step] = []
        self._steps = 0

    def settle(self, live: Container[Sequence]) -> bool:
        """Drop the sequences that have ended or will have with what is unread; return whether any is left."""
        stay = [
            row
            for row, (sequence, asked) in enumerate(zip(self.sequences, self._asked, strict=True))
            if sequence in live and asked < sequence.max_tokens
        ]
        if stay and len(stay) < len(self.sequences):
            self.rows.keep(stay)
            self._sampler.keep(stay)
            self._inputs = self._inputs[mx.array(stay)]
        if len(stay) < len(self.sequences):
            self.sequences = [self.sequences[row] for row in stay]
            self._asked = [self._asked[row] for row in stay]
        return bool(stay)

    def dispatch(self) -> None:
        """Hand the next step to the device."""
        self._steps += 1
        logits = self._model(self._inputs[:, None], cache=self.rows.layers)[:, -1]
        chosen = self._sampler(logits)
        self._inputs = chosen[0]
        self._asked = [asked + 1 for asked in self._asked]
        others = self.rows.arrays() if self._steps % _EVALUATE_ALL_EVERY == 0 else ()
        mx.async_eval(chosen, *others)
        self._dispatched.append(_Step(self.sequences, chosen))

    def read(self) -> list[Chosen]:
        """Return what the steps before the last dispatched one gave, waiting for them."""
        steps, self._unread, self._dispatched = self._unread, self._dispatched, []
        return [chosen for step in steps for chosen in _read(step)]

    def awaits(self, live: Container[Sequence]) -> bool:
        """Return whether what is unread holds anything for a sequence in `live`."""
        return any(sequence in live for step in self._unread for sequence in step.sequences)

    def join(self, other: "DecodeBatch") -> None:
        """Take in the rows of another batch, and what of it is unread. It is used up."""
        self._unread += other._unread
        self.rows.join(other.rows)
        self._sampler.extend(other._sampler)
        self._inputs = mx.concatenate([self._inputs, other._inputs])
        self._asked += other._asked
        self.sequences = [*self.sequences, *other.sequences]


def _read(step: _Step) -> list[Chosen]:
    tokens, flaws = cast(list[list[int]], step.chosen.tolist())
    return [
        Chosen(sequence, token, not flaw)
        for sequence, token, flaw in zip(step.sequences, tokens, flaws, strict=True)
    ]
