"""Model folders of every architecture that `tiny_networks` has: random weights, in the layouts that occur."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from support.reference import Alone
from support.tiny_model import CHAT_TEMPLATE, END, make_tokenizer
from support.tiny_networks import blank_network, network_of, parameters, tiny_config

if TYPE_CHECKING:
    import mlx.core as mx

GROUP_SIZE = 32
"""Weights that share a scale where weights are quantized."""

_WIDTH = 32
"""What a tiny network's sizes are multiples of; larger ones are multiples of it too."""


def make_folder(
    path: Path,
    architecture: str,
    *,
    seed: int = 0,
    bytes_target: int | None = None,
    dtype: str = "float32",
    bits: int | None = None,
    shards: int = 1,
) -> Path:
    """Write a model folder and return it.

    The weights take about `bytes_target` bytes, wider layers making up for what is missing, and are stored as
    `dtype`, or quantized to `bits` with scales of that type. Several `shards` have an index.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": END, "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokens: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": tokenizer.token_to_id(END),
    }
    config = _wide_enough(architecture, bytes_target or 0, tokens)
    weights = _weights(config, seed, dtype, bits)
    if bits is not None:
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": bits}
    (path / "config.json").write_text(json.dumps(config))
    _save(path, weights, shards)
    return path


def silence_the_end(folder: Path) -> None:
    """Change the weights so that no answer of the model in `folder` ends before its length."""
    import mlx.core as mx

    file = folder / "model.safetensors"
    weights = cast("dict[str, mx.array]", mx.load(str(file)))
    # Its logit is always 0; that of the likeliest token is well above.
    weights["lm_head.weight"][make_tokenizer().token_to_id(END)] = 0
    mx.eval(weights)
    cast(Any, mx).save_safetensors(str(file), weights, {"format": "mlx"})


def float32_network(folder: Path) -> Any:
    """Return the network as mlx-lm loads it, in float32."""
    import mlx.core as mx
    import mlx_lm.utils as mlx_lm

    module = cast(Any, mlx_lm.load_model(folder))[0]
    module.set_dtype(mx.float32)
    return mlx_lm.dequantize_model(module)


def clear_answer(module: Any, prompt_tokens: int, answer_tokens: int) -> tuple[list[int], list[int]]:
    """Return a prompt and what the network alone answers: all tokens of it, and no close call among them."""
    end = make_tokenizer().token_to_id(END)
    for seed in range(100):
        prompt = random.Random(seed).choices(range(256), k=prompt_tokens)
        alone = Alone(module, prompt)
        answer = alone.tokens(answer_tokens)
        if end not in answer and not alone.has_near_tie(answer_tokens):
            return prompt, answer
    raise AssertionError("every answer ends early, or hangs on rounding")


def _wide_enough(architecture: str, bytes_target: int, tokens: dict[str, Any]) -> dict[str, Any]:
    """Return the narrowest config whose float32 weights take `bytes_target` bytes."""
    config = tiny_config(architecture, **tokens)
    width = _WIDTH
    while _nbytes(config) < bytes_target:
        width += _WIDTH
        sizes = {"hidden_size": width, "intermediate_size": 2 * width}
        config = tiny_config(architecture, **tokens, **sizes)
    return config


def _nbytes(config: dict[str, Any]) -> int:
    return sum(array.nbytes for _, array in parameters(blank_network(config)))


def _weights(config: dict[str, Any], seed: int, dtype: str, bits: int | None) -> "dict[str, mx.array]":
    module: Any = network_of(config, seed)
    import mlx.core as mx
    from mlx import nn

    module.set_dtype(getattr(mx, dtype))
    if bits is not None:
        nn.quantize(module, GROUP_SIZE, bits)
    return dict(parameters(module))


def _save(path: Path, weights: "dict[str, mx.array]", shards: int) -> None:
    import mlx.core as mx

    files = _files(shards)
    parts = {file: list(weights)[number::shards] for number, file in enumerate(files)}
    for file, names in parts.items():
        part = {name: weights[name] for name in names}
        cast(Any, mx).save_safetensors(str(path / file), part, {"format": "mlx"})
    if shards > 1:
        places = {name: file for file, names in parts.items() for name in names}
        total = sum(array.nbytes for array in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _files(shards: int) -> Iterable[str]:
    if shards == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
