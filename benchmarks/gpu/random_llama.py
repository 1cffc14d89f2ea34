"""Model folders of the llama family with random weights and a tokenizer of made-up words.

Their speed is that of a real model of the same size. What they say is noise, but as varied as text: the
embeddings are small, so that no token is its own likeliest successor.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 49152
EMBEDDING_SCALE = 0.02
END = "<|end|>"
CHUNK = 1 << 22


class Shape(NamedTuple):
    """The sizes of a llama; embeddings are tied."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    context: int = 32768


SHAPES = {
    "3b": Shape(layers=28, hidden=3072, heads=24, kv_heads=8, head=128, intermediate=8192),
    "1b": Shape(layers=16, hidden=2048, heads=32, kv_heads=8, head=64, intermediate=8192),
    "tiny": Shape(layers=2, hidden=64, heads=4, kv_heads=2, head=16, intermediate=128),
}


def make_random_llama(folder: Path, shape: Shape, seed: int = 1) -> Path:
    """Write a folder of bfloat16 weights, without MLX, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(shape)))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END})
    )
    make_tokenizer().save(str(folder / "tokenizer.json"))
    _write_weights(folder / "model.safetensors", _shapes(shape), seed)
    return folder


def make_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer of `VOCABULARY` tokens: bytes, words of letters, and an end."""
    vocabulary = {token: id_ for id_, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in _words():
        if len(vocabulary) == VOCABULARY - 1:
            break
        vocabulary[word] = len(vocabulary)
        merges.append((word[:-1], word[-1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return tokenizer


def _words() -> Iterator[str]:
    # Each is the one before it in length and one letter: what byte-pair merges can make.
    for length in range(1, 5):
        for letters in product(ascii_lowercase, repeat=length):
            yield "Ġ" + "".join(letters)


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": True,
        "eos_token_id": VOCABULARY - 1,
        "torch_dtype": "bfloat16",
    }


def _shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    for layer in range(shape.layers):
        stem = f"model.layers.{layer}"
        shapes |= {
            f"{stem}.input_layernorm.weight": (shape.hidden,),
            f"{stem}.post_attention_layernorm.weight": (shape.hidden,),
            f"{stem}.self_attn.q_proj.weight": (queries, shape.hidden),
            f"{stem}.self_attn.k_proj.weight": (keys, shape.hidden),
            f"{stem}.self_attn.v_proj.weight": (keys, shape.hidden),
            f"{stem}.self_attn.o_proj.weight": (shape.hidden, queries),
            f"{stem}.mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
            f"{stem}.mlp.up_proj.weight": (shape.intermediate, shape.hidden),
            f"{stem}.mlp.down_proj.weight": (shape.hidden, shape.intermediate),
        }
    return shapes


def _write_weights(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    # NumPy has no bfloat16, so the file is written by hand: length of the header, header, tensors.
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for name, shape in shapes.items():
        end = position + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + position)
    data = np.memmap(path, dtype=np.uint16, mode="r+", offset=8 + len(head), shape=(position // 2,))

    def fill(number: int, name: str) -> None:
        begin, end = (offset // 2 for offset in header[name]["data_offsets"])
        _fill(data[begin:end], name, shapes[name], np.random.Generator(np.random.SFC64([seed, number])))

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(fill, range(len(shapes)), shapes))
    data.flush()


def _fill(into: Any, name: str, shape: tuple[int, ...], random: np.random.Generator) -> None:
    """Fill one tensor, as bits of bfloat16: the upper half of a float32."""
    if len(shape) == 1:
        into[:] = 0x3F80
        return
    scale = np.float32(EMBEDDING_SCALE if "embed" in name else shape[1] ** -0.5)
    for begin in range(0, len(into), CHUNK):
        piece = random.standard_normal(min(CHUNK, len(into) - begin), dtype=np.float32) * scale
        into[begin : begin + len(piece)] = ((piece.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    if "embed" in name:
        # The end never comes: its logit is always zero, and the largest is well above.
        into[-shape[1] :] = 0
