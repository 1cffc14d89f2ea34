"""Tiny networks with random weights: one of every kind of architecture whose cache works in its own way.

They are mlx-lm's own classes in float32, so small that a token costs a millisecond, the same in every run.
Their weights are so large that an answer depends on all of its prompt and wanders instead of settling: a
wrong offset, mask or cache shows in the tokens at once.
"""

import zlib
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from mlx_sidecar.native.blas import Blas
from mlx_sidecar.runtime.engine.mlx_start import start_mlx

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx import nn

VOCABULARY = 256
WINDOW = 8
"""Tokens that a sliding window or a chunk of attention holds: shorter than most sequences of the tests."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_WINDOWED: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    # mlx-lm runs Mistral with its llama code; the window is that of its newer models.
    "mistral": _WINDOWED,
    "ministral3": _WINDOWED
    | {
        "rope_parameters": {
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": WINDOW,
        }
    },
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": _EXPERTS | {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16.0, "num_hidden_layers": 3},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16.0,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "num_hidden_layers": 3,
    },
    "gemma": {"head_dim": 16},
    "phi": {"partial_rotary_factor": 0.5, "num_hidden_layers": 3},
    "phi3": {},
    "olmo2": {"num_hidden_layers": 3},
    "granite": {
        "logits_scaling": 4.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "qwen3_next": _EXPERTS
    | {
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 32,
    },
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "mamba2": {
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
        "time_step_limit": (0.0, float("inf")),
        "time_step_rank": "auto",
    },
    "falcon_h1": {
        "head_dim": 8,
        "mamba_d_ssm": 64,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_heads": 4,
        "mamba_n_groups": 2,
        "key_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
    },
    "recurrent_gemma": {
        "attention_bias": False,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "attention"],
    },
    "llama4": {
        "text_config": _SHAPE
        | {
            "model_type": "llama4_text",
            "num_hidden_layers": 4,
            "head_dim": 16,
            "attention_bias": False,
            "attention_chunk_size": WINDOW,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
            "rope_scaling": None,
            "use_qk_norm": True,
        }
    },
}

ARCHITECTURES = tuple(_CONFIGS)
"""The names for `tiny_network`, which are mlx-lm's model types."""

UNBATCHABLE = ("llama4",)
"""Architectures with a cache that holds one sequence only: mlx-lm cannot merge it with others."""

MIXES_ROWS_UP = ("gemma2",)
"""Architectures whose code in mlx-lm gives rows of different length another row's mask, or raises."""


@cache
def tiny_network(architecture: str) -> "nn.Module":
    """Return a network: for every call the same object, in every run the same weights."""
    return fresh_network(architecture)


def fresh_network(architecture: str) -> "nn.Module":
    """Return a network of its own, for those who change it."""
    return network_of(tiny_config(architecture), zlib.crc32(architecture.encode()))


def tiny_config(architecture: str, **changes: Any) -> dict[str, Any]:
    """Return the config of a tiny network, some of its fields changed."""
    config: dict[str, Any] = {"model_type": architecture} | _SHAPE | _CONFIGS[architecture] | changes
    if "text_config" in config:
        config["text_config"] = config["text_config"] | changes
    return config


def network_of(config: dict[str, Any], seed: int) -> "nn.Module":
    """Return the network that a config describes, with random weights."""
    _start()
    import mlx.core as mx

    mx.random.seed(seed)
    module: Any = blank_network(config)
    module.load_weights([(name, _weight(name, array)) for name, array in parameters(module)])
    mx.eval(module.parameters())
    return module.eval()


def blank_network(config: dict[str, Any]) -> "nn.Module":
    """Return the network that a config describes as its constructor leaves it, nothing of it evaluated."""
    _start()
    import mlx_lm.utils as mlx_lm

    model_class, arguments_class = cast(Any, mlx_lm)._get_classes(config)
    return model_class(arguments_class.from_dict(config))


def parameters(module: Any) -> "list[tuple[str, mx.array]]":
    """Return the weights of a network by name."""
    import mlx.utils as tree

    flat: Any = tree.tree_flatten(module.parameters())
    return flat


@cache
def _start() -> None:
    """Import mlx-lm as the engine does."""
    start_mlx(Blas())


def _weight(name: str, fresh: "mx.array") -> "mx.array":
    """Return random values for a parameter; `fresh` is what the module's constructor gave it."""
    import mlx.core as mx

    noise = mx.random.normal(fresh.shape)
    if fresh.ndim == 1 or not name.endswith("weight"):
        # A slow decay: a recurrent state must remember the whole prompt for the answer to depend on it.
        slower = 4.0 if name.endswith(("A_log", "recurrent_param")) else 0.0
        return fresh + 0.2 * noise - slower
    inputs = fresh.size // fresh.shape[0] if "conv" in name else fresh.shape[-1]
    # Embeddings are weaker: what the layers have to say must outweigh the token that was said last.
    gain = 0.5 if ".embed" in name and fresh.ndim == 2 else 2.0
    return noise * (gain / inputs**0.5)
