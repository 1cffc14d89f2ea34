from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_sidecar.runtime.engine import sampling as s
from mlx_sidecar.runtime.engine.sequence import Sampling

PROBABILITIES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
SCORES = mx.array(np.log(PROBABILITIES))[None]


Array = np.ndarray[Any, Any]


def kept(scores: mx.array) -> list[int]:
    values: Array = np.array(scores[0])
    return [int(index) for index in np.flatnonzero(values > -np.inf)]


def frequencies(sampling: Sampling, draws: int = 4000) -> Array:
    sampler = s.SeededSampler(sampling)
    tokens: Array = np.array(mx.concatenate([sampler(SCORES) for _ in range(draws)]))
    return np.bincount(tokens, minlength=5) / draws


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_keeps_the_k_likeliest(k: int) -> None:
    assert kept(s.keep_top_k(SCORES, k)) == list(range(k))


@pytest.mark.parametrize(("p", "count"), [(0.0, 1), (0.39, 1), (0.41, 2), (0.71, 3), (0.86, 4), (1.0, 5)])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, count: int) -> None:
    assert kept(s.keep_top_p(SCORES, mx.array(p))) == list(range(count))


def test_top_p_does_not_depend_on_the_order_of_the_vocabulary() -> None:
    shuffled = SCORES[:, mx.array([3, 0, 4, 1, 2])]
    assert kept(s.keep_top_p(shuffled, mx.array(0.6))) == [1, 3]


@pytest.mark.parametrize(("p", "count"), [(0.1, 5), (0.2, 4), (0.3, 3), (0.5, 2), (0.9, 1), (1.0, 1)])
def test_min_p_keeps_what_is_at_least_p_times_the_likeliest(p: float, count: int) -> None:
    assert kept(s.keep_min_p(SCORES, mx.array(p))) == list(range(count))


def test_draws_follow_the_distribution() -> None:
    assert np.allclose(frequencies(Sampling(temperature=1.0, seed=1)), PROBABILITIES, atol=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    for temperature in (0.5, 2.0):
        expected = PROBABILITIES ** (1 / temperature)
        drawn = frequencies(Sampling(temperature=temperature, seed=2))
        assert np.allclose(drawn, expected / expected.sum(), atol=0.03)


def test_truncation_works_on_the_tempered_distribution() -> None:
    # At temperature 4 the likeliest two hold less than half, so half takes a third.
    drawn = frequencies(Sampling(temperature=4.0, top_p=0.5, seed=3))
    assert [bool(share) for share in drawn] == [True, True, True, False, False]


def test_top_k_top_p_and_min_p_combine() -> None:
    drawn = frequencies(Sampling(temperature=1.0, top_k=4, top_p=0.9, min_p=0.5, seed=4))
    assert [bool(share) for share in drawn] == [True, True, False, False, False]


def test_a_seed_gives_the_same_draws_and_another_seed_others() -> None:
    def draws(seed: int) -> list[int]:
        sampler = s.SeededSampler(Sampling(temperature=1.0, seed=seed))
        return [int(sampler(SCORES).item()) for _ in range(40)]  # pyright: ignore[reportArgumentType]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)


def test_greedy_rows_share_one_sampler_so_that_they_batch() -> None:
    assert s.make_sampler(Sampling()) is s.make_sampler(Sampling(top_p=0.5, seed=3))


def penalized(sampling: Sampling, prompt: list[int], answer: list[int], logits: list[float]) -> list[float]:
    (processor,) = s.make_processors(sampling, prompt)
    row = mx.array([logits])
    result = row
    for length in range(len(answer) + 1):
        result = processor(mx.array(prompt + answer[:length]), row)
    return np.array(result)[0].round(5).tolist()


def test_repetition_penalty_weakens_what_prompt_and_answer_hold() -> None:
    sampling = Sampling(repetition_penalty=2.0)
    assert penalized(sampling, [0], [1, 1], [4.0, -4.0, 4.0]) == [2.0, -8.0, 4.0]


def test_presence_penalty_counts_once_and_the_answer_only() -> None:
    assert penalized(Sampling(presence_penalty=1.5), [0], [1, 1], [4.0, 4.0, 4.0]) == [4.0, 2.5, 4.0]


def test_frequency_penalty_counts_every_time_and_the_answer_only() -> None:
    assert penalized(Sampling(frequency_penalty=1.5), [0], [1, 1], [4.0, 4.0, 4.0]) == [4.0, 1.0, 4.0]


def test_negative_penalties_encourage() -> None:
    assert penalized(Sampling(presence_penalty=-1.0), [0], [2], [4.0, 4.0, 4.0]) == [4.0, 4.0, 5.0]


def test_logit_bias_is_added() -> None:
    (processor,) = s.make_processors(Sampling(logit_bias={0: -3.0, 2: 5.0}), [1])
    assert np.array(processor(mx.array([1]), mx.array([[1.0, 1.0, 1.0]]))).tolist() == [[-2.0, 1.0, 6.0]]


def test_a_plain_request_has_no_processors() -> None:
    assert s.make_processors(Sampling(temperature=0.7, top_p=0.9), [1]) == []
