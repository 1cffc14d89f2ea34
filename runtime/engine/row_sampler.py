"""The next token of every row of a decode batch, in one call, each row with its own parameters.

Inference thread only. Nothing here reads a value back, so that the next step can be handed to the device
before the tokens of this one are known.
"""

import math
from typing import NamedTuple

import mlx.core as mx

from .penalties import LogitBiases, Penalties
from .sequence import Sampling, Sequence

_COLDEST = 2.0**-126
"""The smallest normal float32: a temperature below it would become 0 on some devices."""

_FEW = 128
"""Up to this top-k that many candidates are sorted, else the vocabulary: a row's own parameters decide, not
those of the others."""


class RowSampler:
    """Chooses the next token of every row of a decode batch in one call.

    A row's token depends on its own logits, parameters and history; a draw also on its seed and on how many
    tokens its answer has. It does not depend on the other rows, or on how often the row was moved or rebuilt.
    """

    def __init__(self, rows: list[Sequence]) -> None:
        self._rows = [_Row(row.sampling, _mixed(row.sampling.seed), len(row.tokens)) for row in rows]
        self._penalties = Penalties(rows)
        self._biases = LogitBiases(rows)
        self._choice: _Choice | None = None
        self._calls = 0

    def __call__(self, logits: mx.array) -> mx.array:
        """Return int32 (2, B) for logits (B, V): tokens, and 1 where a row's logits are not usable, else 0.

        They are not if one is NaN or +inf, or all are -inf. The token is a valid id even then.
        """
        logits = self._biases(self._penalties(logits))
        if self._choice is None:
            self._choice = _Choice(self._rows, logits.shape[-1])
        chosen = self._choice(logits)
        if self._penalties:
            self._penalties.count(chosen[0])
        self._calls += 1
        return chosen

    def extend(self, other: "RowSampler") -> None:
        """Take in the rows of `other`, behind our own. It is used up."""
        self._penalties.extend(other._penalties, len(self._rows))
        self._biases.extend(other._biases, len(self._rows))
        self._change([*self._advanced(), *other._advanced()])

    def keep(self, indices: list[int]) -> None:
        """Keep these rows, in this order."""
        self._penalties.keep(indices)
        self._biases.keep(indices)
        rows = self._advanced()
        self._change([rows[index] for index in indices])

    def _advanced(self) -> list["_Row"]:
        return [row._replace(position=row.position + self._calls) for row in self._rows]

    def _change(self, rows: list["_Row"]) -> None:
        self._rows, self._calls, self._choice = rows, 0, None


class _Row(NamedTuple):
    """What the draws of a row are made of; `position` is the length of its answer."""

    sampling: Sampling
    mixed_seed: int
    position: int

    @property
    def key(self) -> list[int]:
        """The key of the next draw. Threefry needs no more than that two keys differ in one bit."""
        return [self.mixed_seed >> 32, (self.mixed_seed + self.position) % 2**32]


class _Choice:
    """How the rows of one batch choose, until it changes: parameters and next keys, on the device."""

    def __init__(self, rows: list[_Row], vocabulary: int) -> None:
        drawing = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
        samplings = [rows[index].sampling for index in drawing]
        self._drawing = mx.array(drawing) if drawing else None
        self._all_draw = len(drawing) == len(rows)
        if not drawing:
            return
        self._keys = mx.array([rows[index].key for index in drawing], dtype=mx.uint32)
        self._next = mx.array([0, 1], dtype=mx.uint32)
        self._temperature = mx.array([[max(s.temperature, _COLDEST)] for s in samplings])
        self._log_min_p = mx.array([[math.log(s.min_p) if s.min_p > 0 else -math.inf] for s in samplings])
        self._no_floor = mx.full((len(drawing), 1), -math.inf)
        few = [index for index, s in enumerate(samplings) if 0 < s.top_k <= _FEW]
        many = [index for index, s in enumerate(samplings) if s.top_k > _FEW or (not s.top_k and s.top_p < 1)]
        self._cuts = [
            _Cut([samplings[index] for index in cut], cut, self._temperature, min(width, vocabulary))
            for cut, width in ((few, _FEW), (many, vocabulary))
            if cut
        ]

    def __call__(self, logits: mx.array) -> mx.array:
        if self._drawing is None:
            return _likeliest(logits)
        if self._all_draw:
            return self._drawn(logits)
        drawn = self._drawn(logits[self._drawing])
        return mx.put_along_axis(_likeliest(logits), self._drawing[None], drawn, axis=1)

    def _drawn(self, logits: mx.array) -> mx.array:
        bits = _random_bits(self._keys, logits.shape[-1])
        self._keys = self._keys + self._next
        floor = self._no_floor
        for cut in self._cuts:
            floor = mx.put_along_axis(floor, cut.rows[:, None], cut.floor(logits[cut.rows]), axis=0)
        return _race(logits, bits, self._temperature, self._log_min_p, floor)


class _Cut:
    """Rows that top-k or top-p cut, and among how many of their highest logits both are decided."""

    def __init__(
        self, samplings: list[Sampling], rows: list[int], temperature: mx.array, candidates: int
    ) -> None:
        self.rows = mx.array(rows)
        self._candidates = candidates
        self._temperature = temperature[self.rows]
        self._top_k = mx.array([[min(s.top_k or candidates, candidates)] for s in samplings])
        self._top_p = mx.array([[s.top_p if s.top_p < 1 else math.inf] for s in samplings])

    def floor(self, logits: mx.array) -> mx.array:
        """Return the lowest logit, float32 (R, 1), that top-k and then top-p let through."""
        highest = logits
        if self._candidates < logits.shape[-1]:
            highest = mx.topk(logits, self._candidates, axis=-1)
        return _floor(logits, mx.sort(highest, axis=-1), self._temperature, self._top_k, self._top_p)


def _random_bits(keys: mx.array, count: int) -> mx.array:
    """Return uint32 (S, count): each row from its key alone, by Threefry (Salmon et al., 2011)."""

    def pairs(key: mx.array) -> mx.array:
        return mx.random.split(key, (count + 1) // 2)

    return mx.flatten(mx.vmap(pairs)(keys), 1)[:, :count]


@mx.compile
def _likeliest(logits: mx.array) -> mx.array:
    return _report(mx.argmax(logits, axis=-1), mx.max(logits, axis=-1))


@mx.compile
def _race(
    logits: mx.array, bits: mx.array, temperature: mx.array, log_min_p: mx.array, floor: mx.array
) -> mx.array:
    """Draw from the softmax of logits / temperature, of those tokens only that reach the floors.

    Tokens arrive after exponential times, each at the rate of its probability, and the first one wins: the
    Gumbel-max trick (Maddison et al., 2014). Unlikely tokens win by very short times; so the times come from
    the end of the uniform numbers that float32 resolves, the one near 0.
    """
    best = mx.max(logits, axis=-1, keepdims=True).astype(mx.float32)
    scores = (logits.astype(mx.float32) - best) / temperature
    uniform = mx.minimum(bits.astype(mx.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    arrived = scores - mx.log(-mx.log1p(-uniform))
    floor = mx.maximum(floor, best + temperature * log_min_p)
    racing = mx.where(logits < floor, -math.inf, arrived)
    return _report(mx.argmax(racing, axis=-1), mx.squeeze(best, -1))


@mx.compile
def _floor(
    logits: mx.array, ascending: mx.array, temperature: mx.array, top_k: mx.array, top_p: mx.array
) -> mx.array:
    """Return the lowest logit, float32 (R, 1), that top-k and then top-p let through; `ascending` has at
    least the top-k.

    Top-p keeps the smallest set of tokens whose probabilities reach p (Holtzman et al., 2020), but always the
    first one. Ties stay. Those with the k-th have a part in the whole even where `ascending` lacks them.
    """
    kth = mx.take_along_axis(ascending, -top_k, axis=-1)
    best = ascending[:, -1:].astype(mx.float32)
    masses = mx.exp((ascending.astype(mx.float32) - best) / temperature)
    masses = mx.where(ascending < kth, 0.0, masses)
    before = mx.cumsum(masses, axis=-1, reverse=True, inclusive=False)
    ties = mx.sum(logits >= kth, axis=-1, keepdims=True) - mx.sum(ascending >= kth, axis=-1, keepdims=True)
    tie = mx.exp((kth.astype(mx.float32) - best) / temperature)
    # Not from a sum of its own: a device may add up one row in another order than several.
    total = before[:, :1] + masses[:, :1] + ties * tie
    kept = mx.maximum(mx.sum(before < top_p * total, axis=-1, keepdims=True), 1)
    return mx.maximum(kth, mx.take_along_axis(ascending, -kept, axis=-1)).astype(mx.float32)


def _report(tokens: mx.array, best: mx.array) -> mx.array:
    # A maximum is NaN if any of its operands is, so this one comparison finds all that is not usable.
    flaws = mx.where(mx.abs(best) < math.inf, 0, 1)
    return mx.where(mx.array([[True], [False]]), tokens.astype(mx.int32), flaws)


def _mixed(seed: int) -> int:
    """Return 64 bits that differ for every seed, neighbours all over (SplitMix64; Steele et al., 2014)."""
    mixed = (seed + 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return mixed ^ mixed >> 31
