"""Prompts on their way into the caches, a chunk at a time, up to their last token.

Prompts of like length go together, padded on the right: what is causal never looks there, so attention stays
on its fast path, and rows that end early are moved to the common end once, when all is done.
"""

import time
from collections import deque
from collections.abc import Container
from typing import Any

import mlx.core as mx

from .decode import DecodeBatch
from .rows import Rows
from .sequence import Sequence


class Prefill:
    """Some sequences whose tokens, all but the last, go through the model. Inference thread only."""

    def __init__(self, model: Any, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self._model = model
        self._rows = Rows(model, len(sequences))
        self._lengths = [sequence.length - 1 for sequence in sequences]
        longest = max(self._lengths)
        known = [[*sequence.prompt, *sequence.tokens][:-1] for sequence in sequences]
        self._tokens = mx.array([tokens + [0] * (longest - len(tokens)) for tokens in known], mx.int32)
        self._done = 0
        now = time.monotonic()
        for sequence in sequences:
            sequence.started_at = sequence.started_at or now

    @property
    def remaining(self) -> int:
        """Positions that are still to be gone through, in each row."""
        return self._tokens.shape[1] - self._done

    def advance(self, tokens: int) -> int:
        """Hand the next chunk to the device, at most `tokens` over all rows; return how many those are."""
        # Not more than one chunk ahead of the device: what is under way cannot be cancelled.
        mx.eval(self._rows.arrays())
        rows = len(self.sequences)
        size = max(tokens // rows, 1)
        # A chunk costs a pass over the weights, however short: no small rest is left for another.
        if self.remaining <= size + size // 2:
            size = self.remaining
        self._model(self._tokens[:, self._done : self._done + size], cache=self._rows.layers)
        mx.async_eval(self._rows.arrays())
        self._done += size
        return size * rows

    def finish(self) -> DecodeBatch:
        """Return the batch that decodes from here."""
        self._rows.end_at(self._lengths)
        return DecodeBatch(self._model, self.sequences, self._rows)


def next_together(waiting: deque[Sequence], most_tokens: int, alone: Container[Sequence]) -> list[Sequence]:
    """Take the first sequence out of the line, and those behind it whose length makes them good company.

    Together they have at most `most_tokens` positions, padding included; none has more than twice the tokens
    of another, and none is in `alone`.
    """
    taken = [waiting.popleft()]
    shortest = longest = taken[0].length
    while waiting and waiting[0] not in alone:
        length = waiting[0].length
        shortest, longest = min(shortest, length), max(longest, length)
        if longest * (len(taken) + 1) > most_tokens or longest > 2 * shortest:
            break
        taken.append(waiting.popleft())
    return taken
