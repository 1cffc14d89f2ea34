"""Adapters with random weights for tiny networks, as the folders that mlx-lm and PEFT write.

They are so strong that an answer with one wanders elsewhere at once: a row with the wrong adapter, or with
none, shows in its tokens.
"""

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import mlx.core as mx

Sizes = dict[str, tuple[int, int]]
"""Inputs and outputs of layers, by their paths."""


def linear_layers(network: Any) -> Sizes:
    """Return the linear layers inside a network's blocks."""
    from mlx import nn

    found: Sizes = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear) and ".layers." in path:
            weight: mx.array = cast(Any, module)["weight"]
            outputs, inputs = weight.shape
            packed = isinstance(module, nn.QuantizedLinear)
            found[path] = (inputs * 32 // module.bits if packed else inputs, outputs)
    return dict(sorted(found.items()))


def random_matrices(layers: Sizes, seed: int, rank: int) -> "dict[str, tuple[mx.array, mx.array]]":
    """Return a (inputs, rank) and b (rank, outputs) for each layer."""
    import mlx.core as mx

    matrices: dict[str, tuple[mx.array, mx.array]] = {}
    for path, (inputs, outputs) in layers.items():
        mx.random.seed(zlib.crc32(f"{seed} {path}".encode()))
        a = mx.random.normal((inputs, rank)) / inputs**0.5
        matrices[path] = (a, mx.random.normal((rank, outputs)) / rank**0.5)
    return matrices


def write_mlx_lm(
    folder: Path, matrices: "dict[str, tuple[mx.array, mx.array]]", *, scale: float = 1.0, **config: Any
) -> Path:
    """Write the folder that `mlx_lm.lora` leaves, and return it."""
    import mlx.core as mx

    rank = next(iter(matrices.values()))[0].shape[1] if matrices else 0
    keys = sorted({path.split(".layers.")[1].partition(".")[2] for path in matrices if ".layers." in path})
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    tensors = {f"{path}.lora_a": a for path, (a, _) in matrices.items()}
    tensors |= {f"{path}.lora_b": b for path, (_, b) in matrices.items()}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, {"fine_tune_type": "lora", "num_layers": 64, "lora_parameters": parameters} | config)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    return folder


def write_peft(
    folder: Path, matrices: "dict[str, tuple[mx.array, mx.array]]", *, alpha: float = 1.0, **config: Any
) -> Path:
    """Write the folder that PEFT's `save_pretrained` leaves, and return it."""
    import mlx.core as mx

    rank = next(iter(matrices.values()))[0].shape[1]
    tensors: dict[str, mx.array] = {}
    for path, (a, b) in matrices.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = mx.contiguous(a.T)
        tensors[f"base_model.model.{path}.lora_B.weight"] = mx.contiguous(b.T)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, _PEFT_DEFAULTS | {"r": rank, "lora_alpha": alpha} | config)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, {"format": "pt"})
    return folder


def only(layers: Sizes, *endings: str) -> Sizes:
    """Return the layers whose paths end so."""
    return {path: sizes for path, sizes in layers.items() if path.endswith(endings)}


def _write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config))


# What PEFT 0.21 writes for `LoraConfig(task_type="CAUSAL_LM")`.
_PEFT_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "someone/some-model",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
