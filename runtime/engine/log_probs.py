"""How likely the model found the tokens that a step chose, for the rows that ask.

Computed with the step and read with its tokens, when the next step has been dispatched: so nobody waits for
them, and a batch in which nobody asks computes none. Inference thread only.
"""

from typing import Any, cast

import mlx.core as mx

from .sequence import LogProbs, Sequence

MOST = 20
"""As many likeliest tokens are found for a row that asks for any: one shape for the device."""


class RowLogProbs:
    """Log-probabilities of one step, on their way from the device."""

    def __init__(self, rows: dict[int, int], logits: mx.array, tokens: mx.array) -> None:
        """Begin: `rows` maps those that ask to how many likeliest tokens they want; logits are (B, V)."""
        self._rows = rows
        asking = mx.array(list(rows))
        logits = logits[asking].astype(mx.float32)
        total = mx.logsumexp(logits, axis=-1, keepdims=True)
        self._chosen = mx.take_along_axis(logits, tokens[asking][:, None], axis=-1) - total
        self._top: tuple[mx.array, ...] = ()
        if any(rows.values()):
            most = min(MOST, logits.shape[-1])
            ids = mx.argpartition(-logits, most - 1, axis=-1)[:, :most]
            self._top = (ids, mx.take_along_axis(logits, ids, axis=-1) - total)

    @classmethod
    def of(cls, slots: list[Sequence | None], logits: mx.array, tokens: mx.array) -> "RowLogProbs | None":
        """Return those of a step, or None if no slot's sequence asks."""
        rows = {
            row: sequence.log_probs
            for row, sequence in enumerate(slots)
            if sequence is not None and sequence.log_probs is not None
        }
        return cls(rows, logits, tokens) if rows else None

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What is to be evaluated."""
        return (self._chosen, *self._top)

    def read(self) -> dict[int, LogProbs]:
        """Return them by row, waiting for the device. Among equally likely tokens lower ids come first."""
        chosen = cast(list[list[float]], self._chosen.tolist())
        top: list[list[tuple[int, float]]] = [[] for _ in chosen]
        if self._top:
            ids, log_probs = (cast(list[list[Any]], array.tolist()) for array in self._top)
            top = [list(zip(*row, strict=True)) for row in zip(ids, log_probs, strict=True)]
        return {
            row: LogProbs(of_token, sorted(likeliest, key=_likeliest_first)[:count])
            for (row, count), [of_token], likeliest in zip(self._rows.items(), chosen, top, strict=True)
        }


def _likeliest_first(candidate: tuple[int, float]) -> tuple[float, int]:
    token, log_prob = candidate
    return -log_prob, token
