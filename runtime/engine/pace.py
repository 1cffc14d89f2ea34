"""How much prefill fits between two decode steps, so that running streams keep their pace.

A turn with a chunk costs the decode step, time for each token of the chunk and, if the chunk is short, one
more pass over the weights. These are measured as they come, and the chunk is what keeps the turn within a
multiple of a plain step. Where all who decode came together with those who still wait, nobody had a pace yet:
they are paused for longer, because every decode step of a few of them is one more that does not decode all.
"""

_WEIGHT_OF_NEW = 0.25
LEAST_TOKENS = 64
"""Shorter chunks save nothing: the weights are read once for each."""

_BURST_SECONDS = 1.0
"""How long the first of those who came together may be paused for the others."""

_UNKNOWN_TOKENS = 256


class Pace:
    """Measures turns and sizes chunks.

    `slowdown` is how many plain steps a turn with a chunk may take, `passes` how many of them it takes to
    read the weights once more: 0 if only a share of a long chunk comes in a turn.
    """

    def __init__(self, most_tokens: int, slowdown: float = 3.5, passes: int = 1) -> None:
        self._most = most_tokens
        self._slowdown = slowdown
        self._passes = passes
        self._step_seconds: float | None = None
        self._token_seconds: float | None = None

    def tokens(self, *, decoding: bool, together: bool) -> int:
        """Return how many prompt tokens to prefill in the next turn.

        `together` says that all who decode came with those to be prefilled.
        """
        if not decoding:
            return self._most
        if self._step_seconds is None or self._token_seconds is None:
            return self._most if together else min(_UNKNOWN_TOKENS, self._most)
        if together:
            return max(int(_BURST_SECONDS / self._token_seconds), self._most)
        spare = (self._slowdown - 1 - self._passes) * self._step_seconds / self._token_seconds
        return min(max(int(spare) // LEAST_TOKENS * LEAST_TOKENS, LEAST_TOKENS), self._most)

    def forget(self) -> None:
        """Begin to measure anew."""
        self._step_seconds = self._token_seconds = None

    def note(self, seconds: float, prefilled: int, *, decoding: bool) -> None:
        """Take in a turn: how long it took, and for how many prompt tokens it waited."""
        if prefilled:
            passes = (self._step_seconds or 0.0) * (self._passes + decoding)
            self._token_seconds = _blend(
                self._token_seconds, max(seconds - passes, 0.1 * seconds) / prefilled
            )
        elif decoding:
            self._step_seconds = _blend(self._step_seconds, seconds)


def _blend(old: float | None, new: float) -> float:
    # What is far above was likely not ours: the machine was busy with something else.
    return new if old is None else old + _WEIGHT_OF_NEW * (min(new, 2 * old) - old)
