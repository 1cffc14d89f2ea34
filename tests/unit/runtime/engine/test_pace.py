"""How large a chunk of prefill is, from what steps have been seen to cost."""

import pytest

from mlx_sidecar.runtime.engine.pace import LEAST_TOKENS, Pace

MOST = 2048


def measured(step_seconds: float, token_seconds: float) -> Pace:
    """Return a pace that has seen plain steps and steps with a chunk, each at its cost."""
    pace = Pace(MOST, slowdown=3.5)
    for _ in range(30):
        pace.note(step_seconds, 0, decoding=True)
        pace.note(2 * step_seconds + 500 * token_seconds, 500, decoding=True)
    return pace


def test_a_prompt_goes_as_fast_as_it_can_where_nobody_decodes() -> None:
    assert measured(0.005, 1e-4).tokens(decoding=False, together=False) == MOST


def test_a_step_with_a_chunk_takes_no_more_than_its_multiple_of_a_plain_one() -> None:
    for token_seconds in (1e-6, 1e-5, 5e-5):
        tokens = measured(0.005, token_seconds).tokens(decoding=True, together=False)
        assert LEAST_TOKENS <= tokens <= MOST
        assert 2 * 0.005 + tokens * token_seconds <= 3.5 * 0.005 * 1.001


def test_a_chunk_is_never_so_short_that_only_the_weights_are_read() -> None:
    assert measured(0.005, 1.0).tokens(decoding=True, together=False) == LEAST_TOKENS


def test_those_who_came_together_wait_a_second_for_each_other_but_no_longer() -> None:
    pace = measured(0.09, 0.005)
    tokens = pace.tokens(decoding=True, together=True)
    assert tokens > pace.tokens(decoding=True, together=False)
    assert tokens == max(MOST, 200)
    assert measured(0.001, 1e-5).tokens(decoding=True, together=True) * 1e-5 <= 1.001


def test_before_anything_is_measured_running_streams_are_spared() -> None:
    assert Pace(MOST).tokens(decoding=True, together=False) < MOST


def test_a_chunk_shrinks_when_prefill_gets_slower_deep_in_a_prompt() -> None:
    pace = measured(0.005, 1e-5)
    before = pace.tokens(decoding=True, together=False)
    for _ in range(30):
        pace.note(2 * 0.005 + before * 1e-4, before, decoding=True)
    assert pace.tokens(decoding=True, together=False) < before


def test_a_share_of_a_long_chunk_leaves_more_time_than_a_chunk_with_a_pass_of_its_own() -> None:
    pace = Pace(MOST, slowdown=2.5, passes=0)
    for _ in range(30):
        pace.note(0.005, 0, decoding=True)
        pace.note(0.005 + 500 * 1e-5, 500, decoding=True)
    assert 0.005 + pace.tokens(decoding=True, together=False) * 1e-5 == pytest.approx(2.5 * 0.005, rel=0.06)


def test_what_has_been_forgotten_is_measured_anew() -> None:
    pace = measured(0.005, 1.0)
    pace.forget()
    assert pace.tokens(decoding=True, together=False) == Pace(MOST).tokens(decoding=True, together=False)
