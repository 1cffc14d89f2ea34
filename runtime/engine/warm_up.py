"""Running a model once before anybody waits for it, in the shapes that will come.

On a GPU the first use of a kernel compiles or loads it, which takes seconds. On a CPU there is nothing to
compile, and what one pass touches has been touched when the model's footprint was measured.
"""

import time

from .batch import Batch
from .sequence import Sampling, Sequence

_LENGTHS = (2, 40, 300)
_SAMPLINGS = (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.9))
_TOKENS = 4


def warm_up(batch: Batch, device: str) -> float:
    """Run sequences of one and of many chunks, alone and together, greedy and sampled.

    Returns:
        milliseconds spent.
    """
    began = time.monotonic()
    if device != "cpu":
        for length in (*_LENGTHS, batch.prefill_chunk_tokens):
            _run(batch, [_sequence(length, Sampling())])
        for sampling in _SAMPLINGS:
            _run(batch, [_sequence(length, sampling) for length in _LENGTHS])
    return (time.monotonic() - began) * 1000


def _run(batch: Batch, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        batch.add(sequence)
    while len(batch):
        batch.step()


def _sequence(length: int, sampling: Sampling) -> Sequence:
    return Sequence("", [0] * length, _TOKENS, sampling, frozenset(), lambda _: None)
