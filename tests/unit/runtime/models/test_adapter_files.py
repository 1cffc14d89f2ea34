"""A folder is an adapter or it is refused, in words that say what is wrong with it."""

import json
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.batches import Row, make_batch
from support.tiny_adapter import Sizes, linear_layers, random_matrices, write_mlx_lm, write_peft
from support.tiny_networks import fresh_network

LAYERS: Sizes = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.up_proj": (32, 64)}
Q, UP = LAYERS
Write = Callable[..., Path]
Break = Callable[[Path], object]


@pytest.fixture(scope="module", autouse=True)
def mlx_is_started() -> None:
    fresh_network("llama")


def matrices(rank: int = 4, layers: Sizes = LAYERS) -> Any:
    return random_matrices(layers, 1, rank)


def read(folder: Path) -> Any:
    from mlx_sidecar.runtime.models.adapter_files import read_adapter

    return read_adapter(folder)


def refusal(folder: Path) -> str:
    from mlx_sidecar.runtime.engine.adapters import AdapterError

    with pytest.raises(AdapterError) as refused:
        read(folder)
    assert str(folder) not in str(refused.value)
    return str(refused.value)


def close(first: Any, second: Any, tolerance: float = 1e-5) -> bool:
    import mlx.core as mx

    return bool(mx.allclose(first, second, atol=tolerance, rtol=tolerance).item())


def tensors(folder: Path, name: str = "adapters") -> Any:
    import mlx.core as mx

    return mx.load(str(folder / f"{name}.safetensors"))


def write_tensors(folder: Path, arrays: Any, name: str = "adapters") -> None:
    import mlx.core as mx

    mx.save_safetensors(str(folder / f"{name}.safetensors"), arrays)


def test_an_adapter_of_mlx_lm_is_read_with_its_scale(tmp_path: Path) -> None:
    found = read(write_mlx_lm(tmp_path, matrices(), scale=20.0))
    assert list(found.layers) == list(LAYERS)
    for path, (a, b) in matrices().items():
        part = found.layers[path]
        assert part.rank == 4
        assert close(part.a.T, a)
        assert close(part.b, 20.0 * b, 1e-4)
    assert found.nbytes == 4 * 4 * (32 + 32 + 32 + 64)


@pytest.mark.parametrize(("config", "scale"), [({}, 2.0), ({"use_rslora": True}, 8 / 4**0.5)])
def test_an_adapter_of_peft_computes_what_its_merged_weights_compute(
    config: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    import mlx.core as mx

    merged: Any = fresh_network("llama")
    layers = linear_layers(merged)
    folder = write_peft(tmp_path, matrices(layers=layers), alpha=8, **config)
    modules = dict(merged.named_modules())
    for path, (a, b) in matrices(layers=layers).items():
        modules[path].weight = modules[path].weight + scale * (a @ b).T
    batch: Any = make_batch(fresh_network("llama"), 64)
    batch.attach_adapter("it", read(folder))
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    with batch.adapters.of([Row((3,), 1, adapter="it").sequence()]):
        found = batch.model(tokens)
    assert close(found, merged(tokens), 1e-3)


def test_layers_may_have_ranks_of_their_own_where_the_configuration_says_so(tmp_path: Path) -> None:
    both = matrices(4, {Q: (32, 32)}) | matrices(2, {UP: (32, 64)})
    found = read(write_peft(tmp_path, both, alpha=8, rank_pattern={"up_proj": 2}))
    assert (found.layers[Q].rank, found.layers[UP].rank) == (4, 2)
    assert close(found.layers[Q].b, both[Q][1] * 8 / 4)
    assert close(found.layers[UP].b, both[UP][1] * 8 / 2)


def test_names_with_the_adapter_in_them_are_read_too(tmp_path: Path) -> None:
    folder = write_peft(tmp_path, matrices())
    renamed = {
        name.replace(".weight", ".default.weight"): array
        for name, array in tensors(folder, "adapter_model").items()
    }
    write_tensors(folder, renamed, "adapter_model")
    assert list(read(folder).layers) == list(LAYERS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_keep_the_precision_of_their_file(dtype: str, tmp_path: Path) -> None:
    import mlx.core as mx

    kind = getattr(mx, dtype)
    stored = {path: (a.astype(kind), b.astype(kind)) for path, (a, b) in matrices().items()}
    part = read(write_mlx_lm(tmp_path, stored, scale=3.0)).layers[Q]
    assert part.a.dtype == part.b.dtype == kind
    assert close(part.b, (3.0 * stored[Q][1].astype(mx.float32)).astype(kind), 0)


def test_what_one_thread_has_read_another_attaches_and_runs(tmp_path: Path) -> None:
    import mlx.core as mx

    folder = write_mlx_lm(tmp_path, matrices())
    found: list[Any] = []

    def load() -> None:
        found.append(read(folder))
        mx.clear_streams()

    loader = threading.Thread(target=load)
    loader.start()
    loader.join(60)
    batch: Any = make_batch(fresh_network("llama"), 64)
    batch.attach_adapter("it", found[0])
    sequence = Row((3, 1, 4), 5, adapter="it").sequence()
    batch.add(sequence)
    while len(batch):
        batch.step()
    assert len(sequence.tokens) == 5


def without(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def with_text(text: bytes) -> Break:
    return lambda folder: (folder / "adapter_config.json").write_bytes(text)


def cut(folder: Path) -> None:
    file = folder / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def overlapping(folder: Path) -> None:
    header = json.dumps(
        {name: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} for name in ("a", "b")}
    ).encode()
    (folder / "adapters.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


def huge_header(folder: Path) -> None:
    (folder / "adapters.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + bytes(64))


def tiny(folder: Path) -> None:
    (folder / "adapters.safetensors").write_bytes(b"7 byte!")


def pickled(folder: Path) -> None:
    (folder / "adapters.safetensors").rename(folder / "adapter_model.bin")


def both_formats(folder: Path) -> None:
    write_peft(folder, matrices())


def a_folder_for_weights(folder: Path) -> None:
    (folder / "adapters.safetensors").unlink()
    (folder / "adapters.safetensors").mkdir()


NO_WEIGHTS = "the folder must have one of adapters.safetensors"
NO_JSON = "its adapter_config.json is not a JSON object"
DAMAGED = "its weights are damaged or incomplete"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without("adapter_config.json"), "the folder has no adapter_config.json"),
        (without("adapters.safetensors"), NO_WEIGHTS),
        (a_folder_for_weights, NO_WEIGHTS),
        (both_formats, NO_WEIGHTS),
        (pickled, NO_WEIGHTS),
        (with_text(b"{"), NO_JSON),
        (with_text(b"[]"), NO_JSON),
        (with_text(b'{"a": "\xff"}'), NO_JSON),
        (with_text(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), NO_JSON),
        (with_text(b" " * (16 * 1024 * 1024 + 1)), "its adapter_config.json is too large to be one"),
        (with_text(b"{}"), "Object missing required field `lora_parameters`"),
        (with_text(b'{"lora_parameters": {"alpha": 16}}'), "Object missing required field `scale`"),
        (with_text(b'{"lora_parameters": {"scale": "2"}}'), "Expected `float`, got `str`"),
        (cut, DAMAGED),
        (overlapping, DAMAGED),
        (huge_header, "its weights have no header that makes sense"),
        (tiny, "its weights have no header that makes sense"),
    ],
)
def test_a_damaged_folder_is_refused(damage: Break, reason: str, tmp_path: Path) -> None:
    damage(write_mlx_lm(tmp_path, matrices()))
    assert reason in refusal(tmp_path)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mlx_lm(tmp_path, matrices())

    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refusal(tmp_path) == "its files cannot be read"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"fine_tune_type": "dora"}, "its fine_tune_type is 'dora'; only 'lora' is supported"),
        ({"fine_tune_type": "full"}, "its fine_tune_type is 'full'; only 'lora' is supported"),
        ({"lora_parameters": {"scale": 1.0, "rank": 8}}, "which is rank 4; adapter_config.json says 8"),
        ({"lora_parameters": {"scale": 1e39}}, "has numbers that are not finite"),
    ],
)
def test_what_mlx_lm_has_beyond_lora_is_refused(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert reason in refusal(write_mlx_lm(tmp_path, matrices(), **config))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "its adapter_config.json sets 'use_dora', which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "sets 'modules_to_save'"),
        ({"alpha_pattern": {"q_proj": 4}}, "sets 'alpha_pattern'"),
        ({"layer_replication": [[0, 1]]}, "sets 'layer_replication'"),
        ({"alora_invocation_tokens": [1, 2]}, "sets 'alora_invocation_tokens'"),
        ({"something_of_next_year": {"on": True}}, "sets 'something_of_next_year'"),
        ({"bias": "lora_only"}, "it changes biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "it belongs to a base model that was changed"),
        ({"peft_type": "IA3"}, "Invalid enum value 'IA3'"),
        ({"r": 8}, "which is rank 4; adapter_config.json says 8"),
        ({"r": None}, "Expected `int`, got `null`"),
    ],
)
def test_what_peft_has_beyond_lora_is_refused(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert reason in refusal(write_peft(tmp_path, matrices(), **config))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva"])
def test_how_the_matrices_began_does_not_matter_if_the_base_is_the_same(
    init: bool | str, tmp_path: Path
) -> None:
    assert read(write_peft(tmp_path, matrices(), init_lora_weights=init)).layers.keys() == LAYERS.keys()


@pytest.mark.parametrize(
    ("write", "stem", "name", "reason"),
    [
        (write_mlx_lm, "adapters", f"{Q}.m", "it is a DoRA adapter"),
        (write_mlx_lm, "adapters", f"{Q}.weight", "it holds what is not part of a LoRA adapter"),
        (write_mlx_lm, "adapters", f"{Q}.bias", "it changes biases"),
        (write_mlx_lm, "adapters", "lora_a", "it holds what is not part of a LoRA adapter"),
        (write_peft, "adapter_model", f"base_model.model.{Q}.lora_magnitude_vector", "it is a DoRA adapter"),
        (
            write_peft,
            "adapter_model",
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "the embeddings",
        ),
        (write_peft, "adapter_model", f"base_model.model.{Q}.lora_B.bias", "it changes biases"),
        (write_peft, "adapter_model", "base_model.model.lm_head.modules_to_save.weight", "replaces weights"),
        (write_peft, "adapter_model", f"{Q}.lora_A.weight", "it holds what is not part of a LoRA adapter"),
        (write_peft, "adapter_model", f"base_model.model.{Q}.lora_A.other.weight", f"has layer '{Q}' twice"),
    ],
)
def test_tensors_beyond_lora_are_refused(
    write: Write, stem: str, name: str, reason: str, tmp_path: Path
) -> None:
    import mlx.core as mx

    folder = write(tmp_path, matrices())
    write_tensors(folder, tensors(folder, stem) | {name: mx.zeros((4, 32))}, stem)
    assert reason in refusal(folder)


def replaced(**arrays: Any) -> Any:
    """Return the tensors of an adapter for one layer; None leaves one out."""
    a, b = matrices(layers={Q: (32, 32)})[Q]
    parts: dict[str, Any] = {"a": a, "b": b} | arrays
    return {f"{Q}.lora_{part}": array for part, array in parts.items() if array is not None}


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"b": None}, f"it has one of the two matrices of layer '{Q}' only"),
        (
            {"b": (5, 32)},
            f"layer '{Q}' has matrices of shape (32, 4) and (5, 32), which do not have the same",
        ),
        ({"a": (32, 0), "b": (0, 32)}, "rank 0 makes no sense there"),
        ({"a": (32, 33), "b": (33, 32)}, "rank 33 makes no sense there"),
        ({"a": (3, 4, 32), "b": (3, 32, 4)}, "not for experts in one block"),
        ({"a": (4,)}, "adapters are for linear layers only"),
    ],
)
def test_matrices_of_the_wrong_shape_are_refused(shapes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    import mlx.core as mx

    write_mlx_lm(tmp_path, {}, lora_parameters={"scale": 1.0})
    arrays = {part: None if shape is None else mx.zeros(shape) for part, shape in shapes.items()}
    write_tensors(tmp_path, replaced(**arrays))
    assert reason in refusal(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["a", "b"])
def test_numbers_that_are_none_are_refused(part: str, value: float, tmp_path: Path) -> None:
    import mlx.core as mx

    write_mlx_lm(tmp_path, matrices(), lora_parameters={"scale": 1.0})
    damaged = replaced()[f"{Q}.lora_{part}"]
    damaged[3, 1] = mx.array(value)
    write_tensors(tmp_path, replaced(**{part: damaged}))
    assert refusal(tmp_path) == f"layer '{Q}' has numbers that are not finite"


def test_an_empty_adapter_is_refused(tmp_path: Path) -> None:
    assert refusal(write_mlx_lm(tmp_path, {})) == "it is empty"


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    import mlx.core as mx

    write_mlx_lm(tmp_path, matrices())
    nothing = mx.zeros((1,))
    write_tensors(tmp_path, {f"{number}.lora_a": nothing for number in range(100_000)})
    assert refusal(tmp_path) == "it has 100000 tensors; the limit is 16384"


def test_a_name_of_any_length_is_refused_at_once(tmp_path: Path) -> None:
    import mlx.core as mx

    write_mlx_lm(tmp_path, matrices())
    write_tensors(tmp_path, {".bias" * 200_000: mx.zeros((1,))})
    assert refusal(tmp_path) == "a tensor has a name of 1000000 characters"


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint32"])
def test_quantized_and_whole_numbers_are_refused(dtype: str, tmp_path: Path) -> None:
    import mlx.core as mx

    write_mlx_lm(tmp_path, matrices())
    kind: Any = getattr(mx, dtype)
    write_tensors(tmp_path, {f"{Q}.lora_a": mx.zeros((32, 4), kind)})
    assert "supported are F32, F16, BF16" in refusal(tmp_path)


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx.core as mx

    write_mlx_lm(tmp_path, matrices())
    load = mx.load

    def load_another(path: str) -> Any:
        write_tensors(tmp_path, replaced())
        return load(path)

    monkeypatch.setattr(mx, "load", load_another)
    assert refusal(tmp_path) == "its weights were changed while they were read"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_an_adapter_still_or_a_typed_error(data: st.DataObject, tmp_path: Path) -> None:
    from mlx_sidecar.runtime.engine.adapters import AdapterError

    write = data.draw(st.sampled_from([write_mlx_lm, write_peft]))
    for old in tmp_path.iterdir():
        old.unlink()
    write(tmp_path, matrices())
    file = data.draw(st.sampled_from(sorted(tmp_path.iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, min(len(content), 900) - 1))
    content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    file.write_bytes(content)
    try:
        assert read(tmp_path).nbytes > 0
        said = ""
    except AdapterError as error:
        said = str(error)
    assert str(tmp_path) not in said
