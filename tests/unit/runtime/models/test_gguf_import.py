"""The import of GGUF files, run as it is for real: in a process of its own, which keeps MLX out of ours."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as safetensors
from support import numpy_llama
from support.gguf_files import Array, GgufLlama, Type, write_gguf
from tokenizers import Tokenizer

from mlx_sidecar.runtime.models.gguf_header import READABLE_TYPES

IMPORT = "mlx_sidecar.runtime.models.gguf_import"
IDS = [5, 9, 260, 17, 17, 33, 80, 2, 250, 101, 64, 7]
# What MLX makes of every folder, loaded strictly, with the arithmetic in float32.
LOGITS = """
import sys
from pathlib import Path
import mlx.core as mx, numpy as np
from mlx_lm.utils import load_model
ids = mx.array([eval(sys.argv[1])])
for folder in map(Path, sys.argv[2:]):
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    np.save(folder / "logits.npy", np.array(model(ids)[0]))
"""
# And the weights, each as float32: what is packed is unpacked by MLX itself.
UNPACK = """
import json, sys
from pathlib import Path
import mlx.core as mx
for folder in map(Path, sys.argv[1:]):
    quantization = json.loads((folder / "config.json").read_text()).get("quantization", {})
    stored = mx.load(str(folder / "model.safetensors"))
    plain = {}
    for name, array in stored.items():
        stem = name.removesuffix(".weight")
        if stem + ".scales" in stored and name.endswith(".weight"):
            own = quantization.get(stem, quantization)
            scales, biases = (stored[f"{stem}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            array = mx.dequantize(array, scales, biases, own["group_size"], own["bits"])
        elif name.endswith((".scales", ".biases")):
            continue
        plain[name] = array.astype(mx.float32)
    mx.save_safetensors(str(folder / "plain.safetensors"), plain)
"""


def wide(kind: Type, **changes: Any) -> GgufLlama:
    """A llama whose rows are as long as K types need."""
    return GgufLlama(hidden=256, head_dim=64, intermediate=512, layers=1, type=kind, **changes)


def mixed() -> GgufLlama:
    types = {
        "token_embd.weight": Type.Q8_0,
        "output.weight": Type.Q6_K,
        "blk.0.attn_v.weight": Type.Q4_K,
        "blk.0.attn_k.weight": Type.F16,
        "blk.0.ffn_down.weight": Type.Q8_0,
        "blk.0.ffn_gate.weight": Type.Q4_1,
    }
    return wide(Type.Q4_0, types=types)


def with_factors(factor: float, kind: Type = Type.F16, **changes: Any) -> GgufLlama:
    model = GgufLlama(type=kind, hidden=128, head_dim=64, layers=1, **changes)
    model.metadata["llama.rope.freq_base"] = 500_000.0
    model.tensors["rope_freqs.weight"] = numpy_llama.llama3_factors(64, factor, 500_000.0)
    return model


def with_scaling(metadata: dict[str, Any]) -> GgufLlama:
    model = GgufLlama()
    model.metadata |= {f"llama.rope.{key}": value for key, value in metadata.items()}
    return model


def with_vectors(value: float, kind: Type = Type.F16) -> GgufLlama:
    model = GgufLlama(type=kind)
    model.tensors["blk.1.ffn_norm.weight"][3] = value
    return model


MODELS: dict[str, Callable[[], GgufLlama]] = {
    "F32": lambda: GgufLlama(),
    "F16": lambda: GgufLlama(type=Type.F16),
    "Q4_0": lambda: GgufLlama(type=Type.Q4_0),
    "Q4_1": lambda: GgufLlama(type=Type.Q4_1),
    "Q8_0": lambda: GgufLlama(type=Type.Q8_0),
    "Q4_K": lambda: wide(Type.Q4_K),
    "Q6_K": lambda: wide(Type.Q6_K),
    "mixed": mixed,
    "tied": lambda: GgufLlama(type=Type.Q4_0, tied=True),
    "biases": lambda: GgufLlama(type=Type.Q8_0, biases=True),
    "one key for all heads": lambda: GgufLlama(kv_heads=1, head_dim=8),
    "heads wider than the model": lambda: GgufLlama(kv_heads=4, head_dim=32, intermediate=160, layers=3),
    "llama3 factor 8": lambda: with_factors(8.0),
    "llama3 factor 32": lambda: with_factors(32.0, biases=True),
    "linear scaling": lambda: with_scaling({"scaling.type": "linear", "scaling.factor": 4.0}),
    "linear without a type": lambda: with_scaling({"scaling.factor": 4.0}),
    "linear as the oldest files say": lambda: with_scaling({"scale_linear": 4.0}),
    "factor of no scaling": lambda: with_scaling({"scaling.type": "none", "scaling.factor": 4.0}),
    "vectors beyond float16": lambda: with_vectors(0.1),
    "vectors too large for float16": lambda: with_vectors(1e5),
}


@dataclass
class Imported:
    """A model, the folder that its import made, and what MLX reads in it."""

    model: GgufLlama
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def stored(self) -> dict[str, Array]:
        return safetensors.load_file(self.folder / "model.safetensors")

    @property
    def plain(self) -> dict[str, Array]:
        return safetensors.load_file(self.folder / "plain.safetensors")

    @property
    def logits(self) -> Array:
        return np.load(self.folder / "logits.npy")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)


def import_file(source: Path, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Return exit code and events; anything on stderr would be a traceback."""
    done = run("-m", IMPORT, source, folder)
    assert done.stderr == ""
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def refusal(model: GgufLlama, tmp_path: Path) -> str:
    code, events = import_file(model.write(tmp_path / "model.gguf"), tmp_path / "folder")
    assert code == 1
    assert not (tmp_path / "folder").exists()
    return events[-1]["error"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Imported]:
    """Every model of the list, imported, and read by MLX in one process, which takes seconds to start."""
    results: dict[str, Imported] = {}
    for name, make in MODELS.items():
        place = tmp_path_factory.mktemp("model")
        results[name] = Imported(make(), place / "folder")
        code, events = import_file(results[name].model.write(place / "model.gguf"), place / "folder")
        assert code == 0, (name, events)
    folders = [str(result.folder) for result in results.values()]
    for arguments in ([UNPACK, *folders], [LOGITS, repr(IDS), *folders]):
        done = run("-c", *arguments)
        assert done.returncode == 0, done.stderr
    return results


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_those_of_the_file(imported: dict[str, Imported], name: str) -> None:
    plain, original = imported[name].plain, imported[name].model.original()
    assert plain.keys() == original.keys()
    # Packed values are carried over as they are; K types are rounded to float16 once.
    rounded = any(
        kind in (Type.Q4_K, Type.Q6_K)
        for kind in map(imported[name].model.type_of, imported[name].model.tensors)
    )
    for key, array in original.items():
        np.testing.assert_allclose(plain[key], array, rtol=6e-4 if rounded else 1e-6, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_mlx_lm_loads_the_folder_strictly_and_computes_the_logits_of_the_original(
    imported: dict[str, Imported], name: str
) -> None:
    model = imported[name].model
    frequencies = numpy_llama.default_frequencies(
        model.head_dim, model.metadata.get("llama.rope.freq_base", 1e4)
    )
    if name.startswith("linear"):
        frequencies = frequencies / 4
    if "rope_freqs.weight" in model.tensors:
        frequencies = frequencies / model.tensors["rope_freqs.weight"]
    expected = numpy_llama.logits(model.original(), IDS, model.heads, model.kv_heads, frequencies)
    rounded = model.type in (Type.Q4_K, Type.Q6_K) or name == "mixed"
    np.testing.assert_allclose(imported[name].logits, expected, atol=2e-2 if rounded else 2e-4)
    assert np.abs(expected).max() > 1


def test_the_permutation_and_the_rotary_scaling_matter_to_these_logits() -> None:
    # Else the comparison above would prove nothing about them.
    model = with_factors(8.0)
    plain = numpy_llama.default_frequencies(64, 500_000.0)
    factors = model.tensors["rope_freqs.weight"]
    right = numpy_llama.logits(model.original(), IDS, 4, 2, plain / factors)
    swapped = model.original()
    key = "model.layers.0.self_attn.q_proj.weight"
    swapped[key] = swapped[key][::-1]
    for wrong in (
        numpy_llama.logits(model.original(), IDS, 4, 2, plain / factors**4),
        numpy_llama.logits(swapped, IDS, 4, 2, plain / factors),
    ):
        assert np.abs(wrong - right).max() > 1e-3


def test_every_readable_type_is_among_the_models(imported: dict[str, Imported]) -> None:
    assert {kind for kind, _, _ in READABLE_TYPES.values()} <= imported.keys()


def test_the_config_says_what_the_metadata_says(imported: dict[str, Imported]) -> None:
    assert imported["F16"].config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": pytest.approx(1e-5),
        "vocab_size": 271,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": [270],
    }
    assert imported["tied"].config["tie_word_embeddings"] is True
    assert imported["biases"].config["attention_bias"] is True
    assert imported["one key for all heads"].config["num_key_value_heads"] == 1


def test_values_that_the_file_leaves_out_are_those_of_llama_cpp(tmp_path: Path) -> None:
    model = GgufLlama(kv_heads=4)
    del model.metadata["llama.attention.head_count_kv"], model.metadata["llama.attention.key_length"]
    code, _ = import_file(model.write(tmp_path / "model.gguf"), tmp_path / "folder")
    config = json.loads((tmp_path / "folder/config.json").read_text())
    assert code == 0
    assert (config["num_key_value_heads"], config["head_dim"], config["rope_theta"]) == (4, 16, 10000.0)


def test_every_token_that_ends_an_answer_is_listed(tmp_path: Path) -> None:
    model = GgufLlama()
    model.metadata |= {
        "tokenizer.ggml.bos_token_id": 267,
        "tokenizer.ggml.eot_token_id": 268,
        "tokenizer.ggml.eom_token_id": 270,
        "tokenizer.chat_template": "{{ messages }}",
    }
    import_file(model.write(tmp_path / "model.gguf"), tmp_path / "folder")
    files = {path.name: json.loads(path.read_text()) for path in (tmp_path / "folder").glob("*.json")}
    assert files["config.json"]["eos_token_id"] == [270, 268]
    assert files["config.json"]["bos_token_id"] == 267
    assert files["generation_config.json"] == {"eos_token_id": [270, 268]}
    assert files["tokenizer_config.json"]["chat_template"] == "{{ messages }}"
    assert Tokenizer.from_file(str(tmp_path / "folder/tokenizer.json")).encode("hello").tokens == ["hello"]


@pytest.mark.parametrize(("name", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8), ("tied", 4)])
def test_one_quantized_type_is_one_entry_of_the_config(
    imported: dict[str, Imported], name: str, bits: int
) -> None:
    assert imported[name].config["quantization"] == {"group_size": 32, "bits": bits}
    assert imported[name].stored["model.layers.0.mlp.up_proj.weight"].dtype == np.uint32


def test_a_mixture_of_types_is_told_layer_by_layer(imported: dict[str, Imported]) -> None:
    eight = {"group_size": 32, "bits": 8}
    assert imported["mixed"].config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": eight,
        "model.layers.0.mlp.down_proj": eight,
    }


@pytest.mark.parametrize("name", ["F32", "F16", "Q4_K", "Q6_K"])
def test_types_that_become_numbers_leave_the_config_without_quantization(
    imported: dict[str, Imported], name: str
) -> None:
    assert "quantization" not in imported[name].config
    dtype = np.float32 if name == "F32" else np.float16
    assert {array.dtype for array in imported[name].stored.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F16", np.float16),
        ("biases", np.float16),
        ("llama3 factor 8", np.float16),
        ("vectors beyond float16", np.float32),
        ("vectors too large for float16", np.float32),
    ],
)
def test_vectors_become_float16_only_if_all_of_them_stay_exact(
    imported: dict[str, Imported], name: str, dtype: type
) -> None:
    vectors = {key: array for key, array in imported[name].stored.items() if array.ndim == 1}
    assert {array.dtype for array in vectors.values()} == {np.dtype(dtype)}
    original = imported[name].model.original()
    assert all(np.array_equal(array.astype(np.float32), original[key]) for key, array in vectors.items())


@pytest.mark.parametrize("factor", [8, 32])
def test_llama3_factors_are_recognised(imported: dict[str, Imported], factor: int) -> None:
    assert imported[f"llama3 factor {factor}"].config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_linear_scaling_is_told_as_hugging_face_does(imported: dict[str, Imported]) -> None:
    for name in MODELS:
        if name.startswith("linear"):
            assert imported[name].config["rope_scaling"] == {"type": "linear", "factor": 4.0}


@pytest.mark.parametrize("wrong", [1.02, 0.0, float("nan")])
def test_rotary_factors_of_another_formula_are_refused(tmp_path: Path, wrong: float) -> None:
    model = with_factors(8.0)
    model.tensors["rope_freqs.weight"][20] *= wrong
    assert "rope_freqs.weight" in refusal(model, tmp_path)


def test_rotary_factors_for_another_size_of_head_are_refused(tmp_path: Path) -> None:
    model = with_factors(8.0)
    model.tensors["rope_freqs.weight"] = numpy_llama.llama3_factors(32, 8.0, 500_000.0)
    assert "'rope_freqs.weight' has shape (16,)" in refusal(model, tmp_path)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.rope.scaling.factor": -2.0}, "llama.rope.scaling.factor"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.attention.head_count": [4, 4]}, "layers differ in llama.attention.head_count"),
        ({"llama.attention.head_count_kv": [2, 4]}, "layers differ in llama.attention.head_count_kv"),
        ({"llama.feed_forward_length": [96, 64]}, "layers differ in llama.feed_forward_length"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count as a positive number"),
        ({"llama.attention.head_count": "4"}, "llama.attention.head_count as a positive number"),
        ({"llama.attention.head_count_kv": 3}, "heads"),
        ({"llama.attention.key_length": 15}, "heads"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ({"llama.block_count": None}, "llama.block_count"),
        ({"llama.block_count": 3}, "'blk.2.attn_norm.weight' is missing"),
        ({"llama.block_count": 4_000_000}, "'blk.2.attn_norm.weight' is missing"),
        ({"llama.block_count": 1}, "'blk.1."),
        ({"llama.context_length": 0}, "llama.context_length"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon"),
        ({"llama.attention.layer_norm_rms_epsilon": "small"}, "llama.attention.layer_norm_rms_epsilon"),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base"),
        ({"llama.embedding_length": 32}, "'token_embd.weight' has shape (271, 64)"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": None}, "merges is damaged"),
        ({"tokenizer.ggml.eos_token_id": 271}, "tokenizer.ggml.eos_token_id"),
        ({"tokenizer.ggml.eot_token_id": 4_294_967_295}, "tokenizer.ggml.eot_token_id"),
    ],
)
def test_metadata_that_a_llama_config_cannot_say_is_refused_by_name(
    tmp_path: Path, metadata: dict[str, Any], problem: str
) -> None:
    model = GgufLlama()
    model.metadata = {key: value for key, value in (model.metadata | metadata).items() if value is not None}
    assert problem in refusal(model, tmp_path)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    model = GgufLlama()
    model.metadata["general.architecture"] = "qwen2"
    assert "'qwen2'" in refusal(model, tmp_path)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_qkv.weight", "blk.7.attn_q.weight", "blk.0.ffn_gate_inp.weight", "v.patch"]
)
def test_a_tensor_that_a_llama_does_not_have_is_refused_by_name(tmp_path: Path, name: str) -> None:
    model = GgufLlama()
    model.tensors[name] = np.zeros((64, 64), np.float32)
    assert f"{name!r} has no place in a llama model" in refusal(model, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "token_embd.weight",
        "output_norm.weight",
        "blk.0.attn_norm.weight",
        "blk.1.attn_v.weight",
        "blk.0.ffn_up.weight",
    ],
)
def test_a_missing_tensor_is_refused_by_name(tmp_path: Path, name: str) -> None:
    model = GgufLlama()
    del model.tensors[name]
    assert f"tensor {name!r} is missing" in refusal(model, tmp_path)


def test_biases_of_some_projections_only_are_refused(tmp_path: Path) -> None:
    model = GgufLlama(biases=True)
    del model.tensors["blk.1.attn_output.bias"]
    assert "'blk.1.attn_output.bias' is missing" in refusal(model, tmp_path)


def test_a_tensor_of_the_wrong_shape_is_refused_by_name(tmp_path: Path) -> None:
    model = GgufLlama()
    model.tensors["blk.0.attn_q.weight"] = np.zeros((48, 64), np.float32)
    assert "'blk.0.attn_q.weight' has shape (48, 64); the metadata asks for (64, 64)" in refusal(
        model, tmp_path
    )


def test_a_quantized_vector_is_refused_by_name(tmp_path: Path) -> None:
    model = GgufLlama()
    tensors = {name: (model.type_of(name), array) for name, array in model.tensors.items()}
    tensors["output_norm.weight"] = (Type.Q8_0, np.zeros(68, np.uint8))
    write_gguf(tmp_path / "model.gguf", model.metadata, tensors)
    code, events = import_file(tmp_path / "model.gguf", tmp_path / "folder")
    assert code == 1
    assert "'output_norm.weight' has type Q8_0" in events[-1]["error"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every file")
def test_a_file_that_must_not_be_written_to_is_refused_with_a_way_out(tmp_path: Path) -> None:
    source = GgufLlama().write(tmp_path / "model.gguf")
    source.chmod(0o444)
    code, events = import_file(source, tmp_path / "folder")
    assert code == 1
    assert "make it writable, or import a copy" in events[-1]["error"]


def test_a_truncated_file_is_refused_as_incomplete(tmp_path: Path) -> None:
    content = GgufLlama().write(tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[:-1])
    code, events = import_file(tmp_path / "model.gguf", tmp_path / "folder")
    assert (code, len(events)) == (1, 1)
    assert "incomplete" in events[0]["error"]


def test_data_aligned_to_more_than_32_bytes_is_read_from_the_right_place(tmp_path: Path) -> None:
    model = GgufLlama(type=Type.Q4_0)
    model.metadata["general.alignment"] = 4096
    code, _ = import_file(model.write(tmp_path / "model.gguf"), tmp_path / "folder")
    weights = safetensors.load_file(tmp_path / "folder/model.safetensors")
    assert code == 0
    assert np.array_equal(
        weights["model.norm.weight"], model.tensors["output_norm.weight"].astype(np.float16)
    )


def test_progress_is_told_from_the_first_tensor_to_the_last_file(tmp_path: Path) -> None:
    code, events = import_file(GgufLlama().write(tmp_path / "model.gguf"), tmp_path / "folder")
    assert code == 0
    assert [event["stage"] for event in events] == ["tensors read", "tensors converted", "files written"]
    assert (events[0]["done"], events[0]["total"]) == (0, 21)
    assert all(event["done"] == event["total"] for event in events[1:])


def test_a_large_model_is_split_into_files_that_belong_together(tmp_path: Path) -> None:
    script = f"import sys, {IMPORT} as it; it._SHARD_BYTES = 60_000; sys.exit(it.main())"
    source = GgufLlama().write(tmp_path / "model.gguf")
    done = run("-c", script, source, tmp_path / "folder")
    assert done.returncode == 0, done.stderr
    shards = sorted((tmp_path / "folder").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    parts = [safetensors.load_file(path) for path in shards]
    original = GgufLlama().original()
    assert sum(len(part) for part in parts) == len(original)
    for part in parts:
        assert all(np.array_equal(array, original[name]) for name, array in part.items())
