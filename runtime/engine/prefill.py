"""Prompts on their way into the caches, a chunk at a time, up to their last token.

Prompts of like length go together, padded on the right: what is causal never looks there, so attention stays
on its fast path, and rows that end early are moved to the common end once, when all is done.
"""

import time
from collections import deque
from collections.abc import Container
from typing import Any

import mlx.core as mx

from .chunks import Chunks
from .rows import Rows
from .sequence import Sequence

LEAST_TO_HALVE = 48
"""Tokens, over all rows, from which on two halves are faster than one pass over the weights."""

_OTHER_STREAM = mx.new_thread_local_stream(mx.cpu)


class Prefill:
    """Some sequences whose tokens, all but the last, go through the model. Inference thread only."""

    def __init__(self, model: Any, sequences: list[Sequence], chunks: Chunks) -> None:
        """Begin; nothing is handed to the device yet."""
        self.sequences = sequences
        self._chunks = chunks
        self._model = model
        self._rows = Rows(model, len(sequences))
        self._lengths = [sequence.length - 1 for sequence in sequences]
        longest = max(self._lengths)
        known = [[*sequence.prompt, *sequence.tokens][:-1] for sequence in sequences]
        self._tokens = mx.array([tokens + [0] * (longest - len(tokens)) for tokens in known], mx.int32)
        self._done = 0
        self._size = 0
        self._handed = (0, 0)
        now = time.monotonic()
        for sequence in sequences:
            sequence.started_at = sequence.started_at or now

    @property
    def remaining(self) -> int:
        """Positions that are still to be gone through, in each row."""
        return max(self._tokens.shape[1] - self._done, 0)

    def advance(self, tokens: int) -> int:
        """Hand the next part of the work to the device and return how many tokens it is worth, over all rows.

        That is a chunk of about `tokens`, or the share of a longer one that they are, but at least a layer.
        """
        # Not more than one part ahead of the device: what is under way cannot be cancelled.
        mx.eval(self._rows.arrays(*self._handed))
        layers, begin = len(self._rows.layers), self._handed[1] % len(self._rows.layers)
        if begin == 0:
            self._begin_chunk(tokens)
        worth = self._size * len(self.sequences)
        end = min(begin + self._chunks.layers(tokens / worth, layers), layers)
        mx.async_eval(self._rows.arrays(begin, end))
        self._handed = (begin, end)
        if end == layers:
            self._done += self._size
        return worth * end // layers - worth * begin // layers

    def _begin_chunk(self, most: int) -> None:
        self._size = self._chunks.next_length(self.remaining, len(self.sequences), most)
        chunk = self._tokens[:, self._done : self._done + self._size]
        if chunk.shape[1] < self._size:
            chunk = mx.pad(chunk, [(0, 0), (0, self._size - chunk.shape[1])])
        if not self._chunks.halved or self._size == 1 or chunk.size < LEAST_TO_HALVE:
            self._model(chunk, cache=self._rows.layers)
            return
        half = self._size // 2
        self._model(chunk[:, :half], cache=self._rows.layers)
        with mx.stream(_OTHER_STREAM):
            self._model(chunk[:, half:], cache=self._rows.layers)

    def finish(self) -> Rows:
        """Return the caches, which hold every token but the last."""
        self._rows.end_at(self._lengths)
        return self._rows


def next_together(
    waiting: deque[Sequence], most_tokens: int, alone: Container[Sequence], *, any_number: bool = False
) -> list[Sequence]:
    """Take the first sequence out of the line, and those behind it whose length makes them good company.

    Together they have at most `most_tokens` positions, padding included; none has more than twice the tokens
    of another, and none is in `alone`. They are a power of two unless `any_number` will do.
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
    while not any_number and len(taken) & (len(taken) - 1):
        waiting.appendleft(taken.pop())
    return taken
