"""Every sequence gets the tokens that its adapter alone gives it, whichever others are beside it.

The truth is mlx-lm: a network of its own for each adapter, with that adapter loaded by `load_adapters`, and
one sequence in it. For a longer hunt: `EXACTNESS_SCHEDULES=300 pytest tests/unit/runtime/engine --timeout 0`.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.batches import Outcome, Row, make_batch, play
from support.reference import Alone
from support.tiny_adapter import linear_layers, only, random_matrices, write_mlx_lm
from support.tiny_networks import MIXES_ROWS_UP, UNBATCHABLE, VOCABULARY, fresh_network

SCHEDULES = int(os.environ.get("EXACTNESS_SCHEDULES", "5"))
LONGEST_PROMPT = 60
CHUNKS = (1, 3, 16, 64)
ADAPTERS = {"attention": (4, 2.0), "everything": (8, 0.7), "little": (1, 3.0), "visitor": (11, 1.0)}
"""Rank and scale of each."""
NAMES = (None, "attention", "everything", "little")
KINDS = (
    *("llama", "llama in 4 bit", "mistral", "ministral3", "qwen3", "qwen3_moe", "gemma3_text", "phi3"),
    *("deepseek_v3", "qwen3_next", "mamba2", *UNBATCHABLE, *MIXES_ROWS_UP),
)

TEXTS = [tuple(random.Random(seed).choices(range(VOCABULARY), k=LONGEST_PROMPT)) for seed in range(3)]
lengths = st.integers(1, 12) | st.integers(1, LONGEST_PROMPT)
rows = st.builds(
    Row,
    prompt=st.tuples(st.sampled_from(TEXTS), lengths).map(lambda drawn: drawn[0][: drawn[1]]),
    max_tokens=st.integers(1, 18),
    joins=st.just(0) | st.integers(0, 16),
    leaves_after=st.none() | st.none() | st.integers(0, 18),
    adapter=st.sampled_from(NAMES),
)
schedules = st.lists(rows, min_size=2, max_size=6)
visits = st.lists(st.integers(0, 40), max_size=4, unique=True)


@pytest.fixture(autouse=True, scope="module")
def short_chunks_are_halved_too() -> Iterator[None]:
    """Have two streams share every chunk that has two positions, as they share long ones on a CPU."""
    from mlx_sidecar.runtime.engine import prefill

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "LEAST_TO_HALVE", 2)
        yield


def network_of(kind: str) -> Any:
    network = fresh_network(kind.removesuffix(" in 4 bit"))
    if kind.endswith("in 4 bit"):
        from mlx import nn

        nn.quantize(network, group_size=32, bits=4)
    return network


def write_adapter(name: str, network: Any, folder: Path) -> None:
    """Write one of three adapters that differ in layers, rank and scale, or a visitor of a larger rank."""
    layers = linear_layers(network)
    if name == "attention":
        layers = only(layers, "q_proj", "v_proj", "qkv_proj", "in_proj", "kv_a_proj_with_mqa") or layers
    rank, scale = ADAPTERS[name]
    write_mlx_lm(folder, random_matrices(layers, len(name), rank), scale=scale)


@cache
def adapter(kind: str, name: str) -> Any:
    """Return the weights of an adapter as our own reader has them."""
    from mlx_sidecar.runtime.models.adapter_files import read_adapter

    with TemporaryDirectory() as folder:
        write_adapter(name, network_of(kind), Path(folder))
        return read_adapter(Path(folder))


@cache
def adapted_by_mlx_lm(kind: str, name: str | None) -> Any:
    """Return a network that has this adapter and no other, as mlx-lm loads it."""
    network = network_of(kind)
    if name is not None:
        from mlx_lm.tuner.utils import load_adapters

        with TemporaryDirectory() as folder:
            write_adapter(name, network, Path(folder))
            load_adapters(network, folder)
    return network.eval()


@cache
def alone(kind: str, name: str | None, prompt: tuple[int, ...]) -> Alone:
    return Alone(adapted_by_mlx_lm(kind, name), prompt)


@cache
def batch_of(kind: str, chunk: int, shapes: tuple[int, ...] = ()) -> Any:
    batch: Any = make_batch(network_of(kind), chunk, shapes)
    for name in NAMES:
        if name is not None:
            batch.attach_adapter(name, adapter(kind, name))
    return batch


def visiting(batch: Any, kind: str, steps: list[int]) -> Callable[[int], None]:
    """Have another adapter come and go at these steps; its rank makes every stack another."""

    def at(step: int) -> None:
        if step in steps and "visitor" not in batch.adapters:
            batch.attach_adapter("visitor", adapter(kind, "visitor"))
        elif step in steps:
            batch.detach_adapter("visitor")

    return at


def check(batch: Any, kind: str, schedule: list[Row], steps: list[int]) -> None:
    outcomes = play(batch, schedule, visiting(batch, kind, steps))
    if "visitor" in batch.adapters:
        batch.detach_adapter("visitor")
    for row, outcome in zip(schedule, outcomes, strict=True):
        tokens = alone(kind, row.adapter, row.prompt).tokens(row.max_tokens)
        whole = Outcome(tokens, ["length"])
        if outcome.ends == ["cancelled"]:
            whole = Outcome(tokens[: len(outcome.tokens)], ["cancelled"])
        assert outcome == whole, row


def decided(kind: str, schedule: list[Row]) -> bool:
    """Return whether rounding decides nothing: where the model itself cannot, it does."""
    return not any(alone(kind, row.adapter, row.prompt).has_near_tie(row.max_tokens) for row in schedule)


@pytest.mark.timeout(600)  # Making a failing schedule small takes minutes.
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=SCHEDULES, suppress_health_check=[HealthCheck.too_slow])
@given(chunk=st.sampled_from(CHUNKS), schedule=schedules, steps=visits)
def test_company_with_other_adapters_changes_no_token(
    kind: str, chunk: int, schedule: list[Row], steps: list[int]
) -> None:
    assume(decided(kind, schedule))
    check(batch_of(kind, chunk), kind, schedule, steps)


@settings(max_examples=SCHEDULES, suppress_health_check=[HealthCheck.too_slow])
@given(chunk=st.sampled_from(CHUNKS), schedule=schedules, steps=visits)
def test_prompts_with_adapters_may_go_through_a_layer_at_a_time(
    chunk: int, schedule: list[Row], steps: list[int]
) -> None:
    assume(decided("llama", schedule))
    check(batch_of("llama", chunk, (4, 16)), "llama", schedule, steps)


@pytest.mark.parametrize("kind", ["llama", "llama in 4 bit", "mistral", "qwen3", "gemma3_text"])
def test_one_prompt_has_another_answer_with_each_adapter(kind: str) -> None:
    prompt = TEXTS[0][:20]
    together = [Row(prompt, 16, adapter=name) for name in NAMES]
    late = [replace(row, joins=5) for row in together]
    outcomes = play(batch_of(kind, 16), [*together, *late])
    answers = [alone(kind, name, prompt).tokens(16) for name in NAMES]
    assert len({tuple(answer) for answer in answers}) == len(NAMES)
    assert [outcome.tokens for outcome in outcomes] == answers * 2
