import math
import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sidecar.runtime.models.eviction import Plan, Resident, choose_victims, expired

TIMES = st.integers(0, 3).map(float)
RESIDENTS = st.lists(
    st.builds(
        Resident,
        name=st.uuids().map(str),
        bytes=st.integers(0, 12),
        last_used=TIMES,
        in_use=st.booleans(),
        pinned=st.booleans(),
        next_use=st.none() | TIMES,
    ),
    max_size=8,
)
NOTHING = Plan(evict=[], drain=[], possible=True)
IMPOSSIBLE = Plan(evict=[], drain=[], possible=False)


def resident(
    name: str,
    size: int = 4,
    last_used: float = 0.0,
    *,
    in_use: bool = False,
    pinned: bool = False,
    next_use: float | None = None,
    ttl: float | None = None,
) -> Resident:
    return Resident(name, size, last_used, in_use, pinned, next_use, ttl)


def test_the_least_recently_used_leaves() -> None:
    models = [resident("new", last_used=9), resident("old", last_used=1), resident("middle", last_used=5)]
    assert choose_victims(models, 4, 0) == Plan(["old"], [], possible=True)
    assert choose_victims(models, 8, 0) == Plan(["old", "middle"], [], possible=True)


def test_free_memory_counts_before_anybody_leaves() -> None:
    models = [resident("old", last_used=1), resident("new", last_used=9)]
    assert choose_victims(models, 10, 6) == Plan(["old"], [], possible=True)


def test_an_overdrawn_budget_is_made_up_for() -> None:
    models = [resident("old", last_used=1), resident("new", last_used=9)]
    assert choose_victims(models, 2, -4) == Plan(["old", "new"], [], possible=True)


def test_an_old_model_is_spared_if_a_newer_one_is_needed_anyway_and_is_enough() -> None:
    models = [resident("old and small", 1, 1), resident("newer and large", 10, 5)]
    assert choose_victims(models, 10, 0).evict == ["newer and large"]


def test_the_most_recently_used_is_spared_first() -> None:
    models = [resident("oldest", 2, 1), resident("older", 2, 2), resident("large", 9, 3)]
    assert choose_victims(models, 11, 0).evict == ["oldest", "large"]


def test_of_equal_ages_the_fewest_bytes_leave() -> None:
    models = [resident("six", 6), resident("five", 5), resident("another five", 5)]
    assert choose_victims(models, 10, 0).evict == ["another five", "five"]
    assert choose_victims(models, 6, 0).evict == ["six"]


def test_a_model_in_use_is_drained_only_if_the_idle_ones_are_not_enough() -> None:
    models = [resident("busy", 8, 1, in_use=True), resident("idle", 4, 9)]
    assert choose_victims(models, 4, 0) == Plan(["idle"], [], possible=True)
    assert choose_victims(models, 12, 0) == Plan(["idle"], ["busy"], possible=True)


def test_no_idle_model_leaves_in_vain_beside_one_that_is_drained() -> None:
    models = [resident("busy", 8, 1, in_use=True), resident("idle", 4, 9)]
    assert choose_victims(models, 8, 0) == Plan([], ["busy"], possible=True)


def test_what_is_pinned_makes_a_plan_impossible_and_then_nobody_leaves() -> None:
    models = [resident("pinned", 8, pinned=True), resident("idle", 4), resident("busy", 4, in_use=True)]
    assert choose_victims(models, 9, 0) == IMPOSSIBLE


def test_a_model_that_is_expected_back_outlives_one_that_is_not() -> None:
    models = [resident("expected", last_used=1, next_use=50), resident("newer", last_used=9)]
    assert choose_victims(models, 4, 0).evict == ["newer"]


def test_of_those_expected_back_the_last_leaves_first() -> None:
    models = [resident("soon", last_used=1, next_use=20), resident("later", last_used=9, next_use=80)]
    assert choose_victims(models, 4, 0).evict == ["later"]


def test_many_models_of_one_age_are_planned_within_bounds() -> None:
    models = [resident(str(number), 2**number + 1) for number in range(64)]
    plan = choose_victims(models, 2**40, 0)
    by_name = {model.name: model for model in models}
    freed = sum(by_name[name].bytes for name in plan.evict)
    assert freed >= 2**40
    assert all(freed - by_name[name].bytes < 2**40 for name in plan.evict)


@given(RESIDENTS, st.integers(0, 60), st.integers(-10, 30))
def test_a_plan_keeps_every_promise(models: list[Resident], needed: int, free: int) -> None:
    plan = choose_victims(models, needed, free)
    by_name = {model.name: model for model in models}
    leaving = [by_name[name] for name in plan.evict + plan.drain]

    unpinned = sum(model.bytes for model in models if not model.pinned)
    assert plan.possible == (unpinned + free >= needed)
    if free >= needed:
        assert plan == NOTHING
    if not plan.possible:
        assert plan == IMPOSSIBLE
        return
    assert len(set(plan.evict + plan.drain)) == len(leaving)
    assert not any(model.pinned for model in leaving)
    assert not any(by_name[name].in_use for name in plan.evict)
    assert all(by_name[name].in_use for name in plan.drain)
    room = free + sum(model.bytes for model in leaving)
    assert room >= needed
    assert all(room - model.bytes < needed for model in leaving)
    idle = sum(model.bytes for model in models if not model.pinned and not model.in_use)
    assert bool(plan.drain) == (idle + free < needed)


@given(RESIDENTS, st.integers(0, 60), st.randoms())
def test_the_order_in_which_models_are_listed_changes_nothing(
    models: list[Resident], needed: int, dice: random.Random
) -> None:
    shuffled = list(models)
    dice.shuffle(shuffled)
    assert choose_victims(shuffled, needed, 0) == choose_victims(models, needed, 0)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(1, 40))
def test_no_other_choice_among_equals_is_smaller(sizes: list[int], needed: int) -> None:
    models = [resident(str(number), size) for number, size in enumerate(sizes)]
    sums = [sum(some) for count in range(len(sizes) + 1) for some in combinations(sizes, count)]
    enough = [total for total in sums if total >= needed]
    plan = choose_victims(models, needed, 0)
    assert plan.possible == bool(enough)
    if enough:
        assert sum(sizes[int(name)] for name in plan.evict) == min(enough)


@given(RESIDENTS.map(lambda models: [model._replace(next_use=None, bytes=1) for model in models]))
def test_models_of_one_size_leave_in_the_order_of_their_last_use(models: list[Resident]) -> None:
    idle = [model for model in models if not model.pinned and not model.in_use]
    times = {model.name: model.last_used for model in idle}
    for count in range(len(idle) + 1):
        evicted = choose_victims(models, count, 0).evict
        assert [times[name] for name in evicted] == sorted(times.values())[:count]


def test_a_model_expires_once_it_lay_idle_for_its_time_to_live() -> None:
    models = [resident("old", last_used=10), resident("new", last_used=11), resident("older", last_used=5)]
    assert expired(models, 69.9, 60) == ["older"]
    assert expired(models, 70.0, 60) == ["older", "old"]


@pytest.mark.parametrize("kept", [{"in_use": True}, {"pinned": True}, {"ttl": math.inf}, {"ttl": 2000.0}])
def test_what_is_in_use_or_pinned_or_has_more_time_does_not_expire(kept: dict[str, float]) -> None:
    options = {"in_use": False, "pinned": False, "ttl": None} | kept
    model = Resident("m", 1, 0.0, bool(options["in_use"]), bool(options["pinned"]), ttl=options["ttl"])
    assert expired([model], 1000, 10) == []


def test_without_a_default_only_models_with_a_time_of_their_own_expire() -> None:
    models = [resident("own", ttl=10), resident("none")]
    assert expired(models, 1000, None) == ["own"]


def test_a_clock_that_went_backwards_expires_nobody() -> None:
    assert expired([resident("m", last_used=100)], 50, 10) == []


def test_a_model_that_is_expected_back_soon_is_kept_until_it_is_overdue() -> None:
    model = resident("m", last_used=0, next_use=105)
    assert expired([model], 94, 10) == ["m"]
    assert expired([model], 95, 10) == []
    assert expired([model], 105, 10) == []
    assert expired([model], 106, 10) == ["m"]
