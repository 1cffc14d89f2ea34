"""A llama in plain float64 arithmetic: what a model's logits must be, whoever computes them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Array]


def logits(weights: Weights, ids: list[int], heads: int, kv_heads: int, frequencies: Array) -> Array:
    """Return a row of logits for every id. `weights` go by Hugging Face's names.

    `frequencies` are the angles by which one position turns each rotary pair.
    """
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    angles = np.arange(len(ids))[:, None] * frequencies[None]
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        part = {name.removeprefix(stem): array for name, array in weights.items() if name.startswith(stem)}
        x = x + _attention(part, _norm(x, part["input_layernorm.weight"]), heads, kv_heads, angles)
        x = x + _feed_forward(part, _norm(x, part["post_attention_layernorm.weight"]))
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return _norm(x, weights["model.norm.weight"]) @ head.T


def default_frequencies(head_dim: int, theta: float = 10000.0) -> Array:
    """Return the frequencies of a model without rotary scaling."""
    return theta ** -(np.arange(0, head_dim, 2) / head_dim)


def llama3_factors(head_dim: int, factor: float, theta: float = 10000.0) -> Array:
    """Return what the Llama 3.1 formula divides the frequencies by, worked out one at a time."""
    original, low, high = 8192, 1.0, 4.0
    factors: list[float] = []
    for frequency in default_frequencies(head_dim, theta):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def _attention(part: Weights, x: Array, heads: int, kv_heads: int, angles: Array) -> Array:
    length = len(x)

    def split(name: str, count: int) -> Array:
        return _linear(part, f"self_attn.{name}", x).reshape(length, count, -1).swapaxes(0, 1)

    queries = _rotate(split("q_proj", heads), angles)
    keys = _rotate(split("k_proj", kv_heads), angles).repeat(heads // kv_heads, axis=0)
    values = split("v_proj", kv_heads).repeat(heads // kv_heads, axis=0)
    scores = queries @ keys.swapaxes(1, 2) / queries.shape[-1] ** 0.5
    scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = exponents / exponents.sum(-1, keepdims=True) @ values
    return _linear(part, "self_attn.o_proj", mixed.swapaxes(0, 1).reshape(length, -1))


def _feed_forward(part: Weights, x: Array) -> Array:
    gate = _linear(part, "mlp.gate_proj", x)
    activated = gate * (1 + np.tanh(gate / 2)) / 2
    return _linear(part, "mlp.down_proj", activated * _linear(part, "mlp.up_proj", x))


def _linear(part: Weights, name: str, x: Array) -> Array:
    return x @ part[f"{name}.weight"].T + part.get(f"{name}.bias", np.zeros(1))


def _norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def _rotate(x: Array, angles: Array) -> Array:
    left, right = np.split(x, 2, axis=-1)
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.concatenate([left * cosine - right * sine, left * sine + right * cosine], -1)
