"""What the header of a llama GGUF file says: the model's config, the tensors it must have, their new names.

Reads metadata only. The keys are those of the GGUF specification, the config is that of Hugging Face.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from .gguf_header import GgufError, GgufHeader, GgufTensor
from .gguf_tokenizer import token_id

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_GROUP = 32
ROPE_FACTORS = "rope_freqs.weight"


def quantization(tensors: list[GgufTensor]) -> dict[str, Any] | None:
    """Return `quantization` of config.json: the usual bits, and the modules that differ; None if plain."""
    bits = {target_of(tensor.name)[1]: BITS[tensor.type] for tensor in tensors if tensor.type in BITS}
    if not bits:
        return None
    usual, _ = Counter(bits.values()).most_common(1)[0]
    exceptions = {path: {"group_size": _GROUP, "bits": own} for path, own in bits.items() if own != usual}
    return {"group_size": _GROUP, "bits": usual, **exceptions}


def target_of(name: str) -> tuple[str, str]:
    """Return GGUF stem and mlx-lm module of a tensor: blk.3.attn_q.weight -> attn_q, model.layers.3...."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    assert match is not None
    layer, stem, _ = match.groups()
    return stem, f"model.layers.{layer}.{_NAMES[stem]}" if layer else _NAMES[stem]


def model_config(header: GgufHeader) -> dict[str, Any]:
    """Return what the metadata says of `config.json`: hyperparameters under their Hugging Face names."""
    meta = header.metadata
    names = {tensor.name for tensor in header.tensors}
    if meta.get("llama.expert_count"):
        raise GgufError("it is a mixture of experts; the import knows dense llama models only")
    heads = _integer(meta, "attention.head_count")
    kv_heads = _integer(meta, "attention.head_count_kv", heads)
    hidden = _integer(meta, "embedding_length")
    head_dim = _integer(meta, "attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _integer(meta, key, head_dim) != head_dim:
            raise GgufError(f"its llama.{key} is not the size of a head, which a llama config cannot say")
    if head_dim % 2 or heads % kv_heads:
        raise GgufError(f"{heads} heads of {head_dim} values cannot share {kv_heads} keys")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": _integer(meta, "block_count"),
        "intermediate_size": _integer(meta, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _number(meta, "attention.layer_norm_rms_epsilon"),
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "max_position_embeddings": _integer(meta, "context_length"),
        "rope_theta": _number(meta, "rope.freq_base", 10000.0),
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "bos_token_id": token_id(meta, "bos"),
        "eos_token_id": _eos_ids(meta),
    }


def check_tensors(tensors: list[GgufTensor], config: dict[str, Any]) -> None:
    """Raise GgufError unless these are all the tensors of such a model, in their shapes, and no others."""
    left = {tensor.name: tensor for tensor in tensors}
    optional = [(ROPE_FACTORS, (config["head_dim"] // 2,))] if ROPE_FACTORS in left else []
    for name, shape in chain(_shapes(config), optional):
        tensor = left.pop(name, None)
        if tensor is None:
            raise GgufError(f"tensor {name!r} is missing")
        if tensor.shape != shape:
            raise GgufError(f"tensor {name!r} has shape {tensor.shape}; the metadata asks for {shape}")
        if len(shape) == 1 and tensor.type not in ("F32", "F16"):
            raise GgufError(f"tensor {name!r} has type {tensor.type}, but vectors are never quantized")
    if left:
        raise GgufError(f"tensor {next(iter(left))!r} has no place in a llama model")


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, table = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    attention = {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "output": (hidden, queries),
    }
    feed_forward = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    yield "token_embd.weight", (table, hidden)
    yield "output_norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "output.weight", (table, hidden)
    for layer in range(config["num_hidden_layers"]):
        for block, biased, matrices in (
            (f"blk.{layer}.attn", config["attention_bias"], attention),
            (f"blk.{layer}.ffn", config["mlp_bias"], feed_forward),
        ):
            yield f"{block}_norm.weight", (hidden,)
            for name, shape in matrices.items():
                yield f"{block}_{name}.weight", shape
                if biased:
                    yield f"{block}_{name}.bias", shape[:1]


def _integer(meta: dict[str, Any], key: str, default: int | None = None) -> int:
    value = meta.get(f"llama.{key}", default)
    if isinstance(value, list):
        raise GgufError(f"its layers differ in llama.{key}, which a llama config cannot say")
    if not isinstance(value, int) or not 0 < value < 1 << 31:
        raise GgufError(f"the file does not give llama.{key} as a positive number")
    return value


def _number(meta: dict[str, Any], key: str, default: float | None = None) -> float:
    value = meta.get(f"llama.{key}", default)
    if not isinstance(value, float | int) or not math.isfinite(value) or value <= 0:
        raise GgufError(f"the file does not give llama.{key} as a positive number")
    return value


def _eos_ids(meta: dict[str, Any]) -> list[int]:
    ids = [token_id(meta, role) for role in ("eos", "eot", "eom")]
    return list(dict.fromkeys(position for position in ids if position is not None))


def rope_scaling(meta: dict[str, Any], factors: np.ndarray[Any, Any] | None) -> dict[str, Any] | None:
    """Return `rope_scaling` of config.json; `factors` are those of Llama 3, one for each rotary pair.

    Raises:
        GgufError: a scaling that a llama config cannot say.
    """
    # As llama.cpp reads it: a factor without a type is linear, and the oldest files call it scale_linear.
    factor = _number(meta, "rope.scaling.factor", _number(meta, "rope.scale_linear", 1.0))
    kind = meta.get("llama.rope.scaling.type", "linear")
    unscaled = kind == "none" or (kind == "linear" and factor == 1)
    if factors is not None and unscaled:
        return _llama3_scaling(meta, factors)
    if unscaled:
        return None
    if kind == "linear" and factors is None:
        return {"type": "linear", "factor": factor}
    raise GgufError(f"its rotary scaling is {kind!r}; known are 'linear' and the factors of Llama 3")


def _llama3_scaling(meta: dict[str, Any], factors: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Find the Llama 3 parameters that give these factors; they are stored only as their result.

    The formula is that of the Llama 3.1 reference code: wavelengths beyond `original / 1` are stretched by
    `factor`, those below `original / 4` stay, and between them the two are blended.
    """
    theta = _number(meta, "rope.freq_base", 10000.0)
    original = 8192
    dimensions = 2 * factors.size
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dimensions, 2) / dimensions)
    factor = float(np.max(factors))
    smooth = np.clip((original / wavelengths - 1) / 3, 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(expected, factors.astype(np.float32), rtol=1e-3):
        raise GgufError(f"tensor {ROPE_FACTORS!r} does not hold the rotary factors of a Llama 3 model")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
