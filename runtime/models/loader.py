"""Model folder -> network in memory, evaluated. Runs on the inference thread."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.utils as tree
import mlx_lm.utils as mlx_lm
from mlx import nn

from mlx_sidecar.protocol.messages import DtypeRequest

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_SLOW_ON_CPU = "MLX's CPU backend computes quantized and 16-bit matrix products far slower than float32"


@dataclass(frozen=True)
class Network:
    """A model in memory. `dtype` is what its weights are now; `reason` why, when not as stored."""

    module: nn.Module
    dtype: str
    reason: str | None
    parameters: int
    context_length: int
    vocabulary: int
    nbytes: int
    load_ms: float


class LoadError(Exception):
    """The folder is not a model that can be loaded; the message is fit for a client."""


def load_network(folder: Path, dtype: DtypeRequest, device: str) -> Network:
    """Read the weights, convert them if asked or wise, and evaluate every one.

    Raises:
        LoadError: the folder's files are damaged or of a kind that is not supported.
    """
    began = time.monotonic()
    try:
        loaded = cast(Any, mlx_lm.load_model(folder, lazy=True))
    except Exception as error:
        raise LoadError(_explain(error)) from error
    module, config = loaded
    stored = _stored_dtype(module)
    wanted, reason = _choose_dtype(dtype, stored, device)
    if wanted != stored:
        module = _convert(module, _DTYPES[wanted])
    try:
        mx.eval(module.parameters())
    except Exception as error:
        raise LoadError("its weight files are damaged or incomplete") from error
    context_length, vocabulary = _sizes(config)
    return Network(
        module=module,
        dtype=wanted,
        reason=reason,
        parameters=cast(int, mlx_lm.get_total_parameters(module)),
        context_length=context_length,
        vocabulary=vocabulary,
        nbytes=sum(array.nbytes for _, array in _arrays(module)),
        load_ms=(time.monotonic() - began) * 1000,
    )


def _choose_dtype(dtype: DtypeRequest, stored: str, device: str) -> tuple[str, str | None]:
    if dtype in ("stored", stored):
        return stored, f"{_SLOW_ON_CPU}, but {dtype!r} was asked for" if _slow(stored, device) else None
    if dtype != "auto":
        return dtype, f"asked for; the folder holds {stored}"
    if _slow(stored, device):
        return "float32", f"{_SLOW_ON_CPU}; the folder holds {stored}"
    return stored, None


def _sizes(config: dict[str, Any]) -> tuple[int, int]:
    """Return context length and vocabulary; multimodal models keep them in a config within the config."""
    facts = cast(dict[str, Any], config.get("text_config") or {}) | config
    context = facts.get("max_position_embeddings") or facts.get("max_sequence_length")
    vocabulary = facts.get("vocab_size")
    if not isinstance(context, int) or not isinstance(vocabulary, int):
        raise LoadError("its config.json does not give max_position_embeddings and vocab_size as integers")
    return context, vocabulary


def _slow(dtype: str, device: str) -> bool:
    return device == "cpu" and dtype != "float32"


def _stored_dtype(module: Any) -> str:
    """Return "float16" and the like, or "4-bit" for quantized weights, by what most weights are."""
    bits = {
        layer.bits for _, layer in module.named_modules() if isinstance(getattr(layer, "bits", None), int)
    }
    if bits:
        return f"{min(bits)}-bit"
    sizes: dict[str, int] = {}
    for _, array in _arrays(module):
        name = str(array.dtype).removeprefix("mlx.core.")
        sizes[name] = sizes.get(name, 0) + array.size
    return max(sizes, key=lambda name: sizes[name])


def _convert(module: Any, dtype: mx.Dtype) -> nn.Module:
    def convert(array: mx.array) -> mx.array:
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array

    # Scales first: unpacking with float32 scales rounds once, and is five times faster on a CPU.
    module.update(tree.tree_map(convert, module.parameters()))
    return mlx_lm.dequantize_model(module)


def _arrays(module: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree.tree_flatten(module.parameters())
    return flat


def _explain(error: Exception) -> str:
    """Say what is wrong without the library's words, which may hold paths."""
    if isinstance(error, FileNotFoundError):
        return "the folder has no model*.safetensors"
    if isinstance(error, ValueError) and "not supported" in str(error):
        return "its architecture is not one that mlx-lm knows"
    if isinstance(error, ValueError) and "custom module" in str(error):
        return "it wants to run code of its own, which is never done"
    return "its config.json and its weights do not fit together, or are damaged"
