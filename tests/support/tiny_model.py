"""A llama of two layers with random weights and a byte-level tokenizer: a real model folder, quickly made.

Its answers are noise, bytes that are not UTF-8 included, which is what most tests of the machinery want.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy as safetensors
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTEXT_LENGTH = 256
HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 32, 2, 4, 2, 64
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no chat starts with a tool') }}{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": CONTEXT_LENGTH,
    "tie_word_embeddings": False,
}


def make_tiny_model(folder: Path, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Write a model folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    vocabulary = tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    config = CONFIG | {"vocab_size": vocabulary, "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": END, "chat_template": CHAT_TEMPLATE})
    )
    weights = {name: array.astype(dtype) for name, array in _weights(vocabulary, seed).items()}
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "mlx"})
    return folder


def make_tokenizer() -> Tokenizer:
    """Return a tokenizer whose tokens are the 256 bytes, some merges, and four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("o", "r"), ("Ġw", "or")]
    merges += [("l", "d"), ("Ġwor", "ld"), ("Ã", "©"), ("ð", "Ł")]
    tokens = alphabet + [left + right for left, right in merges]
    vocabulary = {token: position for position, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|system|>", "<|user|>", "<|assistant|>", END]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _weights(vocabulary: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    head = HIDDEN // HEADS

    def matrix(rows: int, columns: int) -> np.ndarray[Any, Any]:
        return random.normal(0, 2 / columns**0.5, (rows, columns))

    weights = {
        "model.embed_tokens.weight": random.normal(0, 1, (vocabulary, HIDDEN)),
        "model.norm.weight": np.ones(HIDDEN),
        "lm_head.weight": matrix(vocabulary, HIDDEN),
    }
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        weights |= {
            f"{stem}.input_layernorm.weight": np.ones(HIDDEN),
            f"{stem}.post_attention_layernorm.weight": np.ones(HIDDEN),
            f"{stem}.self_attn.q_proj.weight": matrix(HEADS * head, HIDDEN),
            f"{stem}.self_attn.k_proj.weight": matrix(KV_HEADS * head, HIDDEN),
            f"{stem}.self_attn.v_proj.weight": matrix(KV_HEADS * head, HIDDEN),
            f"{stem}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * head),
            f"{stem}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{stem}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{stem}.mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
        }
    return weights
