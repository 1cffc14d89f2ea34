import tracemalloc
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sidecar.runtime.engine.sequence import Sampling, Sequence
from mlx_sidecar.runtime.scheduling.lane import AWAY_REMEMBERED, Lane
from mlx_sidecar.runtime.scheduling.priority import Priority

SIZES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=20)
"""Tokens of prompt and answer of an owner's requests, again and again."""


def request(owner: int, prompt: int = 10, answer: int = 10, at: float = 0.0) -> Sequence:
    return Sequence(
        model="m",
        prompt=[1] * prompt,
        max_tokens=answer,
        sampling=Sampling(),
        stop_token_ids=frozenset(),
        on_emission=lambda _: None,
        owner=owner,
        submitted_at=at,
    )


def new_lane() -> Lane[Sequence]:
    return Lane(Priority.NORMAL, 0.0)


def serve(lane: Lane[Sequence]) -> Sequence:
    """Run the next request from its prompt to its last token."""
    item = next(iter(lane))
    lane.take(item, 0.0)
    lane.charge(item.owner, item.max_tokens)
    return item


def size(item: Sequence) -> int:
    return len(item.prompt) + item.max_tokens


def test_an_owner_is_served_in_its_own_order() -> None:
    lane = new_lane()
    mine = [request(1, prompt=prompt) for prompt in (30, 10, 20)]
    for item in mine:
        lane.put(item)
        lane.put(request(2))
    assert [item for item in (serve(lane) for _ in range(6)) if item.owner == 1] == mine


def test_owners_who_have_received_the_same_are_served_as_they_came() -> None:
    lane = new_lane()
    for owner, at in ((5, 3.0), (7, 1.0), (6, 2.0)):
        lane.put(request(owner, at=at))
    assert [serve(lane).owner for _ in range(3)] == [7, 6, 5]


def test_a_request_of_one_owner_does_not_wait_for_all_of_another() -> None:
    lane = new_lane()
    for _ in range(100):
        lane.put(request(1))
    serve(lane)
    lane.put(request(2, at=50.0))
    assert 2 in {serve(lane).owner for _ in range(2)}


@given(SIZES, SIZES)
def test_two_owners_who_always_wait_receive_the_same_to_within_one_request(
    first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    lane = new_lane()
    sizes = {1: first, 2: second}
    received = {1: 0, 2: 0}
    asked = count()
    for owner in (1, 2) * 3:
        lane.put(request(owner, *sizes[owner][0], at=next(asked)))
    for turn in range(200):
        item = serve(lane)
        received[item.owner] += size(item)
        again = sizes[item.owner][turn % len(sizes[item.owner])]
        lane.put(request(item.owner, *again, at=next(asked)))
        assert abs(received[1] - received[2]) <= max(prompt + answer for prompt, answer in first + second)


@given(st.integers(2, 9), st.integers(1, 60), st.integers(1, 60), st.integers(1, 6))
def test_with_many_rows_two_owners_receive_the_same_to_within_one_request_a_row(
    rows: int, prompt: int, answer: int, factor: int
) -> None:
    # A row gives a token a step. The second owner's answers are longer, so they hold their rows for longer.
    lane = new_lane()
    lengths = {1: answer, 2: answer * factor}
    received = {1: 0, 2: 0}
    running: list[tuple[Sequence, int]] = []
    for _ in range(rows + 1):
        for owner in (1, 2):
            lane.put(request(owner, prompt, lengths[owner]))
    for _ in range(1500):
        while len(running) < rows:
            item = next(iter(lane))
            lane.take(item, 0.0)
            lane.put(request(item.owner, prompt, lengths[item.owner]))
            received[item.owner] += prompt
            running.append((item, 0))
        running = [(item, produced + 1) for item, produced in running]
        for item, _ in running:
            lane.charge(item.owner, 1)
            received[item.owner] += 1
        running = [(item, produced) for item, produced in running if produced < item.max_tokens]
        assert abs(received[1] - received[2]) <= rows * (prompt + answer * factor)


def test_an_owner_who_was_away_has_saved_nothing() -> None:
    lane = new_lane()
    lane.put(request(2))
    for _ in range(100):
        lane.put(request(1))
    while len(lane) > 20:
        serve(lane)
    for _ in range(10):
        lane.put(request(2, at=1.0))
    owners = [serve(lane).owner for _ in range(10)]
    assert owners.count(1) == owners.count(2) == 5


def test_an_owner_who_was_away_for_a_moment_still_owes_what_it_received() -> None:
    lane = new_lane()
    lane.put(request(1, prompt=1000))
    for _ in range(100):
        lane.put(request(2, at=1.0))
    assert serve(lane).owner == 1
    lane.put(request(1, at=2.0))
    assert {serve(lane).owner for _ in range(1000 // 20)} == {2}


def test_a_new_owner_starts_where_the_others_are() -> None:
    lane = new_lane()
    for _ in range(100):
        lane.put(request(1))
    for _ in range(50):
        serve(lane)
    for _ in range(10):
        lane.put(request(2, at=1.0))
    owners = [serve(lane).owner for _ in range(10)]
    assert owners.count(1) == owners.count(2) == 5


@pytest.mark.parametrize("debt", [100, 1000, 5000])
def test_owners_who_come_one_after_another_cannot_keep_an_older_one_waiting_for_ever(debt: int) -> None:
    lane = new_lane()
    strangers = count(2)
    lane.put(request(1, prompt=debt))
    lane.put(request(next(strangers)))
    assert serve(lane).owner == 1
    lane.put(request(1, at=1.0))
    received = 0
    while True:
        lane.put(request(next(strangers), at=2.0))
        item = serve(lane)
        if item.owner == 1:
            break
        received += size(item)
        # The mean over all whose counts are kept rises by its share of every token.
        assert received <= (debt + 2 * size(item)) * (AWAY_REMEMBERED + 2)


def test_owners_who_come_and_go_leave_nothing_behind() -> None:
    lane = new_lane()
    strangers = count(1)
    lane.put(request(0))

    def come_and_go(owners: int) -> None:
        for _ in range(owners):
            owner = next(strangers)
            item = request(owner)
            lane.put(item)
            lane.take(item, 0.0)
            lane.charge(owner, 10)

    come_and_go(2000)
    tracemalloc.start()
    try:
        come_and_go(2000)
        before, _ = tracemalloc.get_traced_memory()
        come_and_go(20_000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 64 * 1024


def test_all_are_looked_at_in_turns_before_anybody_is_looked_at_twice() -> None:
    lane = new_lane()
    for owner in (1, 1, 1, 2, 2, 3):
        lane.put(request(owner, at=owner))
    assert [item.owner for item in lane] == [1, 2, 3, 1, 2, 1]
