from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sidecar.runtime.engine.penalties import LogitBiases, Penalties
from mlx_sidecar.runtime.engine.sequence import Sampling, Sequence

Array = np.ndarray[Any, Any]

VOCABULARY = 7
PENALTY = st.floats(-2, 2, width=16)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=5)
SAMPLINGS = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    presence_penalty=PENALTY | st.just(0.0),
    frequency_penalty=PENALTY | st.just(0.0),
)


def row(sampling: Sampling, prompt: list[int], tokens: list[int] | None = None) -> Sequence:
    return Sequence("m", prompt, 100, sampling, frozenset(), lambda _: None, tokens=tokens or [])


def values(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32))


def penalized(sampling: Sampling, prompt: list[int], answer: list[int], logits: list[float]) -> list[float]:
    """Penalize logits for an answer that is counted token by token."""
    penalties = Penalties([row(sampling, prompt)])
    result = penalties(mx.array([logits]))
    for token in answer:
        penalties.count(mx.array([token]))
        result = penalties(mx.array([logits]))
    return np.array(result)[0].round(5).tolist()


def expected(sampling: Sampling, prompt: list[int], answer: list[int], logits: Array) -> Array:
    """The same in plain words."""
    scores = logits.astype(np.float64)
    for token in range(len(scores)):
        if token in prompt or token in answer:
            factor = sampling.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        scores[token] -= sampling.presence_penalty * (token in answer)
        scores[token] -= sampling.frequency_penalty * answer.count(token)
    return scores


def test_repetition_penalty_weakens_what_prompt_and_answer_hold() -> None:
    sampling = Sampling(repetition_penalty=2.0)
    assert penalized(sampling, [0], [1, 1], [4.0, -4.0, 4.0]) == [2.0, -8.0, 4.0]


def test_presence_penalty_counts_once_and_the_answer_only() -> None:
    assert penalized(Sampling(presence_penalty=1.5), [0], [1, 1], [4.0, 4.0, 4.0]) == [4.0, 2.5, 4.0]


def test_frequency_penalty_counts_every_time_and_the_answer_only() -> None:
    assert penalized(Sampling(frequency_penalty=1.5), [0], [1, 1], [4.0, 4.0, 4.0]) == [4.0, 1.0, 4.0]


def test_negative_penalties_encourage() -> None:
    assert penalized(Sampling(presence_penalty=-1.0), [0], [2], [4.0, 4.0, 4.0]) == [4.0, 4.0, 5.0]


@given(st.lists(st.tuples(SAMPLINGS, TOKENS, TOKENS, TOKENS), min_size=1, max_size=4), st.data())
def test_a_batch_is_penalized_as_its_rows_are_on_paper(
    rows: list[tuple[Sampling, list[int], list[int], list[int]]], data: st.DataObject
) -> None:
    sequences = [row(sampling, prompt, before) for sampling, prompt, before, _ in rows]
    penalties = Penalties(sequences)
    logits = np.random.default_rng(data.draw(st.integers(0, 99))).normal(0, 3, (len(rows), VOCABULARY))
    length = min(len(later) for *_, later in rows)
    penalties(mx.array(logits))
    for step in range(length):
        penalties.count(mx.array([later[step] for *_, later in rows]))
    results = values(penalties(mx.array(logits, dtype=mx.float32)))
    for result, line, (sampling, prompt, before, later) in zip(results, logits, rows, strict=True):
        wanted = expected(sampling, prompt, before + later[:length], line)
        assert np.allclose(result, wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_a_row_without_penalties_is_left_as_it_is_and_so_are_the_logits_given(dtype: mx.Dtype) -> None:
    logits = mx.random.normal((3, VOCABULARY), key=mx.random.key(1)).astype(dtype)
    before = values(logits)
    plain = row(Sampling(), [1])
    penalties = Penalties([plain, row(Sampling(presence_penalty=1.0), [1], [2]), plain])
    result = penalties(logits)
    changed = values(result) != before
    assert result.dtype == dtype
    assert np.argwhere(changed).tolist() == [[1, 2]]
    assert np.array_equal(values(logits), before)


def test_nobody_pays_for_penalties_and_biases_that_nobody_asked_for() -> None:
    logits = mx.zeros((1, VOCABULARY))
    plain = [row(Sampling(temperature=0.7, top_p=0.9), [1])]
    assert Penalties(plain)(logits) is logits
    assert LogitBiases(plain)(logits) is logits


def test_a_logit_bias_is_added_to_its_row_only() -> None:
    biases = LogitBiases([row(Sampling(), [1]), row(Sampling(logit_bias={0: -3.0, 2: 5.0}), [1])])
    assert np.array(biases(mx.ones((2, 3)))).tolist() == [[1.0, 1.0, 1.0], [-2.0, 1.0, 6.0]]


def test_biases_move_with_their_rows() -> None:
    first, second, plain = Sampling(logit_bias={0: 1.0}), Sampling(logit_bias={1: 2.0, 2: 3.0}), Sampling()
    biases = LogitBiases([row(first, []), row(plain, [])])
    biases(mx.zeros((2, 3)))
    biases.extend(LogitBiases([row(plain, []), row(second, [])]), behind=2)
    biases.keep([3, 1, 0])
    assert np.array(biases(mx.zeros((3, 3)))).tolist() == [[0.0, 2.0, 3.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
