"""Small GGUF files of the llama family, and the weights that importing them must give.

Types, blocks and row order are those of the gguf package and llama.cpp; nothing is shared with the import.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import quants
from support.tiny_model import make_tokenizer
from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]
Type = gguf.GGMLQuantizationType

_HF_NAMES = {
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


@dataclass
class GgufLlama:
    """A llama with random weights. Change `tensors` and `metadata` as a test needs, then write it.

    Matrices are stored as `type`, or as `types` says for one of them; vectors are float32.
    """

    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 96
    layers: int = 2
    tied: bool = False
    biases: bool = False
    type: Type = Type.F32
    types: dict[str, Type] = field(default_factory=dict[str, Type])
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    tensors: dict[str, Array] = field(default_factory=dict[str, Array])

    def __post_init__(self) -> None:
        tokenizer = byte_level_metadata(make_tokenizer(), "gpt-2")
        self.metadata = {
            **tokenizer,
            "llama.embedding_length": self.hidden,
            "llama.block_count": self.layers,
            "llama.feed_forward_length": self.intermediate,
            "llama.attention.head_count": self.heads,
            "llama.attention.head_count_kv": self.kv_heads,
            "llama.attention.key_length": self.head_dim,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.context_length": 128,
            **self.metadata,
        }
        random = np.random.default_rng(7)
        for name, shape in self._shapes(len(tokenizer["tokenizer.ggml.tokens"])).items():
            self.tensors[name] = _stored(random, shape, self.types.get(name, self.type))

    def type_of(self, name: str) -> Type:
        """Return the type that a tensor is stored in."""
        return Type.F32 if self.tensors[name].ndim == 1 else self.types.get(name, self.type)

    def write(self, path: Path) -> Path:
        """Write the file and return its path."""
        write_gguf(
            path, self.metadata, {name: (self.type_of(name), array) for name, array in self.tensors.items()}
        )
        return path

    def original(self) -> dict[str, Array]:
        """Return the float32 weights under Hugging Face's names and in its row order."""
        weights: dict[str, Array] = {}
        for name, array in self.tensors.items():
            stem, _, suffix = name.removeprefix("blk.").rpartition(".")
            layer, _, part = stem.rpartition(".")
            value = np.asarray(quants.dequantize(array, self.type_of(name)), np.float32)
            if part in ("attn_q", "attn_k"):
                value = _unpermuted(value, self.heads if part == "attn_q" else self.kv_heads)
            if part in _HF_NAMES:
                prefix = f"model.layers.{layer}." if layer else ""
                weights[f"{prefix}{_HF_NAMES[part]}.{suffix}"] = value
        return weights

    def _shapes(self, vocabulary: int) -> dict[str, tuple[int, ...]]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (self.hidden,),
            "attn_q.weight": (queries, self.hidden),
            "attn_k.weight": (keys, self.hidden),
            "attn_v.weight": (keys, self.hidden),
            "attn_output.weight": (self.hidden, queries),
            "ffn_norm.weight": (self.hidden,),
            "ffn_gate.weight": (self.intermediate, self.hidden),
            "ffn_up.weight": (self.intermediate, self.hidden),
            "ffn_down.weight": (self.hidden, self.intermediate),
        }
        if self.biases:
            rows = {"attn_q": queries, "attn_k": keys, "attn_v": keys, "attn_output": self.hidden}
            layer |= {f"{name}.bias": (count,) for name, count in rows.items()}
        table = (vocabulary, self.hidden)
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": table,
            "output_norm.weight": (self.hidden,),
        }
        shapes |= {} if self.tied else {"output.weight": table}
        for number in range(self.layers):
            shapes |= {f"blk.{number}.{name}": shape for name, shape in layer.items()}
        return shapes


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Type, Array]]) -> None:
    """Write any GGUF file. Integers become uint32 and floats float32, as they are in real files."""
    writer: Any = gguf.GGUFWriter(path, metadata.get("general.architecture", "llama"))
    add: dict[Any, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in metadata.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif key != "general.architecture":
            add.get(type(value), writer.add_array)(key, value)
    for name, (kind, array) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level_metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """Return the GGUF metadata of a byte-level BPE tokenizer whose end token comes last."""
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    kinds = {token["content"]: 3 if token["special"] else 4 for token in described["added_tokens"]}
    positions = tokenizer.get_vocab()
    tokens = sorted(positions, key=lambda token: positions[token])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }


def _stored(random: np.random.Generator, shape: tuple[int, ...], kind: Type) -> Array:
    """Return random weights as a file holds them: numbers, or the bytes of quantized blocks."""
    if len(shape) == 1:
        # Eighths, which float16 holds exactly.
        return random.integers(4, 12, shape).astype(np.float32) / 8
    if kind not in (Type.Q4_K, Type.Q6_K):
        return np.asarray(quants.quantize(random.normal(0, 1.5 / shape[1] ** 0.5, shape).astype("f4"), kind))
    # The gguf package unpacks K types but does not make them, so their blocks are random bytes.
    items, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (shape[0], shape[1] // items, size), dtype=np.uint8)
    scales = random.uniform(0.5, 1, blocks.shape[:2]) * (3e-4 if kind is Type.Q4_K else 5e-5)
    if kind is Type.Q4_K:
        blocks[..., 0:2] = _f16_bytes(scales)
        blocks[..., 2:4] = _f16_bytes(scales * 7.5)
    else:
        blocks[..., 208:210] = _f16_bytes(scales)
    return blocks.reshape(shape[0], -1)


def _f16_bytes(values: Array) -> Array:
    return values.astype("<f2")[..., None].view(np.uint8)


def _unpermuted(array: Array, heads: int) -> Array:
    # llama.cpp's permutation of the row numbers says where each row came from; put every row back there.
    rows = np.arange(len(array)).reshape(heads, 2, len(array) // heads // 2).swapaxes(1, 2).reshape(-1)
    restored = np.empty_like(array)
    restored[rows] = array
    return restored
