"""Every sequence gets the tokens that the model alone gives it, whoever comes and goes beside it.

Hypothesis draws the schedules: who comes and who is cancelled when, and how prompts are cut into chunks. For
a longer hunt: `EXACTNESS_SCHEDULES=300 pytest tests/unit/runtime/engine/test_exactness.py --timeout 0`.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.batches import GREEDY, Outcome, Row, make_batch, play, play_alone
from support.reference import alone
from support.tiny_networks import ARCHITECTURES, VOCABULARY, tiny_network

from mlx_sidecar.runtime.engine.sequence import Sampling

SCHEDULES = int(os.environ.get("EXACTNESS_SCHEDULES", "5"))
LONGEST_PROMPT = 60
CHUNKS = (1, 3, 16, 64)

# Prompts are beginnings of few texts, so that some are equal and many share what they begin with.
TEXTS = [tuple(random.Random(seed).choices(range(VOCABULARY), k=LONGEST_PROMPT)) for seed in range(3)]
lengths = st.integers(1, 12) | st.integers(1, LONGEST_PROMPT)
prompts = st.tuples(st.sampled_from(TEXTS), lengths).map(lambda drawn: drawn[0][: drawn[1]])
no_stops = st.just(frozenset[int]())
stops = no_stops | st.integers(0, 15).map(lambda first: frozenset(range(first, VOCABULARY, 16)))
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.8, 1.2]),
    top_p=st.sampled_from([1.0, 0.9]),
    top_k=st.sampled_from([0, 20]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {7: 2.0, 100: -3.0}]),
    seed=st.integers(0, 2**32 - 1),
)
rows = st.builds(
    Row,
    prompt=prompts,
    max_tokens=st.integers(1, 18),
    sampling=st.just(GREEDY) | st.just(GREEDY) | samplings,
    stops=stops,
    joins=st.just(0) | st.integers(0, 16),
    leaves_after=st.none() | st.none() | st.integers(0, 18),
)
schedules = st.lists(rows, min_size=2, max_size=6)


@pytest.fixture(autouse=True, scope="module")
def short_chunks_are_halved_too() -> Iterator[None]:
    """Have two streams share every chunk that has two positions, as they share long ones on a CPU."""
    from mlx_sidecar.runtime.engine import prefill

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "LEAST_TO_HALVE", 2)
        yield


def expected(architecture: str, row: Row) -> Outcome:
    """What becomes of a row that nobody cancels, by the model alone; if sampled, by a batch of its own."""
    if row.sampling != GREEDY:
        return play_alone(tiny_network(architecture), row)
    tokens = alone(architecture, row.prompt).tokens(row.max_tokens)
    end = next((place for place, token in enumerate(tokens) if token in row.stops), None)
    return Outcome(tokens, ["length"]) if end is None else Outcome(tokens[:end], ["stop"])


def check(architecture: str, chunk: int, schedule: list[Row], shapes: tuple[int, ...] = ()) -> None:
    outcomes = play(make_batch(tiny_network(architecture), chunk, shapes), schedule)
    for row, outcome in zip(schedule, outcomes, strict=True):
        whole = expected(architecture, row)
        if outcome.ends == ["cancelled"]:
            whole = Outcome(whole.tokens[: len(outcome.tokens)], ["cancelled"])
        assert outcome == whole, row


@pytest.mark.timeout(600)  # Making a failing schedule small takes minutes.
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=SCHEDULES, suppress_health_check=[HealthCheck.too_slow])
@given(chunk=st.sampled_from(CHUNKS), schedule=schedules)
def test_company_changes_no_token(architecture: str, chunk: int, schedule: list[Row]) -> None:
    for row in schedule:
        # Where the model itself cannot decide, rounding does; such prompts are no examples.
        assume(row.sampling != GREEDY or not alone(architecture, row.prompt).has_near_tie(row.max_tokens))
    check(architecture, chunk, schedule)


@settings(max_examples=SCHEDULES, suppress_health_check=[HealthCheck.too_slow])
@given(chunk=st.sampled_from(CHUNKS), schedule=schedules)
def test_prompts_may_go_through_a_layer_at_a_time(chunk: int, schedule: list[Row]) -> None:
    for row in schedule:
        assume(row.sampling != GREEDY or not alone("llama", row.prompt).has_near_tie(row.max_tokens))
    check("llama", chunk, schedule, shapes=(4, 16))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3_next"])
def test_buffers_may_grow_in_company(architecture: str) -> None:
    # Buffers grow by 256 positions; these rows cross that one by one and together.
    text = tuple(random.Random(9).choices(range(VOCABULARY), k=256))
    schedule = [Row(text[: 256 - back], 12, joins=joins) for back, joins in ((0, 0), (1, 0), (6, 1), (3, 9))]
    schedule += [Row(text[:5], 20), replace(schedule[0], leaves_after=4)]
    check(architecture, 64, schedule)
