"""The matrices in an adapter's file, checked before and after MLX reads them.

The reference reader goes first: MLX's own takes headers that contradict themselves.
"""

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import safetensors

from ..engine.adapted_linear import LowRank
from ..engine.adapters import AdapterError, AdapterWeights

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 16_384
MAX_NAME_CHARACTERS = 256

_DTYPES = ("F32", "F16", "BF16")
_PARTS = 2
_MORE_THAN_LORA = {
    r"\.m$|\.lora_magnitude_vector\b": "it is a DoRA adapter, which is not supported",
    r"\.lora_embedding_": "it changes the embeddings, which is not supported",
    r"\.bias$": "it changes biases, which is not supported",
    r"\.modules_to_save\b|\.trainable_tokens_": "it replaces weights of the model, which is not supported",
}


class Tensor(NamedTuple):
    """What the header says of one tensor; the type in the words of safetensors."""

    shape: tuple[int, ...]
    dtype: str


Header = Mapping[str, Tensor]
Pairs = Mapping[str, tuple[str, str]]


def read_header(path: Path) -> Header:
    """Return what tensors the file has.

    Raises:
        AdapterError: the file contradicts itself, or holds what no adapter needs.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) < struct.calcsize("<Q") or struct.unpack("<Q", start)[0] > MAX_HEADER_BYTES:
        raise AdapterError("its weights have no header that makes sense")
    try:
        with cast(Any, safetensors).safe_open(path, "numpy") as opened:
            names: list[str] = list(opened.keys())
            if len(names) > MAX_TENSORS:
                raise AdapterError(f"it has {len(names)} tensors; the limit is {MAX_TENSORS}")
            parts = {name: opened.get_slice(name) for name in names}
            header = {name: Tensor(tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except safetensors.SafetensorError as error:
        raise AdapterError("its weights are damaged or incomplete") from error
    for name, tensor in header.items():
        if len(name) > MAX_NAME_CHARACTERS:
            raise AdapterError(f"a tensor has a name of {len(name)} characters")
        if tensor.dtype not in _DTYPES:
            raise AdapterError(f"{name!r} is of type {tensor.dtype}; supported are {', '.join(_DTYPES)}")
    return header


def pairs(header: Header, pattern: re.Pattern[str]) -> Pairs:
    """Return the names of both matrices of each layer; `pattern` finds the `layer` and the `part` in a name.

    Raises:
        AdapterError: there is none, one without the other, or something else.
    """
    found: dict[str, dict[str, str]] = {}
    for name in header:
        match = pattern.fullmatch(name)
        if match is None:
            raise AdapterError(f"{_why_not_lora(name)}: {name!r}")
        parts = found.setdefault(match["layer"], {})
        if parts.setdefault(match["part"].lower(), name) != name:
            raise AdapterError(f"it has layer {match['layer']!r} twice")
    if not found:
        raise AdapterError("it is empty")
    for layer, parts in found.items():
        if len(parts) != _PARTS:
            raise AdapterError(f"it has one of the two matrices of layer {layer!r} only")
    return {layer: (parts["a"], parts["b"]) for layer, parts in found.items()}


def check_shapes(layer: str, a: Tensor, b: Tensor, rank_axes: tuple[int, int], rank: int | None) -> None:
    """Compare the shapes of a layer's matrices, and their rank with that of the configuration, if it has one.

    Raises:
        AdapterError: they are not two thin matrices.
    """
    shapes = f"layer {layer!r} has matrices of shape {a.shape} and {b.shape}"
    if len(a.shape) != _PARTS or len(b.shape) != _PARTS:
        raise AdapterError(f"{shapes}; adapters are for linear layers only, not for experts in one block")
    found = a.shape[rank_axes[0]]
    if b.shape[rank_axes[1]] != found:
        raise AdapterError(f"{shapes}, which do not have the same rank")
    if rank is not None and found != rank:
        raise AdapterError(f"{shapes}, which is rank {found}; adapter_config.json says {rank}")
    if not 0 < found <= max(a.shape[1 - rank_axes[0]], b.shape[1 - rank_axes[1]]):
        raise AdapterError(f"{shapes}: rank {found} makes no sense there")


def load_tensors(path: Path, header: Header) -> dict[str, mx.array]:
    """Return every tensor, evaluated.

    Raises:
        AdapterError: the file is not what its header said.
    """
    try:
        loaded: Any = mx.load(str(path))
        arrays: dict[str, mx.array] = loaded
        mx.eval(arrays)
    except (RuntimeError, ValueError) as error:
        raise AdapterError("its weights are damaged or incomplete") from error
    if {name: array.shape for name, array in arrays.items()} != {
        name: tensor.shape for name, tensor in header.items()
    }:
        raise AdapterError("its weights were changed while they were read")
    return arrays


def scaled(a: mx.array, b: mx.array, scale: float) -> LowRank:
    """Return a (rank, inputs) and b (rank, outputs) with the scale in b, in the precision of the file."""
    return LowRank(a, (b.astype(mx.float32) * scale).astype(b.dtype))


def finished(layers: dict[str, LowRank]) -> AdapterWeights:
    """Evaluate every matrix.

    Raises:
        AdapterError: something is not a finite number, or becomes none by the scale.
    """
    finite = {
        layer: mx.all(mx.isfinite(part.a)) & mx.all(mx.isfinite(part.b)) for layer, part in layers.items()
    }
    mx.eval(layers, finite)
    for layer, flag in finite.items():
        if not flag.item():
            raise AdapterError(f"layer {layer!r} has numbers that are not finite")
    return AdapterWeights(layers)


def _why_not_lora(name: str) -> str:
    for pattern, reason in _MORE_THAN_LORA.items():
        if re.search(pattern, name):
            return reason
    return "it holds what is not part of a LoRA adapter"
