"""GGUF file -> ordinary mlx-lm model folder, for the llama family.

Runs in a process of its own (`python -m mlx_sidecar.runtime.models.gguf_import FILE FOLDER`), because MLX's
GGUF reader is C code fed with a downloaded file. Progress and errors go to stdout, one JSON object a line.

Quantized tensors keep their packed values: MLX reads Q4_0, Q4_1 and Q8_0 as its own affine format with
groups of 32. Q4_K and Q6_K become float16.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from .gguf_header import GgufError, GgufHeader, GgufTensor, read_header
from .gguf_tokenizer import build_tokenizer

Arrays = dict[str, mx.array]

_NAMES = {
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
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_GROUP = 32
_ROPE_FACTORS = "rope_freqs.weight"
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
    arrays = _load(source, header)
    config = model_config(header, arrays)
    weights = _weights(header, arrays, config)
    folder.mkdir(parents=True)
    _write_weights(folder, weights)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": config["eos_token_id"]})


def model_config(header: GgufHeader, arrays: Arrays) -> dict[str, Any]:
    """Return `config.json` of the model: hyperparameters under their Hugging Face names."""
    meta = header.metadata
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}

    def need(key: str) -> Any:
        if f"llama.{key}" not in meta:
            raise GgufError(f"the file does not say llama.{key}")
        return meta[f"llama.{key}"]

    heads = need("attention.head_count")
    hidden = need("embedding_length")
    if meta.get("llama.expert_count"):
        raise GgufError("it is a mixture of experts; the import knows dense llama models only")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": need("block_count"),
        "intermediate_size": need("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": meta.get("llama.attention.key_length", hidden // heads),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "vocab_size": shapes["token_embd.weight"][0] if "token_embd.weight" in shapes else 0,
        "max_position_embeddings": need("context_length"),
        "rope_theta": meta.get("llama.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(meta, arrays.get(_ROPE_FACTORS)),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_ids(meta),
    }
    if any(isinstance(value, list) for key, value in config.items() if key.startswith("num_")):
        raise GgufError("its layers differ in their number of heads, which a llama config cannot say")
    if config["vocab_size"] != len(meta["tokenizer.ggml.tokens"]):
        raise GgufError("the embedding table and the vocabulary differ in size")
    if quantization := _quantization(header.tensors):
        config["quantization"] = quantization
    return config


def _eos_ids(meta: dict[str, Any]) -> list[int]:
    keys = ("eos", "eot", "eom")
    ids = [meta.get(f"tokenizer.ggml.{key}_token_id") for key in keys]
    return list(dict.fromkeys(position for position in ids if position is not None))


def _rope_scaling(meta: dict[str, Any], factors: mx.array | None) -> dict[str, Any] | None:
    kind = meta.get("llama.rope.scaling.type", "none")
    if factors is not None:
        return _llama3_scaling(meta, factors)
    if kind == "none":
        return None
    if kind == "linear":
        return {"type": "linear", "factor": meta.get("llama.rope.scaling.factor", 1.0)}
    raise GgufError(f"its rotary scaling is {kind!r}; known are 'linear' and the factors of Llama 3")


def _llama3_scaling(meta: dict[str, Any], factors: mx.array) -> dict[str, Any]:
    """Find the Llama 3 parameters that give these factors; they are stored only as their result.

    The formula is that of the Llama 3.1 reference code: wavelengths beyond `original / 1` are stretched by
    `factor`, those below `original / 4` stay, and between them the two are blended.
    """
    theta = meta.get("llama.rope.freq_base", 10000.0)
    original = 8192
    dimensions = 2 * factors.size
    wavelengths = 2 * mx.pi * theta ** (mx.arange(0, dimensions, 2) / dimensions)
    factor: Any = mx.max(factors).item()
    smooth = mx.clip((original / wavelengths - 1) / 3, 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not mx.allclose(expected, factors.astype(mx.float32), rtol=1e-3).item():
        raise GgufError(f"tensor {_ROPE_FACTORS!r} does not hold the rotary factors of a Llama 3 model")
    return {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def _load(source: Path, header: GgufHeader) -> Arrays:
    """Return MLX's view of the file, after checking that it has every tensor that the header lists."""
    try:
        loaded: Any = mx.load(str(source), format="gguf")
    except (RuntimeError, ValueError) as error:
        raise GgufError(f"MLX could not read it: {error}") from None
    arrays: Arrays = loaded
    for tensor in header.tensors:
        array = arrays.get(tensor.name)
        if array is None:
            raise GgufError(f"MLX lost tensor {tensor.name!r} of type {tensor.type}")
        bits = _BITS.get(tensor.type, 0)
        columns = tensor.shape[-1] * bits // 32 if bits else tensor.shape[-1]
        if array.shape != (*tensor.shape[:-1], columns):
            raise GgufError(f"MLX read tensor {tensor.name!r} of type {tensor.type} in another shape")
    companions = sum(2 for tensor in header.tensors if tensor.type in _BITS)
    if len(arrays) != len(header.tensors) + companions:
        raise GgufError(f"MLX read {len(arrays)} arrays, the header lists {len(header.tensors)} tensors")
    return arrays


def _weights(header: GgufHeader, arrays: Arrays, config: dict[str, Any]) -> Arrays:
    norms_dtype = _norms_dtype(header, arrays)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights: Arrays = {}
    for count, tensor in enumerate(header.tensors, start=1):
        if tensor.name == _ROPE_FACTORS:
            continue
        gguf_stem, target = _target(tensor.name)
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
    if tensor.type in _BITS:
        for companion in ("scales", "biases"):
            yield companion, arrays[f"{stem}.{companion}"]


def _target(name: str) -> tuple[str, str]:
    """Return GGUF stem and mlx-lm module of a tensor: blk.3.attn_q.weight -> attn_q, model.layers.3...."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        raise GgufError(f"tensor {name!r} has no place in a llama model")
    layer, stem, _ = match.groups()
    return stem, f"model.layers.{layer}.{_NAMES[stem]}" if layer else _NAMES[stem]


def _unpermute(array: mx.array, heads: int) -> mx.array:
    """Undo the row order of GGUF's q and k: there each head interleaves the halves of its rotary pairs."""
    rows, rest = array.shape[0], array.shape[1:]
    return array.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def _norms_dtype(header: GgufHeader, arrays: Arrays) -> mx.Dtype:
    """Return float16 if every vector keeps its exact value in it, so that activations can stay 16 bit."""
    if all(tensor.type == "F32" for tensor in header.tensors):
        return mx.float32
    vectors = [arrays[tensor.name] for tensor in header.tensors if len(tensor.shape) == 1]
    exact = [mx.all(vector.astype(mx.float16).astype(vector.dtype) == vector) for vector in vectors]
    return mx.float16 if all(flag.item() for flag in exact) else mx.float32


def _quantization(tensors: list[GgufTensor]) -> dict[str, Any] | None:
    bits = {_target(tensor.name)[1]: _BITS[tensor.type] for tensor in tensors if tensor.type in _BITS}
    if not bits:
        return None
    usual, _ = Counter(bits.values()).most_common(1)[0]
    exceptions = {path: {"group_size": _GROUP, "bits": own} for path, own in bits.items() if own != usual}
    return {"group_size": _GROUP, "bits": usual, **exceptions}


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
        mx.save_safetensors(str(folder / f"{name}.safetensors"), shard, {"format": "mlx"})
        _say(stage="files written", done=number, total=len(shards))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _say(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Import `argv[1]` into the folder `argv[2]`; return 0, or 1 after saying the error on stdout."""
    try:
        import_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
    except GgufError as error:
        _say(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
