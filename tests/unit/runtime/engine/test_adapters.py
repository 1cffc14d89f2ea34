"""Adapters come to a model and go, whole or not at all, and what has none of them is as it was."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.batches import Row, make_batch, play
from support.tiny_adapter import Sizes, linear_layers, only, random_matrices, write_mlx_lm
from support.tiny_networks import fresh_network

from mlx_sidecar.runtime.engine import model_batch
from mlx_sidecar.runtime.engine.sequence import AdapterReport

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)


def weights(layers: Sizes, seed: int = 0, rank: int = 4) -> Any:
    """Return what our reader gives for an adapter with these matrices."""
    import mlx.core as mx

    from mlx_sidecar.runtime.engine.adapted_linear import LowRank
    from mlx_sidecar.runtime.engine.adapters import AdapterWeights

    matrices = random_matrices(layers, seed, rank)
    mx.eval(matrices)
    return AdapterWeights({path: LowRank(a.T, b) for path, (a, b) in matrices.items()})


@cache
def llama_layers() -> Sizes:
    return linear_layers(fresh_network("llama"))


def classes(network: Any) -> dict[str, str]:
    return {path: type(module).__name__ for path, module in network.named_modules()}


def logits(batch: Any, *adapters: str | None) -> Any:
    """Return the logits of one prompt in a row for each of the adapters."""
    import mlx.core as mx

    tokens = mx.repeat(mx.array([PROMPT]), len(adapters), axis=0)
    with batch.adapters.of([Row(PROMPT, 1, adapter=adapter).sequence() for adapter in adapters]):
        found = batch.model(tokens)
    mx.eval(found)
    return found


def same(first: Any, second: Any, tolerance: float = 1e-4) -> bool:
    import mlx.core as mx

    return bool((mx.abs(first - second).max() < tolerance).item())


def active_memory() -> int:
    import mlx.core as mx

    # What has been computed may still hold what it was computed from.
    mx.synchronize()
    return mx.get_active_memory()


def error_of(batch: Any, adapter: Any) -> str:
    from mlx_sidecar.runtime.engine.adapters import AdapterError

    with pytest.raises(AdapterError) as refused:
        batch.check_adapter(adapter)
    with pytest.raises(AdapterError) as refused_too:
        batch.attach_adapter("refused", adapter)
    assert str(refused.value) == str(refused_too.value)
    return str(refused.value)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_next"])
def test_rows_without_an_adapter_compute_the_very_same_while_there_are_adapters(architecture: str) -> None:
    import mlx.core as mx

    batch: Any = make_batch(fresh_network(architecture), 64)
    before = logits(batch, None)
    batch.attach_adapter("one", weights(linear_layers(batch.model)))
    assert mx.array_equal(logits(batch, None), before).item()
    assert not same(logits(batch, "one"), before, 0.1)
    beside = logits(batch, "one", None)
    assert same(beside[1], before[0])
    assert same(beside[0], logits(batch, "one")[0])


def test_the_last_adapter_leaves_the_model_and_its_memory_as_they_were() -> None:
    import mlx.core as mx

    network = fresh_network("llama")
    batch: Any = make_batch(network, 64)
    before, there, alone = logits(batch, None), classes(network), active_memory()
    adapters = [weights(llama_layers(), 1), weights(only(llama_layers(), "v_proj"), 2, rank=9)]
    held = active_memory()
    batch.attach_adapter("a", adapters[0])
    batch.attach_adapter("b", adapters[1])
    # A buffer that MLX uses again may be up to twice as large as what is in it.
    assert 1 <= (active_memory() - held) / batch.adapters.nbytes < 2
    del adapters
    batch.detach_adapter("a")
    assert set(classes(network).values()) > {"AdaptedLinear"}
    batch.detach_adapter("b")
    assert classes(network) == there
    assert mx.array_equal(logits(batch, None), before).item()
    assert (batch.adapters.nbytes, active_memory()) == (0, alone)


def test_an_adapter_computes_the_same_whoever_came_and_went_since() -> None:
    batch: Any = make_batch(fresh_network("llama"), 64)
    some, others = only(llama_layers(), "q_proj", "down_proj"), only(llama_layers(), "v_proj", "q_proj")
    batch.attach_adapter("one", weights(some, 1))
    one = logits(batch, "one")
    batch.attach_adapter("two", weights(others, 2, rank=13))
    two = logits(batch, "two")
    assert same(logits(batch, "one", "two", None, "one")[3], one[0])
    batch.attach_adapter("three", weights(others, 3, rank=1))
    batch.detach_adapter("two")
    assert same(logits(batch, "three", "one")[1], one[0])
    batch.attach_adapter("two again", weights(others, 2, rank=13))
    assert same(logits(batch, "two again", "one")[0], two[0])
    batch.detach_adapter("one")
    assert same(logits(batch, "two again"), two)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("base", ["float32", "bfloat16", "4 bit"])
def test_an_adapter_is_what_it_is_in_mlx_lm(base: str, dtype: str, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.tuner.utils import load_adapters

    from mlx_sidecar.runtime.models.adapter_files import read_adapter

    def network() -> Any:
        found: Any = fresh_network("llama")
        if base == "4 bit":
            nn.quantize(found, group_size=32, bits=4)
        elif base != "float32":
            found.set_dtype(getattr(mx, base))
        return found

    matrices = random_matrices(llama_layers(), 7, 4)
    kind = getattr(mx, dtype)
    write_mlx_lm(
        tmp_path, {path: (a.astype(kind), b.astype(kind)) for path, (a, b) in matrices.items()}, scale=2.0
    )
    batch: Any = make_batch(network(), 64)
    batch.attach_adapter("it", read_adapter(tmp_path))
    reference: Any = load_adapters(network(), str(tmp_path)).eval()
    expected = reference(mx.array([PROMPT]))
    found = logits(batch, "it")
    assert found.dtype == expected.dtype
    # As far as 16 bits say anything: they are rounded elsewhere.
    exact = base != "bfloat16" and dtype == "float32"
    spread = mx.std(expected.astype(mx.float32))
    difference = mx.sqrt(mx.mean((found - expected).astype(mx.float32) ** 2))
    assert (difference < (1e-5 if exact else 0.1) * spread).item()


def test_an_adapter_for_another_model_is_refused_with_what_does_not_fit() -> None:
    network = fresh_network("llama")
    batch: Any = make_batch(network, 64)
    there = classes(network)
    layers = llama_layers()
    first = "model.layers.0.self_attn.q_proj"
    assert error_of(batch, weights(layers | {first: (48, 32)})) == (
        f"layer '{first}' takes 32 numbers and gives 32, "
        "but the adapter is for one that takes 48 and gives 32"
    )
    missing = ["model.layers.2.mlp.up_proj", "model.layers.x.mlp.up_proj", "model.layers.-1.mlp.up_proj"]
    missing += ["model.layers.00.mlp.up_proj", "model.layers." + "9" * 5000, "q_proj", "model..norm", ""]
    missing += [f"{first}.weight.0", f"{first}.linear"]
    for path in missing:
        assert error_of(batch, weights(layers | {path: (32, 64)})) == f"the model has no layer {path!r}"
    for path, kind in (
        ("model.embed_tokens", "Embedding"),
        ("model.norm", "RMSNorm"),
        ("model.layers", "list"),
    ):
        assert error_of(batch, weights({path: (32, 32)})) == (
            f"layer {path!r} is of kind {kind}; adapters are for linear layers only"
        )
    assert (classes(network), batch.adapters.nbytes, batch.report().adapters) == (there, 0, ())


def test_what_is_inside_an_adapted_layer_is_no_layer_of_the_model() -> None:
    batch: Any = make_batch(fresh_network("llama"), 64)
    batch.attach_adapter("one", weights(llama_layers()))
    inside = "model.layers.0.self_attn.q_proj.linear"
    assert error_of(batch, weights({inside: (32, 32)})) == f"the model has no layer {inside!r}"


def test_code_that_mixes_rows_up_before_a_layer_is_found_out_and_nothing_is_left() -> None:
    from mlx_sidecar.runtime.engine.adapters import AdapterError

    network = fresh_network("mamba")
    batch: Any = make_batch(network, 64)
    there = classes(network)
    with pytest.raises(AdapterError, match="the code of this model does not take adapters in these layers"):
        batch.attach_adapter("one", weights(linear_layers(network)))
    assert (classes(network), batch.adapters.nbytes, batch.report().adapters) == (there, 0, ())
    # Where it does not, an adapter may be.
    batch.attach_adapter("one", weights(only(linear_layers(network), "in_proj")))


def test_experts_in_one_block_are_no_linear_layers() -> None:
    batch: Any = make_batch(fresh_network("qwen3_moe"), 64)
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    assert error_of(batch, weights({path: (32, 32)})) == (
        f"layer {path!r} is of kind SwitchLinear; adapters are for linear layers only"
    )


def test_a_layer_that_the_model_has_in_two_places_is_refused() -> None:
    from mlx import nn

    network: Any = fresh_network("llama")
    network.model.layers[1].mlp.up_proj = network.model.layers[0].mlp.up_proj
    batch: Any = make_batch(network, 64)
    one, other = (f"model.layers.{block}.mlp.up_proj" for block in (0, 1))
    reason = f"layers {one!r} and {other!r} of the model are one and the same"
    assert error_of(batch, weights({one: (32, 64), other: (32, 64)})) == reason
    batch.attach_adapter("one", weights({one: (32, 64)}))
    assert error_of(batch, weights({one: (32, 64), other: (32, 64)})) == reason
    batch.detach_adapter("one")
    assert isinstance(network.model.layers[0].mlp.up_proj, nn.Linear)


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_computes_the_same_on_fused_projections(packed: bool) -> None:
    import mlx.core as mx
    from mlx import nn

    from mlx_sidecar.runtime.engine.fused import fuse_projections

    plain, fused = (make_batch(fresh_network("llama"), 64) for _ in range(2))
    batches: list[Any] = [plain, fused]
    for batch in batches:
        if packed:
            nn.quantize(batch.model, group_size=32, bits=4)
    fuse_projections(batches[1].model)
    there = classes(batches[1].model)
    for batch in batches:
        batch.attach_adapter("one", weights(llama_layers(), 1))
        batch.attach_adapter("two", weights(only(llama_layers(), "k_proj", "down_proj"), 2))
    adapters = ("one", None, "two")
    assert mx.allclose(logits(fused, *adapters), logits(plain, *adapters), atol=1e-4).item()
    wrong = "model.layers.0.self_attn.k_proj"
    assert "takes 32 numbers and gives 16" in error_of(fused, weights({wrong: (32, 32)}))
    batches[1].detach_adapter("one")
    batches[1].detach_adapter("two")
    assert classes(batches[1].model) == there


def test_the_report_names_every_adapter_with_its_bytes_and_rank() -> None:
    batch: Any = make_batch(fresh_network("llama"), 64)
    assert batch.report().adapters == ()
    one, two = only(llama_layers(), "q_proj"), only(llama_layers(), "q_proj", "v_proj")
    batch.attach_adapter("one", weights(one, rank=3))
    q_proj, v_proj = 2 * (32 + 32) * 4, 2 * (32 + 16) * 4
    # There are as many zeros as an adapter has, for rows that have none.
    assert batch.report().adapters == (AdapterReport("one", 2 * 3 * q_proj, 3),)
    batch.attach_adapter("two", weights(two, rank=6))
    # In one stack with matrices of rank 6 those of rank 3 take as much.
    assert batch.report().adapters == (
        AdapterReport("one", 3 * 6 * q_proj // 2, 3),
        AdapterReport("two", 3 * 6 * q_proj // 2 + 3 * 6 * v_proj, 6),
    )
    assert sum(report.nbytes for report in batch.report().adapters) == batch.adapters.nbytes
    batch.detach_adapter("two")
    assert batch.report().adapters == (AdapterReport("one", 2 * 3 * q_proj, 3),)


def test_a_name_is_taken_once_and_given_back_once() -> None:
    batch: Any = make_batch(fresh_network("llama"), 64)
    batch.attach_adapter("one", weights(llama_layers(), 1))
    one = logits(batch, "one")
    with pytest.raises(ValueError, match="already"):
        batch.attach_adapter("one", weights(llama_layers(), 2))
    assert same(logits(batch, "one"), one)
    batch.detach_adapter("one")
    with pytest.raises(ValueError, match="no adapter 'one'"):
        batch.detach_adapter("one")
    with pytest.raises(ValueError, match="no adapter 'one'"):
        batch.add(Row(PROMPT, 3, adapter="one").sequence())
    assert len(batch) == 0


def test_an_adapter_goes_as_soon_as_its_sequences_have_ended_and_nobody_else_notices() -> None:
    batch: Any = make_batch(fresh_network("llama"), 3)
    for seed, name in enumerate(("stays", "goes")):
        batch.attach_adapter(name, weights(llama_layers(), seed))
    stay = [Row(PROMPT, 14, adapter=adapter) for adapter in ("stays", None)]
    expected = play(batch, stay)
    running = Row(PROMPT, 14, adapter="goes", leaves_after=11)
    reading = Row(PROMPT * 9, 14, adapter="goes", joins=9, leaves_after=2)

    def detach(step: int) -> None:
        if step == 10:
            with pytest.raises(ValueError, match="in use"):
                batch.detach_adapter("goes")
        elif step == 11:
            batch.detach_adapter("goes")
            batch.attach_adapter("new", weights(llama_layers(), 5))

    *stayed, ran, read = play(batch, [*stay, running, reading], detach)
    assert stayed == expected
    assert ran.ends == read.ends == ["cancelled"]
    assert ran.tokens
    assert not read.tokens


def test_sequences_that_begin_again_have_their_adapter_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_sidecar.runtime.engine.compiled_step import PlainStep

    batch: Any = make_batch(fresh_network("llama"), 64)
    for seed, name in enumerate(("one", "two")):
        batch.attach_adapter(name, weights(llama_layers(), seed))
    rows = [Row(PROMPT, 12, adapter=adapter) for adapter in ("one", "two", None)]
    expected = play(batch, rows)
    steps = iter(range(1000))
    step = PlainStep.__call__

    def fails_once(self: Any, inputs: Any, caches: Any) -> Any:
        if next(steps) == 5:
            raise RuntimeError("once")
        return step(self, inputs, caches)

    monkeypatch.setattr(PlainStep, "__call__", fails_once)
    sequences = [row.sequence() for row in rows]
    for sequence in sequences:
        batch.add(sequence)
    while len(batch):
        batch.step()
    assert next(steps) > 12
    assert [sequence.tokens for sequence in sequences] == [outcome.tokens for outcome in expected]


def test_a_step_that_is_compiled_never_has_a_row_with_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_sidecar.runtime.engine.compiled_step import PlainStep

    seen: list[int] = []

    class Compiled(PlainStep):
        def __call__(self, inputs: Any, rows: Any) -> Any:
            assert batch.adapters._rows.slots is None
            seen.append(inputs.size)
            return super().__call__(inputs, rows)

    def fastest_step(model: Any) -> tuple[PlainStep, None]:
        return Compiled(model), None

    monkeypatch.setattr(model_batch, "fastest_step", fastest_step)
    batch: Any = make_batch(fresh_network("llama"), 64)
    for seed, name in enumerate(("one", "two")):
        batch.attach_adapter(name, weights(llama_layers(), seed))
    rows = [Row(PROMPT, 12, adapter=adapter) for adapter in (None, "one", None, "two", None)]
    together = play(batch, rows)
    assert max(seen) == 3
    for row, outcome in zip(rows, together, strict=True):
        assert play(batch, [row]) == [outcome]
