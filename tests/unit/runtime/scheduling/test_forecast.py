import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sidecar.runtime.scheduling.forecast import (
    MAX_RETRY_MS,
    MIN_RETRY_MS,
    UNKNOWN_RETRY_MS,
    Forecast,
    ForecastReport,
)

CHUNK = 512


def experienced() -> Forecast:
    """Has seen 1000 prompt tokens and 50 steps a second, and requests of 500 and 100 tokens."""
    forecast = Forecast(CHUNK)
    forecast.note_prefill(CHUNK, CHUNK / 1000)
    forecast.note_decode(1 / 50)
    forecast.note_finished(500, 100)
    return forecast


def test_nothing_is_refused_before_anything_was_measured() -> None:
    assert Forecast(CHUNK).first_token_seconds(10**6, 10**6) == 0.0


def test_a_first_token_takes_at_least_the_prefill_of_its_prompt_and_of_those_ahead() -> None:
    assert experienced().first_token_seconds(3000, 1000) == pytest.approx(4.0)


@given(
    st.floats(0, 0.1),
    st.floats(1e-6, 1e-2),
    st.lists(st.integers(1, CHUNK), max_size=50),
    st.integers(1, 100_000),
)
def test_the_bound_is_never_above_the_truth(
    seconds_a_chunk: float, seconds_a_token: float, chunks: list[int], prompt: int
) -> None:
    def seconds(tokens: int) -> float:
        return math.ceil(tokens / CHUNK) * seconds_a_chunk + tokens * seconds_a_token

    forecast = Forecast(CHUNK)
    for tokens in chunks:
        forecast.note_prefill(tokens, seconds(tokens))
    assert forecast.first_token_seconds(0, prompt) <= seconds(prompt) * (1 + 1e-9)


def test_the_bound_follows_a_device_that_became_slower() -> None:
    forecast = experienced()
    for _ in range(1000):
        forecast.note_prefill(CHUNK, CHUNK / 100)
    assert forecast.first_token_seconds(0, 1000) == pytest.approx(10.0)


def test_means_follow_what_was_measured_lately() -> None:
    forecast = experienced()
    assert forecast.report() == pytest.approx(ForecastReport(1000, 50, 500, 100))
    for _ in range(200):
        forecast.note_prefill(CHUNK, CHUNK / 3000)
        forecast.note_decode(1 / 80)
        forecast.note_finished(50, 20)
    assert forecast.report() == pytest.approx(ForecastReport(3000, 80, 50, 20), rel=0.01)


def test_a_long_measurement_counts_for_more_than_a_short_one() -> None:
    forecast = Forecast(CHUNK)
    for _ in range(100):
        forecast.note_prefill(500, 0.5)
        forecast.note_prefill(1, 0.1)
    assert forecast.report().prefill_tokens_per_second == pytest.approx(501 / 0.6, rel=0.1)


def test_what_took_no_time_or_did_nothing_is_no_measurement() -> None:
    forecast = Forecast(CHUNK)
    forecast.note_prefill(CHUNK, 0.0)
    forecast.note_prefill(0, 1.0)
    forecast.note_decode(0.0)
    assert forecast.report() == ForecastReport()


def test_who_is_turned_away_is_told_when_one_of_those_who_run_will_have_ended() -> None:
    # Half a second of prefill, and 100 tokens at 50 steps a second, shared by 4.
    assert experienced().retry_after_ms(1, 4) == 1000
    assert experienced().retry_after_ms(3, 4) == 3000
    assert experienced().retry_after_ms(1, 8) == 750


def test_who_is_turned_away_before_anything_was_measured_comes_back_in_a_second() -> None:
    forecast = Forecast(CHUNK)
    forecast.note_decode(1.0)
    assert forecast.retry_after_ms(1, 4) == UNKNOWN_RETRY_MS


@given(
    st.floats(1e-9, 1e6),
    st.floats(1e-9, 1e6),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 10**4),
)
def test_nobody_is_told_to_come_back_at_once_or_in_an_hour(
    prefill: float, step: float, prompt: int, answer: int, number: int
) -> None:
    forecast = Forecast(CHUNK)
    forecast.note_prefill(CHUNK, prefill)
    forecast.note_decode(step)
    forecast.note_finished(prompt, answer)
    assert MIN_RETRY_MS <= forecast.retry_after_ms(number, number) <= MAX_RETRY_MS
