"""Log-probabilities against float64, and in the company of rows that want others or none."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.batches import make_batch
from support.tiny_networks import tiny_network

from mlx_sidecar.runtime.engine.log_probs import RowLogProbs
from mlx_sidecar.runtime.engine.sequence import LogProbs, Sampling, Sequence


def row(log_probs: int | None, prompt: list[int] | None = None) -> Sequence:
    return Sequence("m", prompt or [1], 9, Sampling(), frozenset(), lambda _: None, log_probs=log_probs)


def found(asked: list[int | None], logits: Any, tokens: list[int]) -> dict[int, LogProbs]:
    slots = [row(count) for count in asked]
    log_probs = RowLogProbs.of([*slots], mx.array(logits), mx.array(tokens))
    return {} if log_probs is None else log_probs.read()


@pytest.mark.parametrize("vocabulary", [7, 20, 21, 1000])
def test_they_are_those_of_the_softmax_and_the_likeliest_come_first(vocabulary: int) -> None:
    logits = np.random.default_rng(0).normal(0, 5, (3, vocabulary)).astype(np.float32)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    answers = found([20, None, 3], logits, [1, 2, 3])
    assert answers.keys() == {0, 2}
    for at, (token, count) in {0: (1, 20), 2: (3, 3)}.items():
        assert answers[at].of_token == pytest.approx(exact[at, token], abs=1e-5)
        likeliest = np.argsort(-exact[at])[:count]
        assert [token for token, _ in answers[at].top] == likeliest.tolist()
        assert [log_prob for _, log_prob in answers[at].top] == pytest.approx(exact[at, likeliest], abs=1e-5)


def test_zero_names_no_others_and_nobody_who_asks_costs_nothing() -> None:
    logits = [[0.0, 1.0], [1.0, 0.0]]
    answers = found([None, 0], logits, [0, 0])
    assert answers.keys() == {1}
    assert answers[1].of_token == pytest.approx(-0.313262, abs=1e-5)
    assert answers[1].top == []
    assert RowLogProbs.of([row(None), None], mx.array(logits), mx.array([0, 0])) is None


def test_what_cannot_come_is_infinitely_unlikely_and_ties_are_in_order_of_ids() -> None:
    logits = [[-np.inf, 0.0, 0.0, -np.inf]]
    [answer] = found([4], logits, [3]).values()
    assert answer.of_token == -np.inf
    assert [token for token, _ in answer.top] == [1, 2, 0, 3]


def test_half_precision_is_summed_up_in_float32() -> None:
    logits = mx.zeros((1, 50_000), mx.bfloat16)
    log_probs = RowLogProbs.of([row(0)], logits, mx.array([7]))
    assert log_probs is not None
    assert log_probs.read()[0].of_token == pytest.approx(-np.log(50_000), abs=1e-4)


def test_in_company_each_token_has_the_one_that_a_single_forward_pass_gives() -> None:
    network: Any = tiny_network("llama")
    rows = [row(count, [3, 1, 4, 1, 5][:length]) for count, length in ((2, 2), (None, 5), (0, 3), (20, 1))]
    said: dict[Sequence, list[LogProbs | None]] = {one: [] for one in rows}
    batch = make_batch(network, 2)
    waiting = list(rows)
    while waiting or len(batch):
        if waiting:
            batch.add(waiting.pop())
        for emission in batch.step():
            said[emission.sequence].append(emission.log_probs)
    for one in rows:
        whole = mx.array([one.prompt + one.tokens])
        likely = np.array(mx.log(mx.softmax(network(whole)[0], axis=-1)), dtype=np.float32)
        exact = likely[len(one.prompt) - 1 : -1]
        if one.log_probs is None:
            assert said[one] == [None] * 9
            continue
        for token, log_probs, truth in zip(one.tokens, said[one], exact, strict=True):
            assert log_probs is not None
            assert log_probs.of_token == pytest.approx(truth[token], abs=1e-4)
            top = [log_prob for _, log_prob in log_probs.top]
            assert top == pytest.approx(np.sort(truth)[::-1][: one.log_probs], abs=1e-4)
