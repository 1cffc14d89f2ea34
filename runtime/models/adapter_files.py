"""An adapter's folder -> low-rank matrices in memory, checked and evaluated; on any one thread.

Two formats are read: what mlx-lm's `lora` command writes, and that of Hugging Face PEFT. What an adapter has
beyond plain LoRA of linear layers is refused with the reason: without it the answers would be others.
"""

import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from ..engine.adapters import AdapterError, AdapterWeights
from .adapter_tensors import check_shapes, finished, load_tensors, pairs, read_header, scaled

MAX_CONFIG_BYTES = 16 * 1024 * 1024

_MLX_LM_NAME = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[ab])")
_PEFT_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])(\.[A-Za-z_]\w*)?\.weight")

_SAY_NOTHING_OF_THE_MATRICES = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "velora_config", "qalora_group_size"),
    *("megatron_core", "runtime_config", "ensure_weight_tying", "peft_version"),
}
_LEAVE_THE_BASE_ALONE = (True, False, None, "gaussian", "eva", "mica", "orthogonal")

ConfigT = TypeVar("ConfigT")


class _LoraParameters(msgspec.Struct):
    scale: float
    rank: int | None = None


class _MlxLmConfig(msgspec.Struct):
    lora_parameters: _LoraParameters
    fine_tune_type: str = "lora"


class _PeftConfig(msgspec.Struct):
    r: int
    lora_alpha: float
    peft_type: Literal["LORA"] = "LORA"
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, int] | None = None


def read_adapter(folder: Path) -> AdapterWeights:
    """Return what the adapter in a folder adds, every number of it evaluated and finite.

    Raises:
        AdapterError: the files are missing, damaged, or not plain LoRA; the message is fit for a client.
    """
    try:
        config = _config(folder / "adapter_config.json")
        mlx_lm, peft = folder / "adapters.safetensors", folder / "adapter_model.safetensors"
        if mlx_lm.is_file() and not peft.is_file():
            return _read_mlx_lm(_convert(config, _MlxLmConfig), mlx_lm)
        if peft.is_file() and not mlx_lm.is_file():
            settings = _convert(config, _PeftConfig)
            _check_plain(config, settings)
            return _read_peft(settings, peft)
    except OSError as error:
        raise AdapterError("its files cannot be read") from error
    raise AdapterError(
        "the folder must have one of adapters.safetensors (mlx-lm) and adapter_model.safetensors (PEFT); "
        "other formats of weights are not read"
    )


def _read_mlx_lm(settings: _MlxLmConfig, path: Path) -> AdapterWeights:
    if settings.fine_tune_type != "lora":
        raise AdapterError(f"its fine_tune_type is {settings.fine_tune_type!r}; only 'lora' is supported")
    header = read_header(path)
    layers = pairs(header, _MLX_LM_NAME)
    for layer, (a, b) in layers.items():
        check_shapes(layer, header[a], header[b], (1, 0), settings.lora_parameters.rank)
    arrays = load_tensors(path, header)
    scale = settings.lora_parameters.scale
    return finished({layer: scaled(arrays[a].T, arrays[b], scale) for layer, (a, b) in layers.items()})


def _read_peft(settings: _PeftConfig, path: Path) -> AdapterWeights:
    header = read_header(path)
    layers = pairs(header, _PEFT_NAME)
    for layer, (a, b) in layers.items():
        # A pattern gives layers ranks of their own, which their matrices have.
        check_shapes(layer, header[a], header[b], (0, 1), None if settings.rank_pattern else settings.r)
    arrays = load_tensors(path, header)
    # As in `LoraLayer.update_layer` of PEFT; rank-stabilized LoRA is arXiv:2312.03732.
    power = 0.5 if settings.use_rslora else 1.0
    return finished(
        {
            layer: scaled(arrays[a], arrays[b].T, settings.lora_alpha / arrays[a].shape[0] ** power)
            for layer, (a, b) in layers.items()
        }
    )


def _check_plain(config: dict[str, Any], settings: _PeftConfig) -> None:
    init = settings.init_lora_weights
    if init not in _LEAVE_THE_BASE_ALONE:
        raise AdapterError(f"its init_lora_weights is {init!r}: it belongs to a base model that was changed")
    if settings.bias != "none":
        raise AdapterError("it changes biases, which is not supported")
    known = _SAY_NOTHING_OF_THE_MATRICES.union(_PeftConfig.__struct_fields__)
    for name, value in config.items():
        # Settings that are not known may change how the model computes, if they are on.
        if value and name not in known:
            raise AdapterError(f"its adapter_config.json sets {name[:80]!r}, which is not supported")


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AdapterError("the folder has no adapter_config.json")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError("its adapter_config.json is too large to be one")
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise AdapterError("its adapter_config.json is not a JSON object") from None


def _convert(config: dict[str, Any], kind: type[ConfigT]) -> ConfigT:
    try:
        return msgspec.convert(config, kind)
    except msgspec.ValidationError as error:
        raise AdapterError(f"its adapter_config.json is not what it should be: {error}") from None
