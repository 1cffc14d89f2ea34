"""Sequences of one model, decoded together. The interface is ours; mlx-lm's BatchGenerator does the work."""

import time
from typing import Any, Protocol

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import BatchGenerator, StopSequences

from ..scheduling.memory import Footprint
from .sampling import make_processors, make_sampler
from .sequence import BatchReport, Emission, Sequence


class Batch(Protocol):
    """A set of sequences that advance together, one token a step. Used on the inference thread only."""

    def __len__(self) -> int:
        """Return the number of sequences that wait, prefill or decode."""
        ...

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in; it starts as soon as there is room."""
        ...

    def remove(self, sequence: Sequence) -> bool:
        """Drop a sequence and its KV cache; return whether it was here."""
        ...

    def step(self) -> list[Emission]:
        """Decode one token of every running sequence and prefill one chunk of a waiting one."""
        ...

    def reset(self) -> list[Sequence]:
        """Drop every sequence and its memory, and return those that had not ended."""
        ...

    def report(self) -> BatchReport:
        """Return what is being done; any thread may ask."""
        ...

    @property
    def footprint(self) -> Footprint:
        """What the model and its sequences take."""
        ...

    @property
    def prefill_chunk_tokens(self) -> int:
        """The most prompt tokens that one step takes."""
        ...

    @property
    def prefilled(self) -> int:
        """The prompt tokens that the last step waited for."""
        ...


class MlxLmBatch:
    """The batch over mlx-lm's BatchGenerator.

    An exception out of `step` leaves the generator in no state to go on: the caller resets the batch.
    """

    def __init__(self, model: nn.Module, *, max_sequences: int, prefill_chunk_tokens: int) -> None:
        self._model = model
        self._max_sequences = max_sequences
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._stream = mx.default_stream(mx.default_device())
        self._generator = self._new_generator()
        self._rows: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in; see `Batch`."""
        stops = [[token] for token in sorted(sequence.stop_token_ids)]
        (row,) = self._generator.insert(
            [sequence.prompt],
            max_tokens=[sequence.max_tokens],
            samplers=[make_sampler(sequence.sampling)],
            logits_processors=[make_processors(sequence.sampling, sequence.prompt)],
            stop_sequences=[StopSequences(stops)],
        )
        self._rows[row] = sequence

    def remove(self, sequence: Sequence) -> bool:
        """Drop a sequence; see `Batch`."""
        row = next((row for row, other in self._rows.items() if other is sequence), None)
        if row is None:
            return False
        del self._rows[row]
        with mx.stream(self._stream):
            self._generator.remove([row])
        return True

    def step(self) -> list[Emission]:
        """Advance by one step; see `Batch`."""
        began = time.monotonic()
        prompts, answers = self._generator.next()
        for progress in prompts:
            sequence = self._rows.get(progress.uid)
            if sequence is not None and sequence.started_at is None:
                sequence.started_at = began
        now = time.monotonic()
        return [self._emission(answer, now) for answer in answers if answer.uid in self._rows]

    def reset(self) -> list[Sequence]:
        """Drop every sequence; see `Batch`."""
        left = list(self._rows.values())
        self._rows.clear()
        self._generator.close()
        self._generator = self._new_generator()
        return left

    def _new_generator(self) -> Any:
        # One prompt at a time: prompts of different length in one chunk are padded, then rolled by a copy.
        return BatchGenerator(
            self._model,
            completion_batch_size=self._max_sequences,
            prefill_batch_size=1,
            prefill_step_size=self._prefill_chunk_tokens,
            stream=self._stream,
        )

    def _emission(self, answer: Any, now: float) -> Emission:
        sequence = self._rows[answer.uid]
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        if answer.finish_reason is not None:
            sequence.finished_at = now
            del self._rows[answer.uid]
        token = None if answer.finish_reason == "stop" else answer.token
        return Emission(sequence, token, answer.finish_reason)
