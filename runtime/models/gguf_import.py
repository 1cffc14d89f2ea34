"""GGUF file -> ordinary mlx-lm model folder, for the llama family.

Runs in a process of its own (`python -m mlx_sidecar.runtime.models.gguf_import FILE FOLDER`), because MLX's
GGUF reader is C code fed with a downloaded file. Progress and errors go to stdout, one JSON object a line.

Quantized tensors keep their packed values: MLX reads Q4_0, Q4_1 and Q8_0 as its own affine format with
groups of 32. Q4_K and Q6_K become float16.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .gguf_header import GgufError, GgufHeader, GgufTensor, read_header
from .gguf_llama import BITS, ROPE_FACTORS, check_tensors, model_config, quantization, rope_scaling, target_of
from .gguf_tokenizer import build_tokenizer
from .tie import end_with_input

Arrays = dict[str, mx.array]

UNTIL_INPUT_ENDS = "--until-input-ends"
"""An argument for a parent that may die: its end of our input closes then."""

_SHARD_BYTES = 4 * 1024**3


def import_gguf(source: Path, folder: Path) -> None:
    """Write a model folder for the GGUF file at `source`.

    Raises:
        GgufError: the file is damaged, of another family, or holds what cannot be carried over.
    """
    header = read_header(source)
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise GgufError(f"its architecture is {architecture!r}; the import knows the 'llama' family")
    _say(stage="tensors read", done=0, total=len(header.tensors))
    tokenizer, tokenizer_config = build_tokenizer(header.metadata)
    config = model_config(header)
    check_tensors(header.tensors, config)
    arrays = _load(source, header)
    config["rope_scaling"] = rope_scaling(header.metadata, _factors(arrays))
    if packed := quantization(header.tensors):
        config["quantization"] = packed
    weights = _weights(header, arrays, config)
    folder.mkdir(parents=True)
    _write_weights(folder, weights)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": config["eos_token_id"]})


def _factors(arrays: Arrays) -> np.ndarray[Any, Any] | None:
    return np.array(arrays[ROPE_FACTORS]) if ROPE_FACTORS in arrays else None


def _load(source: Path, header: GgufHeader) -> Arrays:
    """Return MLX's view of the file, after checking that it has every tensor that the header lists."""
    if not os.access(source, os.W_OK):
        raise GgufError("MLX opens it for writing, though it only reads: make it writable, or import a copy")
    try:
        loaded: Any = mx.load(str(source), format="gguf")
    except (RuntimeError, ValueError) as error:
        raise GgufError(f"MLX could not read it: {error}") from None
    arrays: Arrays = loaded
    for tensor in header.tensors:
        array = arrays.get(tensor.name)
        if array is None:
            raise GgufError(f"MLX lost tensor {tensor.name!r} of type {tensor.type}")
        bits = BITS.get(tensor.type, 0)
        columns = tensor.shape[-1] * bits // 32 if bits else tensor.shape[-1]
        if array.shape != (*tensor.shape[:-1], columns):
            raise GgufError(f"MLX read tensor {tensor.name!r} of type {tensor.type} in another shape")
    companions = sum(2 for tensor in header.tensors if tensor.type in BITS)
    if len(arrays) != len(header.tensors) + companions:
        raise GgufError(f"MLX read {len(arrays)} arrays, the header lists {len(header.tensors)} tensors")
    for tensor in header.tensors:
        if tensor.type == "Q4_K":
            arrays[tensor.name] = _q4_k(source, header.data_start, tensor)
    return arrays


def _q4_k(source: Path, data_start: int, tensor: GgufTensor) -> mx.array:
    """Decode a tensor that MLX 0.32 gets wrong: it applies the even groups' scales to the odd groups too.

    A block is two float16 scales, eight pairs of a 6-bit scale and minimum, and eight groups of 32 numbers;
    two groups share their bytes, the first in the low halves.
    """
    size = 144
    blocks = np.memmap(source, np.uint8, "r", data_start + tensor.offset, (tensor.nbytes // size, size))
    outer = blocks[:, :4].copy().view("<f2").astype(np.float32)
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minimums = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    values = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    decoded = values * (scales * outer[:, :1])[..., None]
    decoded -= (minimums * outer[:, 1:])[..., None]
    return mx.array(decoded.astype(np.float16).reshape(tensor.shape))


def _weights(header: GgufHeader, arrays: Arrays, config: dict[str, Any]) -> Arrays:
    norms_dtype = _norms_dtype(header, arrays)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights: Arrays = {}
    for count, tensor in enumerate(header.tensors, start=1):
        if tensor.name == ROPE_FACTORS:
            continue
        gguf_stem, target = target_of(tensor.name)
        for name, array in _parts(tensor, arrays):
            value = array
            if gguf_stem in heads:
                value = _unpermute(value, heads[gguf_stem])
            if array.ndim == 1 and array.dtype == mx.float32:
                value = value.astype(norms_dtype)
            weights[f"{target}.{name}"] = value
        if count % 100 == 0 or count == len(header.tensors):
            _say(stage="tensors converted", done=count, total=len(header.tensors))
    return weights


def _parts(tensor: GgufTensor, arrays: Arrays) -> Iterator[tuple[str, mx.array]]:
    stem, _, suffix = tensor.name.rpartition(".")
    yield suffix, arrays[tensor.name]
    if tensor.type in BITS:
        for companion in ("scales", "biases"):
            yield companion, arrays[f"{stem}.{companion}"]


def _unpermute(array: mx.array, heads: int) -> mx.array:
    """Undo the row order of GGUF's q and k: there each head interleaves the halves of its rotary pairs."""
    rows, rest = array.shape[0], array.shape[1:]
    return array.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def _norms_dtype(header: GgufHeader, arrays: Arrays) -> mx.Dtype:
    """Return float16 if every vector keeps its exact value in it, so that activations can stay 16 bit."""
    if all(tensor.type == "F32" for tensor in header.tensors):
        return mx.float32
    vectors = [
        arrays[tensor.name]
        for tensor in header.tensors
        if len(tensor.shape) == 1 and tensor.name != ROPE_FACTORS
    ]
    exact = [mx.all(vector.astype(mx.float16).astype(vector.dtype) == vector) for vector in vectors]
    return mx.float16 if all(flag.item() for flag in exact) else mx.float32


def _write_weights(folder: Path, weights: Arrays) -> None:
    shards: list[Arrays] = [{}]
    held = 0
    for name, array in weights.items():
        if held + array.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
            held = 0
        shards[-1][name] = array
        held += array.nbytes
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}" if len(shards) > 1 else "model"
        try:
            mx.save_safetensors(str(folder / f"{name}.safetensors"), shard, {"format": "mlx"})
        except RuntimeError as error:
            raise GgufError(f"its weights cannot be written; is the disk full? ({error})") from None
        _say(stage="files written", done=number, total=len(shards))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _say(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Import `argv[1]` into the folder `argv[2]`; return 0, or 1 after saying the error on stdout."""
    if UNTIL_INPUT_ENDS in sys.argv:
        end_with_input()
    try:
        import_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
    except GgufError as error:
        _say(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
