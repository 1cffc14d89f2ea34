"""What a network answers alone: the truth that every batch is measured against."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from support.tiny_networks import tiny_network

NEAR_TIE = 1e-4
"""A gap between the two highest logits that rounding may turn around; their spread is 2."""


class Alone:
    """One greedy answer: the whole prompt at once, then a token at a time, in a cache of its own."""

    def __init__(self, module: Any, prompt: Sequence[int]) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        self._module = module
        self._cache = make_prompt_cache(module)
        self._next = mx.array([list(prompt)])
        self._tokens: list[int] = []
        self._gaps: list[float] = []

    def tokens(self, count: int) -> list[int]:
        """Return the first `count` tokens of the answer."""
        while len(self._tokens) < count:
            self._advance()
        return self._tokens[:count]

    def has_near_tie(self, count: int) -> bool:
        """Return whether one of the first `count` tokens was a close call, so that a batch may differ."""
        self.tokens(count)
        return min(self._gaps[:count]) < NEAR_TIE

    def _advance(self) -> None:
        import mlx.core as mx

        logits = self._module(self._next, cache=self._cache)[0, -1].astype(mx.float32)
        self._next = mx.argmax(logits, keepdims=True)[None]
        runner_up, winner = mx.sort(mx.topk(logits, 2)).tolist()
        self._tokens.append(int(self._next.item()))
        self._gaps.append(winner - runner_up)


@cache
def alone(architecture: str, prompt: tuple[int, ...]) -> Alone:
    """Return the answer of a tiny network to a prompt; it is computed as far as it is asked for, once."""
    return Alone(tiny_network(architecture), prompt)


def greedy_without_a_cache(architecture: str, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """Return the likeliest token at each place of `answer`, out of one forward pass that has no cache."""
    import mlx.core as mx

    module: Any = tiny_network(architecture)
    logits = module(mx.array([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
    likeliest: Any = mx.argmax(logits, axis=-1).tolist()
    return likeliest
