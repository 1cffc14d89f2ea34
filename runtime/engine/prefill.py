"""Prompts on their way into the caches, a chunk at a time, up to their last token.

Prompts of like length go together, padded on the right: what is causal never looks there, so attention stays
on its fast path, and rows that end early are moved to the common end once, when all is done.

On CUDA and CPUs chunks are long, and what is spread over several steps are the layers: the graph of a chunk
is built at once, and each step evaluates the caches of a few more layers. So the weights are read once for
many tokens, the host hands over a little at a time, and few shapes of attention are enough.

On a CPU a stream computes on one processor, matrix products aside. So a chunk goes through the model in two
halves, each on a stream of its own: a layer of the second half needs no more of the first than its keys and
values in that layer, and follows one layer behind.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Container
from typing import Any

import mlx.core as mx

from .rows import Rows
from .sequence import Sequence

CUDA_SHAPES = (128, 512, 1024, 2048)
"""Lengths of chunks on CUDA, where cuDNN plans for every new shape and depth, for up to 0.1 s."""

LEAST_TO_HALVE = 48
"""Tokens, over all rows, from which on two halves are faster than one pass over the weights."""

_OTHER_STREAM = mx.new_thread_local_stream(mx.cpu)


class Prefill:
    """Some sequences whose tokens, all but the last, go through the model. Inference thread only."""

    def __init__(
        self, model: Any, sequences: list[Sequence], shapes: tuple[int, ...] = (), cpu_length: int = 0
    ) -> None:
        """Begin. Chunks have one of the lengths `shapes`, the last one padded, or on a CPU `cpu_length`, and
        go through some layers at a time; without either they are as long as there is time for.
        """
        self.sequences = sequences
        self._shapes = shapes
        self._cpu_length = cpu_length
        self._halved = cpu_length > 0 and _processors() > 1
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
            self._begin_chunk(max(tokens // len(self.sequences), 1))
        worth = self._size * len(self.sequences)
        share = max(layers * tokens // worth, 1) if self._shapes or self._cpu_length else layers
        if self._shapes:
            # A power of two, for every other number of layers is another CUDA graph.
            share = 1 << share.bit_length() - 1
        end = layers if worth <= tokens else min(begin + share, layers)
        mx.async_eval(self._rows.arrays(begin, end))
        self._handed = (begin, end)
        if end == layers:
            self._done += self._size
        return worth * end // layers - worth * begin // layers

    def _begin_chunk(self, most: int) -> None:
        self._size = self._shape() if self._shapes else self._length(self._cpu_length or most)
        chunk = self._tokens[:, self._done : self._done + self._size]
        if chunk.shape[1] < self._size:
            chunk = mx.pad(chunk, [(0, 0), (0, self._size - chunk.shape[1])])
        if not self._halved or self._size == 1 or chunk.size < LEAST_TO_HALVE:
            self._model(chunk, cache=self._rows.layers)
            return
        half = self._size // 2
        self._model(chunk[:, :half], cache=self._rows.layers)
        with mx.stream(_OTHER_STREAM):
            self._model(chunk[:, half:], cache=self._rows.layers)

    def _length(self, most: int) -> int:
        # A chunk costs a pass over the weights, however short: no small rest is left for another.
        return self.remaining if self.remaining <= most + most // 2 else most

    def _shape(self) -> int:
        most = self._shapes[-1] * 3 // 2 // len(self.sequences)
        fitting = [shape for shape in self._shapes if shape <= most] or self._shapes[:1]
        return next((shape for shape in fitting if shape >= self.remaining), fitting[-1])

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


def _processors() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
