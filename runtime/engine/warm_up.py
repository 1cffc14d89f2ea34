"""Running a model once before anybody waits for it, in the shapes that will come.

On a GPU the first use of a kernel compiles or loads it, which takes seconds, and on CUDA cuDNN plans for
every new shape of a chunk and its depth. On a CPU there is nothing to compile, and what one pass touches has
been touched when the footprint of the model was measured.
"""

from collections.abc import Generator

import mlx.core as mx

from .device import memory_bytes
from .log_probs import MOST
from .model_batch import ModelBatch
from .rows import Rows
from .sequence import Sampling, Sequence

_LENGTHS = (2, 40, 300)
_SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_p=0.5),
    Sampling(presence_penalty=1.0),
)
_TOKENS = 4
_ROWS = (2, 4, 8, 16, 32)
_DEPTH = 16384
"""How far into a prompt the plans for chunks are made; further on they are made as they come."""


def warm_up(batch: ModelBatch, device: str) -> Generator[None]:
    """Run sequences of one and of many chunks, alone and together, greedy and sampled.

    Yields after each step, so that other models can have theirs in between.
    """
    if device == "cpu":
        return
    if batch.chunks.shapes:
        yield from _plan(batch)
    for length in (*_LENGTHS, batch.prefill_chunk_tokens):
        yield from _run(batch, [_sequence(length, Sampling())])
    for sampling in _SAMPLINGS:
        yield from _run(batch, [_sequence(2, sampling)])
        yield from _run(batch, [_sequence(length, sampling) for length in _LENGTHS])
    yield from _run(batch, [_sequence(2, sampling) for sampling in _SAMPLINGS])
    yield from _run(batch, [_sequence(length, Sampling(), log_probs=MOST) for length in _LENGTHS])
    for rows in _ROWS:
        yield from _run(batch, [_sequence(_LENGTHS[1], Sampling()) for _ in range(rows)])
    # What has been measured is mostly the time of compilers.
    batch.pace.forget()


def _plan(batch: ModelBatch) -> Generator[None]:
    rows = Rows(batch.model)
    # Caches are copied as they grow; where there is little room they are not made to.
    room = (memory_bytes() - batch.footprint.weights) // (4 * batch.footprint.kv_per_token)
    for depth in range(0, min(_DEPTH, room), batch.chunks.shapes[-1]):
        for shape in batch.chunks.shapes:
            rows.end_at([depth])
            batch.model(mx.zeros((1, shape), mx.int32), cache=rows.layers)
            mx.eval(rows.arrays())
            yield


def _run(batch: ModelBatch, sequences: list[Sequence]) -> Generator[None]:
    for sequence in sequences:
        batch.add(sequence)
    while len(batch):
        batch.step()
        yield


def _sequence(length: int, sampling: Sampling, log_probs: int | None = None) -> Sequence:
    tokens = [0] * length
    return Sequence("", tokens, _TOKENS, sampling, frozenset(), lambda _: None, log_probs=log_probs)
