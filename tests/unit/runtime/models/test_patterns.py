"""What is learned from the times at which models were asked for."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sidecar.runtime.models.patterns import BURST_SECONDS, Period, Succession

HOUR = 3600.0


def asked(times: list[float]) -> Period:
    period = Period(times[0])
    for at in times:
        period.note(at)
    return period


def expected(period: Period, now: float) -> float | None:
    prediction = period.predict(now)
    return None if prediction is None else prediction.expected


def followed(*turns: tuple[str, float]) -> Succession:
    succession = Succession()
    for model, after in turns:
        succession.note(model, after)
    return succession


def test_a_model_asked_for_every_hour_is_expected_after_another_hour() -> None:
    assert expected(asked([0, HOUR, 2 * HOUR, 3 * HOUR]), 3.5 * HOUR) == 4 * HOUR


def test_two_intervals_are_no_period() -> None:
    assert expected(asked([0, HOUR, 2 * HOUR]), 2.5 * HOUR) is None


def test_intervals_may_be_a_little_off_and_the_next_one_as_much() -> None:
    prediction = asked([0, HOUR - 120, 2 * HOUR - 120, 3 * HOUR]).predict(3.5 * HOUR)
    assert prediction is not None
    assert (prediction.expected, prediction.earliest) == (4 * HOUR, 4 * HOUR - 120)
    assert prediction.latest == 4 * HOUR + 360


@pytest.mark.parametrize(
    "hours",
    [
        [1, 2, 0.5, 3.5],
        [0.2, 0.26, 0.16, 0.25, 0.14],
        [0.3, 1.9, 1, 1, 1],
        [24, 25, 23, 24.5, 23.5],
    ],
    ids=["anything", "a third off", "two of five odd", "half an hour off in a day"],
)
def test_irregular_intervals_are_no_period(hours: list[float]) -> None:
    times = [HOUR * at for at in accumulate(hours, initial=0.0)]
    assert expected(asked(times), times[-1]) is None


def test_a_schedule_that_changes_is_learned_anew() -> None:
    times = [HOUR * at for at in accumulate([1.0] * 20 + [2.0] * 6, initial=0.0)]
    assert expected(asked(times), times[-1]) == times[-1] + 2 * HOUR


def test_the_uses_of_a_burst_count_once() -> None:
    bursts = [hour * HOUR + second for hour in range(4) for second in range(0, 200, int(BURST_SECONDS) - 1)]
    assert expected(asked([float(at) for at in bursts]), 3.5 * HOUR) == 4 * HOUR


def test_a_period_that_comes_back_is_trusted_again() -> None:
    assert expected(asked([hour * HOUR for hour in [*range(10), 30, 31]]), 31.5 * HOUR) == 32 * HOUR


def test_a_period_that_just_came_back_is_given_up_after_one_miss() -> None:
    period = asked([hour * HOUR for hour in [*range(200), 230, 231]])
    assert expected(period, 231.5 * HOUR) == 232 * HOUR
    assert expected(period, 232.5 * HOUR) is None


def test_a_use_off_schedule_puts_a_period_in_doubt_until_it_holds_again() -> None:
    period = asked([hour * HOUR for hour in [*range(10), 9.5]])
    assert expected(period, 9.6 * HOUR) is None
    period.note(10.5 * HOUR)
    assert expected(period, 10.6 * HOUR) == 11.5 * HOUR


def test_a_job_of_working_days_is_expected_on_tuesday_after_a_weekend() -> None:
    day = 24 * HOUR
    assert expected(asked([day * number for number in (0, 1, 2, 3, 4, 7)]), 7.5 * day) == 8 * day


@given(st.floats(60, 1e6), st.integers(4, 30), st.floats(0, 1e9))
def test_whatever_the_period_it_is_found(period: float, count: int, start: float) -> None:
    times = [start + number * period for number in range(count)]
    found = expected(asked(times), times[-1])
    assert found is not None
    assert abs(found - (start + count * period)) < 1e-3


def test_what_follows_alike_is_expected_from_the_shortest_time_after() -> None:
    prediction = followed(("check", 50), ("check", 60), ("check", 90)).predict("check", 1000, 1000)
    assert prediction is not None
    assert (prediction.expected, prediction.earliest, prediction.latest) == (1060, 1050, 1300)


def test_what_has_not_followed_in_time_is_overdue() -> None:
    succession = followed(("check", 60), ("check", 60), ("check", 60))
    assert succession.predict("check", 1000, 1300) is not None
    assert succession.predict("check", 1000, 1301) is None


def test_two_successions_are_no_pattern() -> None:
    assert followed(("check", 60), ("check", 60)).predict("check", 1000, 1000) is None


def test_what_follows_only_now_and_then_is_not_expected() -> None:
    assert followed(*[("check", 60.0), ("other", 60.0)] * 6).predict("check", 1000, 1000) is None


def test_what_follows_long_after_does_not_follow() -> None:
    assert followed(*[("check", 900.0)] * 6).predict("check", 1000, 1000) is None
