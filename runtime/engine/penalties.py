"""What changes logits before a token is chosen: three penalties and a bias, for the rows that have them.

Inference thread only. Both take the logits of a whole decode batch and leave the other rows as they are. What
needs the vocabulary's size is built at the first call.
"""

from typing import NamedTuple

import mlx.core as mx

from .sequence import Sampling, Sequence


class Penalties:
    """Repetition penalty over prompt and answer (Keskar et al., 2019); the other two over the answer.

    What was answered is counted on the device, from the tokens just chosen, so that nobody waits for them.
    """

    def __init__(self, rows: list[Sequence]) -> None:
        self._rows = [row for row, sequence in enumerate(rows) if _has_penalty(sequence.sampling)]
        self._samplings = [rows[row].sampling for row in self._rows]
        self._histories = [(rows[row].prompt, list(rows[row].tokens)) for row in self._rows]
        self._seen: _Seen | None = None
        self._parameters: _Parameters | None = None

    def __len__(self) -> int:
        """Return how many rows have a penalty."""
        return len(self._rows)

    def __call__(self, logits: mx.array) -> mx.array:
        """Return logits (B, V), penalized."""
        if not self._rows:
            return logits
        if self._seen is None:
            self._seen = _Seen.of(self._histories, logits.shape[-1])
        if self._parameters is None:
            self._parameters = _Parameters.of(self._rows, self._samplings)
        where, _, *factors = self._parameters
        if len(self._rows) == len(logits):
            return _penalized(logits, *self._seen, *factors)
        penalized = logits[:]
        penalized[where] = _penalized(logits[where], *self._seen, *factors)
        return penalized

    def count(self, tokens: mx.array) -> None:
        """Take in the tokens (B,) that were chosen from what the last call returned."""
        if self._seen is not None and self._parameters is not None:
            chosen = tokens[self._parameters.rows]
            counts = self._seen.counts.at[self._parameters.places, chosen].add(1.0)
            self._seen = self._seen._replace(counts=counts)

    def extend(self, other: "Penalties", behind: int) -> None:
        """Take in the rows of `other`, behind our `behind` rows. It is used up."""
        self._seen = self._seen_with(other)
        self._rows += [behind + row for row in other._rows]
        self._samplings += other._samplings
        self._histories += other._histories
        self._parameters = None

    def keep(self, indices: list[int]) -> None:
        """Keep these rows of the batch, in this order."""
        if not self._rows:
            return
        places = {row: place for place, row in enumerate(self._rows)}
        stay = [places[row] for row in indices if row in places]
        self._rows = [row for row, index in enumerate(indices) if index in places]
        self._samplings = [self._samplings[place] for place in stay]
        self._histories = [self._histories[place] for place in stay]
        if self._seen is not None:
            self._seen = _Seen(*(part[mx.array(stay)] for part in self._seen)) if stay else None
        self._parameters = None

    def _seen_with(self, other: "Penalties") -> "_Seen | None":
        known = self._seen or other._seen
        if known is None:
            return None
        vocabulary = known.counts.shape[-1]
        parts = [rows._seen or _Seen.of(rows._histories, vocabulary) for rows in (self, other) if rows._rows]
        return _Seen(*(mx.concatenate(list(both)) for both in zip(*parts, strict=True)))


class _Seen(NamedTuple):
    """What the penalized rows hold: (R, V) each, whether the prompt has a token and how often the answer."""

    in_prompt: mx.array
    counts: mx.array

    @classmethod
    def of(cls, histories: list[tuple[list[int], list[int]]], vocabulary: int) -> "_Seen":
        prompts = [_count(prompt, vocabulary) > 0 for prompt, _ in histories]
        answers = [_count(tokens, vocabulary) for _, tokens in histories]
        return cls(mx.stack(prompts), mx.stack(answers))


class _Parameters(NamedTuple):
    """The penalized rows' places in the batch and among themselves, (R,); their penalties, (R, 1) each."""

    rows: mx.array
    places: mx.array
    repetition: mx.array
    presence: mx.array
    frequency: mx.array

    @classmethod
    def of(cls, rows: list[int], samplings: list[Sampling]) -> "_Parameters":
        return cls(
            mx.array(rows),
            mx.arange(len(rows)),
            mx.array([[sampling.repetition_penalty] for sampling in samplings]),
            mx.array([[sampling.presence_penalty] for sampling in samplings]),
            mx.array([[sampling.frequency_penalty] for sampling in samplings]),
        )


class LogitBiases:
    """Adds constants to the logits of some tokens, for the rows that ask for it."""

    def __init__(self, rows: list[Sequence]) -> None:
        biases = {row: sequence.sampling.logit_bias for row, sequence in enumerate(rows)}
        self._biases = {
            row: (mx.array(list(bias.keys())), mx.array(list(bias.values())))
            for row, bias in biases.items()
            if bias
        }
        self._all: tuple[mx.array, mx.array, mx.array] | None = None

    def __call__(self, logits: mx.array) -> mx.array:
        """Return logits (B, V) with the biases added."""
        if not self._biases:
            return logits
        if self._all is None:
            tokens, values = (
                mx.concatenate(list(parts)) for parts in zip(*self._biases.values(), strict=True)
            )
            rows = [mx.full(len(tokens), row) for row, (tokens, _) in self._biases.items()]
            self._all = mx.concatenate(rows), tokens, values.astype(logits.dtype)
        rows, tokens, values = self._all
        return logits.at[rows, tokens].add(values)

    def extend(self, other: "LogitBiases", behind: int) -> None:
        """Take in the rows of `other`, behind our `behind` rows. It is used up."""
        self._biases |= {behind + row: bias for row, bias in other._biases.items()}
        self._all = None

    def keep(self, indices: list[int]) -> None:
        """Keep these rows of the batch, in this order."""
        self._biases = {
            row: self._biases[index] for row, index in enumerate(indices) if index in self._biases
        }
        self._all = None


@mx.compile
def _penalized(
    logits: mx.array,
    in_prompt: mx.array,
    counts: mx.array,
    repetition: mx.array,
    presence: mx.array,
    frequency: mx.array,
) -> mx.array:
    answered = counts > 0
    scores = logits.astype(mx.float32)
    repeated = mx.where(scores > 0, scores / repetition, scores * repetition)
    scores = mx.where(in_prompt | answered, repeated, scores)
    return (scores - presence * answered - frequency * counts).astype(logits.dtype)


def _has_penalty(sampling: Sampling) -> bool:
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    return penalties != (1, 0, 0)


def _count(tokens: list[int], vocabulary: int) -> mx.array:
    zeros = mx.zeros(vocabulary)
    return zeros.at[mx.array(tokens)].add(1.0) if tokens else zeros
