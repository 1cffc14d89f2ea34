import math
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mlx_sidecar.runtime.engine import row_sampler
from mlx_sidecar.runtime.engine.row_sampler import RowSampler
from mlx_sidecar.runtime.engine.sequence import Sampling, Sequence

Array = np.ndarray[Any, Any]

VOCABULARY = 301
"""Odd, as random bits come in pairs, and larger than the number of candidates of a small top-k."""

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 200, 10**9]),
    top_p=st.sampled_from([1.0, 1.0, 0.0, 0.5, 0.9]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {}, {0: 4.0, 299: 4.0}]),
    seed=st.integers(0, 2**53 - 1),
)


@pytest.fixture(autouse=True)
def _not_compiled() -> None:  # pyright: ignore[reportUnusedFunction]
    """As in every engine on a CPU, where compiling calls a C++ compiler."""
    mx.disable_compile()


@pytest.fixture
def compiled() -> Generator[None]:
    """As in every engine on a GPU."""
    mx.enable_compile()
    yield
    mx.disable_compile()


def row(sampling: Sampling, prompt: list[int] | None = None, tokens: list[int] | None = None) -> Sequence:
    return Sequence("m", prompt or [1], 100, sampling, frozenset(), lambda _: None, tokens=tokens or [])


def read(chosen: mx.array) -> tuple[list[int], list[int]]:
    assert chosen.dtype == mx.int32
    tokens, flaws = cast("list[list[int]]", chosen.tolist())
    return tokens, flaws


def tokens_of(samplings: list[Sampling], logits: Array | mx.array) -> list[int]:
    """One token for each of many rows that have the same logits."""
    logits = logits if isinstance(logits, mx.array) else mx.array(logits, dtype=mx.float32)
    together = mx.broadcast_to(logits, (len(samplings), len(logits)))
    return read(RowSampler([row(sampling) for sampling in samplings])(together))[0]


def draws(sampling: Sampling, logits: Array, count: int) -> Array:
    """Draw with as many seeds."""
    return np.array(tokens_of([replace(sampling, seed=seed) for seed in range(count)], logits))


def chi_square(observed: Array, probabilities: Array) -> float:
    """Pearson's statistic, in standard deviations above its mean."""
    wanted = probabilities * observed.sum()
    degrees = len(probabilities) - 1
    return float((((observed - wanted) ** 2 / wanted).sum() - degrees) / math.sqrt(2 * degrees))


# -- company --


def fake_logits(sequence: Sequence) -> Array:
    """What a model would say: a function of all that it was given, with ties, and fond of a few tokens."""
    random = np.random.default_rng([*sequence.prompt, 7, *sequence.tokens])
    logits = (random.normal(0, 2, VOCABULARY) * 4).round() / 4
    logits[[1, 7, 5, 299]] += 5
    return logits


@dataclass
class Company:
    """Sequences that decode together, with one sampler."""

    sequences: list[Sequence] = field(default_factory=list[Sequence])
    sampler: RowSampler = field(default_factory=lambda: RowSampler([]))

    def step(self) -> None:
        if self.sequences:
            tokens, flaws = read(self.sampler(mx.array(np.stack([fake_logits(s) for s in self.sequences]))))
            assert not any(flaws)
            for sequence, token in zip(self.sequences, tokens, strict=True):
                sequence.tokens.append(token)

    def join(self, other: "Company") -> None:
        self.sampler.extend(other.sampler)
        self.sequences = self.sequences + other.sequences

    def keep(self, indices: list[int]) -> None:
        self.sampler.keep(indices)
        self.sequences = [self.sequences[index] for index in indices]

    def rebuild(self) -> None:
        self.sampler = RowSampler(self.sequences)


def alone(sampling: Sampling, prompt: list[int], count: int) -> list[int]:
    sequence = row(sampling, prompt)
    company = Company([sequence], RowSampler([sequence]))
    for _ in range(count):
        company.step()
    return sequence.tokens


@settings(max_examples=60)
@given(st.lists(SAMPLINGS, min_size=1, max_size=6), st.data())
def test_a_row_gets_the_same_tokens_alone_and_in_any_company(
    samplings: list[Sampling], data: st.DataObject
) -> None:
    sequences = [row(sampling, [place, 5]) for place, sampling in enumerate(samplings)]
    waiting = list(sequences)
    company = Company()
    for _ in range(8):
        if waiting and data.draw(st.booleans(), "somebody joins"):
            group, waiting = waiting[:2], waiting[2:]
            joining = Company(group, RowSampler(group))
            for _ in range(data.draw(st.integers(0, 2), "steps before that")):
                joining.step()
            company.join(joining)
        if company.sequences and data.draw(st.booleans(), "somebody leaves, or rows move"):
            everybody = list(range(len(company.sequences)))
            company.keep(data.draw(st.lists(st.sampled_from(everybody), unique=True), "who stays"))
        if data.draw(st.booleans(), "rebuilt"):
            company.rebuild()
        company.step()
    for sequence in sequences:
        assert sequence.tokens == alone(sequence.sampling, sequence.prompt, len(sequence.tokens))


@given(SAMPLINGS, st.integers(1, 6))
def test_a_row_that_is_rebuilt_from_its_tokens_goes_on_as_it_would_have(sampling: Sampling, at: int) -> None:
    whole = alone(sampling, [3, 3, 4], 8)
    company = Company([row(sampling, [3, 3, 4], whole[:at])])
    company.rebuild()
    for _ in range(8 - at):
        company.step()
    assert company.sequences[0].tokens == whole


def test_an_answer_does_not_depend_on_when_it_is_read() -> None:
    sampling = Sampling(temperature=1.0, presence_penalty=5.0, seed=3)
    logits = mx.array(fake_logits(row(sampling))[None])
    late = RowSampler([row(sampling)])
    unread = [late(logits) for _ in range(6)]
    prompt = RowSampler([row(sampling)])
    assert [read(chosen) for chosen in unread] == [read(prompt(logits)) for _ in range(6)]


def test_a_call_waits_for_nothing() -> None:
    lazy: list[mx.array] = []

    def build() -> None:
        lazy.append(mx.zeros((2, VOCABULARY)) + 1)

    thread = threading.Thread(target=build)
    thread.start()
    thread.join()
    everything = Sampling(temperature=1.0, top_k=5, top_p=0.5, presence_penalty=1.0, logit_bias={1: 1.0})
    sampler = RowSampler([row(everything)])
    sampler.extend(RowSampler([row(Sampling())]))
    sampler(lazy[0])
    sampler.keep([1, 0])
    # Those logits can never be evaluated, as the thread is gone whose stream they were to run on.
    with pytest.raises(RuntimeError, match="Stream"):
        mx.eval(sampler(lazy[0]))


# -- greedy --


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_greedy_rows_take_the_first_of_the_likeliest_tokens(dtype: mx.Dtype) -> None:
    logits = mx.random.normal((9, VOCABULARY), key=mx.random.key(4)).astype(dtype)
    logits[:, 300] = logits[:, 200] = 9.0
    samplings = [Sampling(top_k=1, top_p=0.1, min_p=0.5, seed=seed) for seed in range(9)]
    assert read(RowSampler([row(sampling) for sampling in samplings])(logits)) == ([200] * 9, [0] * 9)


def test_the_coldest_temperature_draws_among_the_likeliest_and_the_hottest_is_no_error() -> None:
    logits = fake_logits(row(Sampling()))
    logits[[17, 18]] = 99.0
    for temperature in (1e-300, 1e-45, 1e-30):
        assert set(draws(Sampling(temperature=temperature), logits, 20).tolist()) == {17, 18}
    assert 0 <= tokens_of([Sampling(temperature=100.0)], logits)[0] < VOCABULARY


# -- what survives --


def survivors(logits: Array, sampling: Sampling) -> Array:
    """The distribution to draw from, in plain words; 0 for what is cut off."""
    scores = logits / sampling.temperature
    probabilities = np.exp(scores - scores.max())
    if sampling.top_k:
        probabilities[scores < np.sort(scores)[-min(sampling.top_k, len(scores))]] = 0
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        descending = -np.sort(-probabilities)
        before = np.cumsum(descending) - descending
        assume(np.abs(before[1:] - sampling.top_p).min() > 1e-5)
        probabilities[probabilities < descending[max((before < sampling.top_p).sum(), 1) - 1]] = 0
    shares = probabilities / probabilities.max()
    if sampling.min_p > 0:
        assume(np.abs(shares[shares < 1] - sampling.min_p).min(initial=1) > 1e-5)
        probabilities[shares < sampling.min_p] = 0
    return probabilities / probabilities.sum()


SHARE = st.integers(0, 20).map(lambda twentieths: twentieths / 20)
LOGITS = st.lists(st.integers(-8, 8), min_size=6, max_size=6).map(lambda eighths: np.array(eighths) / 8)


@settings(max_examples=60)
@given(
    LOGITS,
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.6, 1.0, 3.0]),
        top_k=st.integers(0, 7),
        top_p=st.just(1.0) | SHARE,
        min_p=st.just(0.0) | SHARE,
    ),
)
def test_what_is_drawn_is_what_top_k_top_p_and_min_p_leave_and_as_often_as_it_should(
    logits: Array, sampling: Sampling
) -> None:
    probabilities = survivors(logits, sampling)
    counts = np.bincount(draws(sampling, logits, 4000), minlength=len(logits))
    assert (counts > 0).tolist() == (probabilities > 0).tolist()
    left = probabilities > 0
    assert left.sum() == 1 or chi_square(counts[left], probabilities[left]) < 25


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 128), st.floats(0.01, 0.99))
def test_sorting_a_few_candidates_cuts_like_sorting_all(seed: int, top_k: int, top_p: float) -> None:
    logits = (np.random.default_rng(seed).normal(0, 1, VOCABULARY) * 2).round()
    probabilities = survivors(logits, Sampling(temperature=1.0, top_k=top_k, top_p=top_p))
    drawn = set(draws(Sampling(temperature=1.0, top_k=top_k, top_p=top_p), logits, 1000).tolist())
    assert drawn <= set(np.flatnonzero(probabilities).tolist())
    lowest = logits[probabilities > 0].min()
    assert probabilities[logits == lowest].sum() < 0.03 or any(logits[token] == lowest for token in drawn)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_ties_with_the_last_survivor_stay_in_every_precision(dtype: mx.Dtype) -> None:
    logits = mx.array([3.0, 3.0, 3.0, 2.0, -math.inf] + [1.0] * 200).astype(dtype)
    for cut in (
        Sampling(temperature=1.0, top_k=2),
        Sampling(temperature=1.0, top_k=150, top_p=0.01),
        Sampling(temperature=1.0, top_p=0.0),
        Sampling(temperature=1.0, min_p=1.0),
    ):
        samplings = [replace(cut, seed=seed) for seed in range(200)]
        assert set(tokens_of(samplings, logits)) == {0, 1, 2}


def test_ties_with_the_k_th_count_in_top_p_however_many_there_are() -> None:
    # Top-k leaves 201 tokens, because 200 tie with the second; so the first one holds no more than 1.3 %.
    logits = np.array([3.0] + [2.0] * 200 + [1.0] * 100)
    drawn = draws(Sampling(temperature=1.0, top_k=2, top_p=0.015), logits, 400)
    assert 0 < drawn.max() <= 200


def test_a_top_k_beyond_the_vocabulary_cuts_nothing_and_harms_nobody() -> None:
    samplings = [Sampling(temperature=1.0, top_k=top_k, seed=5) for top_k in (0, 301, 302, 2**40)]
    assert len(set(tokens_of(samplings, fake_logits(row(Sampling()))))) == 1


# -- randomness --


def sides(seed: int, position: int, count: int) -> list[int]:
    """Throw a die of eight sides, at positions that follow each other."""
    sampler = RowSampler([row(Sampling(temperature=1.0, seed=seed), tokens=[0] * position)])
    logits = mx.zeros((1, 8))
    return cast("list[int]", mx.concatenate([sampler(logits)[0] for _ in range(count)]).tolist())


def test_positions_follow_the_distribution_and_not_each_other() -> None:
    thrown = np.array(sides(1, 0, 2000))
    assert chi_square(np.bincount(thrown, minlength=8), np.full(8, 1 / 8)) < 5
    for distance in (1, 2):
        pairs = np.bincount(thrown[distance:] * 8 + thrown[:-distance], minlength=64)
        assert chi_square(pairs, np.full(64, 1 / 64)) < 5


def test_neighbouring_seeds_follow_the_distribution_and_not_each_other() -> None:
    thrown = draws(Sampling(temperature=1.0), np.zeros(8), 8000)
    assert chi_square(np.bincount(thrown, minlength=8), np.full(8, 1 / 8)) < 5
    for distance in (1, 2):
        pairs = np.bincount(thrown[distance:] * 8 + thrown[:-distance], minlength=64)
        assert chi_square(pairs, np.full(64, 1 / 64)) < 5


def test_seeds_differ_in_all_their_bits_and_are_not_shifted_copies() -> None:
    answers = [tuple(sides(seed, 0, 40)) for seed in (0, 1, 2**32, 2**32 + 1, 2**52, 2**53 - 1)]
    assert len(set(answers)) == 6
    for first in answers:
        for second in answers:
            shifted = [first[at : at + 20] for at in range(1, 20)]
            assert second[:20] not in shifted


def test_a_draw_at_a_position_is_the_same_however_it_was_reached() -> None:
    assert sides(9, 0, 30)[20:] == sides(9, 20, 10)


def test_a_temperature_sharpens_and_flattens() -> None:
    logits = np.log([0.4, 0.3, 0.15, 0.1, 0.05])
    for temperature in (0.5, 2.0):
        wanted = np.exp(logits / temperature)
        counts = np.bincount(draws(Sampling(temperature=temperature), logits, 8000), minlength=5)
        assert chi_square(counts, wanted / wanted.sum()) < 5


# -- logits that are not usable --

BAD_ROWS = {"a NaN": (3, math.nan), "an infinity": (3, math.inf), "nothing finite": (slice(None), -math.inf)}
KINDS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=1.0),
    "cut": Sampling(temperature=1.0, top_k=4, top_p=0.9, min_p=0.1),
    "nucleus": Sampling(temperature=1.0, top_p=0.9),
    "penalized": Sampling(repetition_penalty=1.2, presence_penalty=1.0),
}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_row_that_is_not_usable_is_flagged_and_its_neighbours_are_as_ever(
    bad: str, kind: str, dtype: mx.Dtype
) -> None:
    rows = [row(sampling) for sampling in [KINDS[kind], *KINDS.values()]]
    logits = mx.random.normal((len(rows), VOCABULARY), key=mx.random.key(2)).astype(dtype)
    sound, _ = read(RowSampler(rows)(logits))
    where, value = BAD_ROWS[bad]
    logits[0, where] = value
    tokens, flaws = read(RowSampler(rows)(logits))
    assert flaws == [1, 0, 0, 0, 0, 0]
    assert tokens[1:] == sound[1:]
    assert 0 <= tokens[0] < VOCABULARY


@pytest.mark.parametrize("kind", KINDS)
def test_forbidden_tokens_are_no_flaw_and_are_never_chosen(kind: str) -> None:
    logits = np.full(VOCABULARY, -np.inf)
    logits[[40, 41]] = 1.0
    sampler = RowSampler([row(KINDS[kind], [40])])
    for _ in range(20):
        (token,), (flaw,) = read(sampler(mx.array(logits)[None]))
        assert (token in (40, 41), flaw) == (True, 0)


# -- compiled --


def mixed_batch() -> tuple[RowSampler, mx.array]:
    rows = [row(sampling) for sampling in KINDS.values()]
    return RowSampler(rows), mx.random.normal((len(rows), VOCABULARY), key=mx.random.key(8))


def test_compiled_the_tokens_are_the_same(request: pytest.FixtureRequest) -> None:
    sampler, logits = mixed_batch()
    plain = [read(sampler(logits)) for _ in range(5)]
    request.getfixturevalue("compiled")
    sampler, logits = mixed_batch()
    assert [read(sampler(logits)) for _ in range(5)] == plain


@pytest.mark.usefixtures("compiled")
def test_only_a_new_number_of_rows_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[mx.array] = []
    report = row_sampler._report  # pyright: ignore[reportPrivateUsage]

    def watched(tokens: mx.array, best: mx.array) -> mx.array:
        traced.append(best)
        return report(tokens, best)

    monkeypatch.setattr(row_sampler, "_report", watched)
    for _ in range(3):
        for count in range(1, 9):
            sampler = RowSampler([row(Sampling(temperature=1.0, top_p=0.5, seed=count))] * count)
            sampler(mx.zeros((count, 33)))
            sampler(mx.zeros((count, 33)))
    assert len(traced) == 8
