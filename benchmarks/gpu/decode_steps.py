"""Ways to make a decode step: mlx-lm's, ours, and what lies between. MLX must have been started before."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from benchmarks.gpu.random_llama import VOCABULARY, Shape
from mlx_sidecar.runtime.engine.compiled_step import CompiledStep, PlainStep
from mlx_sidecar.runtime.engine.fused import fuse_projections
from mlx_sidecar.runtime.engine.rows import Rows

DEPTH, PADDING = 256, 5
"""Tokens that the rows hold, and by how many the last of ragged rows is shorter."""

Step = Callable[[mx.array], list[mx.array]]
"""Makes of tokens (B,) what is to be evaluated, first of all the next tokens."""


class Variant(NamedTuple):
    """A way to decode: what `begin` makes of a model, a number of rows and whether one is shorter."""

    name: str
    begin: Callable[[Any, int, bool], Step]
    ragged: bool = True
    fused: bool = False
    needs_cuda: bool = False


def mlx_lm_step(model: Any, rows: int, ragged: bool, log_probabilities: bool = False) -> Step:
    """Return the step over mlx-lm's batch cache."""
    padding = [0] * (rows - 1) + [PADDING * ragged]
    caches = [BatchKVCache(padding) for _ in model.layers]
    _prefill(model, caches, rows)

    def step(tokens: mx.array) -> list[mx.array]:
        logits = model(tokens[:, None], cache=caches)[:, -1]
        if not log_probabilities:
            return [mx.argmax(logits, axis=-1)]
        normal = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return [mx.argmax(normal, axis=-1), *normal]

    return step


def plain_step(model: Any, rows: int, _: bool) -> Step:
    """Return the step over mlx-lm's cache of one sequence, which rows of one length may share."""
    caches = cast(list[KVCache], make_prompt_cache(model))
    _prefill(model, caches, rows)
    return lambda tokens: [mx.argmax(model(tokens[:, None], cache=caches)[:, -1], axis=-1)]


def our_step(kind: Callable[[Any], Any], model: Any, rows: int, ragged: bool) -> Step:
    """Return our step over our rows."""
    ours = Rows(model, rows)
    _prefill(model, ours.layers, rows)
    if ragged:
        ours.end_at([DEPTH] * (rows - 1) + [DEPTH - PADDING])
    made = kind(model)
    return lambda tokens: [mx.argmax(made(tokens, ours), axis=-1)]


class InPlaceStep(CompiledStep):
    """The step with attention that writes the caches, not compiled."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._compiled = self._logits


VARIANTS = [
    Variant("mlx-lm's batch, with log-probabilities", partial(mlx_lm_step, log_probabilities=True)),
    Variant("mlx-lm's batch", mlx_lm_step),
    Variant("our rows, ragged: one mask for all layers", partial(our_step, PlainStep)),
    Variant("our rows, of one length: no mask", partial(our_step, PlainStep), ragged=False),
    Variant("mlx-lm's cache of one sequence: one length only", plain_step, ragged=False),
    Variant("attention writes the cache", partial(our_step, InPlaceStep), needs_cuda=True),
    Variant("... and the step is compiled", partial(our_step, CompiledStep), needs_cuda=True),
    Variant("... and projections are fused", partial(our_step, CompiledStep), fused=True, needs_cuda=True),
]
"""From what `BatchGenerator` does to what we do."""


def make_llama(shape: Shape, dtype: mx.Dtype, fused: bool) -> Any:
    """Return a llama of random weights, always the same."""
    mx.random.seed(1)
    model: Any = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
        )
    )
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    if fused:
        fuse_projections(model)
    return model


def _prefill(model: Any, caches: Any, rows: int) -> None:
    model(mx.random.randint(0, VOCABULARY, (rows, DEPTH)), cache=caches)
    mx.eval([layer.state for layer in caches])
