"""What a model folder holds, for people, without loading it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .bounded_json import BadFile, read_bounded, read_json
from .catalog import CATALOG
from .folder_check import check_folder
from .weight_files import Tensor, read_headers, weight_facts

_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8", "F8_E8M0": "float8"}
_PACKED_BITS = 32
_README_BYTES = 1024 * 1024
_CACHE_BYTES = {"float32": 4}


@dataclass(frozen=True)
class FolderFacts:
    """Facts of a model that could be loaded. `projected_bytes` has the weights and one full context."""

    architecture: str
    parameters: int
    context_length: int | None
    vocabulary: int | None
    dtype: str
    weights_bytes: int
    kv_bytes_per_token: int | None
    projected_bytes: int | None
    chat_template: bool
    license: str | None


def folder_facts(model: str, folder: Path) -> FolderFacts:
    """Check a folder as for loading, and return its facts. Weights count as they are stored.

    Raises:
        UnsafeModel, InvalidModel: it cannot be loaded.
        OSError: it cannot be read.
    """
    config = check_folder(model, folder)
    weights = weight_facts(model, folder)
    # Of a multimodal model the text part is what runs.
    text = config | cast(dict[str, Any], config.get("text_config") or {})
    context = _positive(text.get("max_position_embeddings") or text.get("max_sequence_length"))
    dtype = dtype_of(config, weights.bytes_by_dtype)
    each = _kv_bytes_per_token(text, dtype)
    return FolderFacts(
        architecture=str(config["model_type"]),
        parameters=_parameters(read_headers(model, folder), config),
        context_length=context,
        vocabulary=_positive(text.get("vocab_size")),
        dtype=dtype,
        weights_bytes=weights.total_bytes,
        kv_bytes_per_token=each,
        projected_bytes=weights.total_bytes + each * context if each and context else None,
        chat_template=_has_chat_template(folder),
        license=_license(model, folder),
    )


def dtype_of(config: Mapping[str, Any], bytes_by_dtype: Mapping[str, int]) -> str:
    """Return "float16" and the like, or "4-bit" for quantized weights, by what most weights are."""
    if bits := _bits(config):
        return f"{bits}-bit"
    largest = max(bytes_by_dtype, key=lambda name: bytes_by_dtype[name])
    return _NAMES.get(largest, largest.lower())


def _bits(config: Mapping[str, Any]) -> int | None:
    settings = config.get("quantization") or config.get("quantization_config")
    return _positive(cast(dict[str, Any], settings).get("bits")) if isinstance(settings, dict) else None


def _parameters(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
    """Count as mlx-lm does: packed weights by what they stand for, their scales and biases not at all."""
    bits, total = _bits(config), 0
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        packed = bits is not None and f"{stem}.scales" in tensors
        if packed and part in ("scales", "biases"):
            continue
        count = 1
        for size in tensor.shape:
            count *= size
        total += count * _PACKED_BITS // bits if packed and bits and part == "weight" else count
    return total


def _kv_bytes_per_token(config: Mapping[str, Any], dtype: str) -> int | None:
    heads = _positive(config.get("num_attention_heads"))
    kv_heads = _positive(config.get("num_key_value_heads")) or heads
    layers, hidden = _positive(config.get("num_hidden_layers")), _positive(config.get("hidden_size"))
    if not (heads and kv_heads and layers and hidden):
        return None
    head = _positive(config.get("head_dim")) or hidden // heads
    return 2 * layers * kv_heads * head * _CACHE_BYTES.get(dtype, 2)


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
    except (BadFile, FileNotFoundError):
        return False


def _license(model: str, folder: Path) -> str | None:
    if model in CATALOG:
        return CATALOG[model].license
    try:
        lines = read_bounded(folder / "README.md", _README_BYTES).decode(errors="replace").splitlines()
    except (BadFile, FileNotFoundError):
        return None
    # Model cards begin with their facts, as YAML between two lines of dashes.
    end = lines.index("---", 1) if lines[:1] == ["---"] and "---" in lines[1:] else 0
    found = (line.removeprefix("license:") for line in lines[:end] if line.startswith("license:"))
    return next(found, "").strip().strip("\"'") or None
