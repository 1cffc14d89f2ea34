"""How prompts are cut into chunks, by what the device is good at."""

import os
import sys
from typing import NamedTuple

import mlx.core as mx

from .pace import Pace

_CUDA_SHAPES = (128, 512, 1024, 2048)
_ROWS_ON_CPU = 8


class Chunks(NamedTuple):
    """What prompts go through a model in. A step takes `most_tokens`, if nobody is decoded meanwhile.

    Chunks without `length` and `shapes` are as long as there is time for. The others are long, and what is
    spread over several steps are the layers: the graph of a chunk is built at once, and each step evaluates
    the caches of a few more layers. So the weights are read once for many tokens, the host hands over a
    little at a time, and few shapes of attention are enough.
    """

    most_tokens: int

    length: int | None = None
    """Tokens of each row in a chunk."""

    shapes: tuple[int, ...] = ()
    """The only numbers of tokens that each row may have in a chunk, where others are dear."""

    rows: int = 1
    """Prompts of a chunk's length that go together."""

    halved: bool = False
    """Whether a chunk goes through in two halves, each on a stream of its own: a layer of the second half
    needs no more of the first than its keys and values in that layer, and follows one layer behind."""

    come_first: bool = False
    """Whether a step begins with the chunk, so that who is through with a prompt has a part in it."""

    slowdown: float = 3.5
    """How many plain steps one with a share of a chunk may take."""

    @property
    def in_layers(self) -> bool:
        """Whether a step may take some layers of a chunk only."""
        return bool(self.length or self.shapes)

    @property
    def most_together(self) -> int:
        """Positions that prompts which go together may have, over all rows."""
        return self.most_tokens * self.rows

    def pace(self) -> Pace:
        """Return what sizes the share of a step."""
        return Pace(self.most_tokens, self.slowdown, passes=0 if self.in_layers else 1)

    def next_length(self, remaining: int, rows: int, most: int) -> int:
        """Return the length of the next chunk in each of `rows`, about `most` if nothing else decides."""
        if self.shapes:
            limit = self.shapes[-1] * 3 // 2 // rows
            fitting = [shape for shape in self.shapes if shape <= limit] or self.shapes[:1]
            return next((shape for shape in fitting if shape >= remaining), fitting[-1])
        # A chunk costs a pass over the weights, however short: no small rest is left for another.
        most = self.length or max(most // rows, 1)
        return remaining if remaining <= most + most // 2 else most

    def layers(self, share: float, layers: int) -> int:
        """Return through how many layers a step takes a chunk of which it has time for a `share`."""
        if share >= 1 or not self.in_layers:
            return layers
        fitting = max(int(share * layers), 1)
        # Every other number of layers is another CUDA graph.
        return 1 << fitting.bit_length() - 1 if self.shapes else fitting


def chunks_for(most_tokens: int, *, plain: bool) -> Chunks:
    """Return the chunks for the device; `plain` says that the model's caches are all plain KV caches."""
    if mx.default_device().type == mx.DeviceType.cpu:
        # Here MLX computes most of what it is handed before it returns: no chunk runs behind a decode step.
        # A stream computes on one processor, matrix products aside. Each further row saves less.
        return Chunks(most_tokens, most_tokens, (), _ROWS_ON_CPU, halved=_processors() > 1, come_first=True)
    if plain and mx.cuda.is_available():
        # cuDNN plans for every new shape and depth, for up to 0.1 s.
        shapes = tuple(shape for shape in _CUDA_SHAPES if shape <= most_tokens) or _CUDA_SHAPES[:1]
        return Chunks(most_tokens, shapes=shapes, slowdown=2.0)
    return Chunks(most_tokens)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
