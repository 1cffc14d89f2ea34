"""Choosing the next token of one row: penalties on logits, then a draw from log-probabilities.

Runs on the inference thread. Everything stays on the device: nothing here reads a value back.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from .sequence import Sampling

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]


def make_sampler(sampling: Sampling) -> Sampler:
    """Return log-probabilities (1, V) -> token (1,). All greedy rows share one object, so they batch."""
    return greedy if sampling.temperature == 0 else SeededSampler(sampling)


def greedy(logprobs: mx.array) -> mx.array:
    """Return the likeliest token of each row: (B, V) -> (B,)."""
    return mx.argmax(logprobs, axis=-1)


class SeededSampler:
    """Draws with a chain of keys of its own, so a seed gives one text whatever else is in the batch."""

    def __init__(self, sampling: Sampling) -> None:
        self._key = mx.random.key(sampling.seed)
        self._temperature = mx.array(sampling.temperature)
        self._top_p = mx.array(sampling.top_p)
        self._min_p = mx.array(sampling.min_p)
        self._draw = _compiled_draw(sampling.top_k, sampling.top_p < 1, sampling.min_p > 0)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Return a token (1,) for log-probabilities (1, V)."""
        self._key, key = mx.random.split(self._key)
        return self._draw(logprobs, key, self._temperature, self._top_p, self._min_p)


@lru_cache(maxsize=64)
def _compiled_draw(top_k: int, has_top_p: bool, has_min_p: bool) -> Callable[..., mx.array]:
    def draw(
        logprobs: mx.array, key: mx.array, temperature: mx.array, top_p: mx.array, min_p: mx.array
    ) -> mx.array:
        scores = logprobs.astype(mx.float32) / temperature
        if top_k:
            scores = keep_top_k(scores, top_k)
        if has_top_p:
            scores = keep_top_p(scores, top_p)
        if has_min_p:
            scores = keep_min_p(scores, min_p)
        return mx.random.categorical(scores, key=key)

    compiled: Any = mx.compile(draw)
    return compiled


def keep_top_k(scores: mx.array, k: int) -> mx.array:
    """Mask all but the k highest scores of each row; ties with the k-th stay."""
    threshold = mx.min(mx.topk(scores, k, axis=-1), axis=-1, keepdims=True)
    return mx.where(scores < threshold, -mx.inf, scores)


def keep_top_p(scores: mx.array, p: mx.array) -> mx.array:
    """Mask all but the smallest set of tokens whose probabilities reach p (Holtzman et al., 2020)."""
    probabilities = mx.softmax(scores, axis=-1)
    descending = -mx.sort(-probabilities, axis=-1)
    mass_before = mx.cumsum(descending, axis=-1) - descending
    # The first token always stays: the mass before it is 0, and p = 0 asks for it alone.
    kept = mx.maximum(mx.sum(mass_before < p, axis=-1, keepdims=True), 1)
    threshold = mx.take_along_axis(descending, kept - 1, axis=-1)
    return mx.where(probabilities < threshold, -mx.inf, scores)


def keep_min_p(scores: mx.array, p: mx.array) -> mx.array:
    """Mask tokens less likely than p times the likeliest one."""
    return mx.where(scores < mx.max(scores, axis=-1, keepdims=True) + mx.log(p), -mx.inf, scores)


def make_processors(sampling: Sampling, prompt: list[int]) -> list[Processor]:
    """Return what changes the logits of this row before sampling; empty for most requests."""
    penalized = (
        sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
    )
    processors: list[Processor] = [Penalties(sampling, prompt)] if penalized else []
    if sampling.logit_bias:
        processors.append(LogitBias(sampling.logit_bias))
    return processors


class Penalties:
    """Repetition penalty over prompt and answer (Keskar et al., 2019); the other two over the answer.

    Counts live on the device and grow by the newest token of each call.
    """

    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self._sampling = sampling
        self._prompt = prompt
        self._in_prompt: mx.array | None = None
        self._counts: mx.array | None = None

    def __call__(self, context: mx.array, logits: mx.array) -> mx.array:
        """Return penalized logits (1, V); `context`, prompt and answer, is one token longer each call."""
        if self._in_prompt is None or self._counts is None:
            zeros = mx.zeros((logits.shape[-1],), dtype=mx.float32)
            self._in_prompt = zeros.at[mx.array(self._prompt)].add(1.0) > 0
            self._counts = zeros
        else:
            self._counts = self._counts.at[context[-1:]].add(1.0)
        answered = self._counts > 0
        scores = logits.astype(mx.float32)
        factor = self._sampling.repetition_penalty
        if factor != 1:
            penalized = mx.where(scores > 0, scores / factor, scores * factor)
            scores = mx.where(answered | self._in_prompt, penalized, scores)
        scores = scores - self._sampling.presence_penalty * answered
        scores = scores - self._sampling.frequency_penalty * self._counts
        return scores.astype(logits.dtype)


class LogitBias:
    """Adds a constant to the logits of some tokens."""

    def __init__(self, bias: dict[int, float]) -> None:
        self._tokens = mx.array(list(bias.keys()))
        self._values = mx.array(list(bias.values()))

    def __call__(self, _: mx.array, logits: mx.array) -> mx.array:
        """Return logits (1, V) with the bias added."""
        return logits.at[:, self._tokens].add(self._values.astype(logits.dtype))
