"""Prompts on their way into the caches, a chunk at a time, up to their last token.

Prompts of like length go together, padded on the right: what is causal never looks there, so attention stays
on its fast path, and rows that end early are moved to the common end once, when all is done.
"""

import time
from collections import deque
from collections.abc import Container
from typing import Any

import mlx.core as mx

from .rows import Rows
from .sequence import Sequence

CUDA_SHAPES = (128, 512, 2048)
"""Lengths of chunks on CUDA, where cuDNN plans for every new shape, for up to 0.1 s."""


class Prefill:
    """Some sequences whose tokens, all but the last, go through the model. Inference thread only."""

    def __init__(self, model: Any, sequences: list[Sequence], shapes: tuple[int, ...] = ()) -> None:
        """Begin. Chunks have one of the lengths `shapes`, the last one padded, or any if there are none."""
        self.sequences = sequences
        self._shapes = shapes
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
        return max(self._tokens.shape[1] - self._done, 0)

    def advance(self, tokens: int) -> int:
        """Hand the next chunk to the device, at most `tokens` over all rows; return how many those are."""
        # Not more than one chunk ahead of the device: what is under way cannot be cancelled.
        mx.eval(self._rows.arrays())
        size = self._size(max(tokens // len(self.sequences), 1))
        chunk = self._tokens[:, self._done : self._done + size]
        if chunk.shape[1] < size:
            chunk = mx.pad(chunk, [(0, 0), (0, size - chunk.shape[1])])
        self._model(chunk, cache=self._rows.layers)
        mx.async_eval(self._rows.arrays())
        self._done += size
        return size * len(self.sequences)

    def _size(self, most: int) -> int:
        # A chunk costs a pass over the weights, however short: no small rest is left for another.
        limit = most + most // 2
        if not self._shapes:
            return self.remaining if self.remaining <= limit else most
        # A plan is for a depth as well. Chunks at multiples of their length find those that are there.
        aligned = [shape for shape in self._shapes if self._done % shape == 0]
        fitting = [shape for shape in aligned if shape <= limit] or aligned[:1]
        return next((shape for shape in fitting if shape >= self.remaining), fitting[-1])

    def finish(self) -> Rows:
        """Return the caches, which hold every token but the last."""
        self._rows.end_at(self._lengths)
        return self._rows


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
    # As few numbers of rows as lengths of chunks, and for the same reason.
    while len(taken) & (len(taken) - 1):
        waiting.appendleft(taken.pop())
    return taken
