import tracemalloc
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_sidecar.runtime.engine.sequence import Sampling, Sequence
from mlx_sidecar.runtime.scheduling.memory import Footprint, MemoryBudget
from mlx_sidecar.runtime.scheduling.priority import Priority
from mlx_sidecar.runtime.scheduling.waiting import LOOK_AHEAD, MAX_PASSED, Waiting, WaitingReport

AGEING_SECONDS = 10.0
CRITICAL, HIGH, NORMAL, LOW = Priority
MODELS = ["m", "n"]
PRIORITIES = st.sampled_from(Priority)


class Clock:
    """A time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Line:
    """A line, its clock, and a short way to put something into it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.waiting = Waiting[Sequence](AGEING_SECONDS, self.clock)

    def ask(
        self,
        priority: Priority = NORMAL,
        *,
        owner: int = 0,
        model: str = "m",
        prompt: int = 10,
        answer: int = 10,
    ) -> Sequence:
        item = Sequence(
            model=model,
            prompt=[1] * prompt,
            max_tokens=answer,
            sampling=Sampling(),
            stop_token_ids=frozenset(),
            on_emission=lambda _: None,
            priority=priority,
            owner=owner,
            submitted_at=self.clock.now,
        )
        self.waiting.put(item)
        return item

    def take(
        self, fits: Callable[[Sequence], bool] = lambda _: True, models: list[str] = MODELS
    ) -> Sequence | None:
        return self.waiting.take(models, fits)


def test_the_most_urgent_goes_first() -> None:
    line = Line()
    asked = [line.ask(priority) for priority in (LOW, CRITICAL, NORMAL, HIGH)]
    assert [line.take() for _ in asked] == sorted(asked, key=lambda item: item.priority)
    assert line.take() is None


def test_those_who_have_all_waited_for_long_keep_their_order() -> None:
    line = Line()
    asked = [line.ask(priority) for priority in (LOW, CRITICAL, NORMAL, HIGH)]
    line.clock.now += 100 * AGEING_SECONDS
    assert [line.take() for _ in asked] == sorted(asked, key=lambda item: item.priority)


@pytest.mark.parametrize("priority", [HIGH, NORMAL, LOW])
def test_somebody_who_waited_beats_new_critical_requests(priority: Priority) -> None:
    line = Line()
    patient = line.ask(priority)
    while line.clock.now < priority * AGEING_SECONDS:
        line.ask(CRITICAL)
        assert line.take() is not patient
        line.clock.now += 0.5
    line.ask(CRITICAL)
    assert line.take() is patient


class Arrival(NamedTuple):
    """What an adversary asks for at one moment."""

    priority: Priority
    owner: int
    model: str


ARRIVALS = st.lists(st.builds(Arrival, PRIORITIES, st.integers(0, 5), st.sampled_from(MODELS)), max_size=4)


@given(PRIORITIES, st.lists(ARRIVALS, min_size=1, max_size=30), st.sampled_from([0.3, 1.0, 4.0, 25.0]))
def test_nothing_anybody_asks_for_keeps_one_waiting_beyond_its_bound(
    priority: Priority, arrivals: list[list[Arrival]], seconds: float
) -> None:
    line = Line()
    patient = line.ask(priority, model="patient")
    bound = (priority + 1) * AGEING_SECONDS
    left: int | None = None
    for moment in count():
        if left is None and line.clock.now >= bound:
            # From here on each of the other lanes goes first at most once.
            left = len({(item.model, item.priority) for item in line.waiting}) - 1
        for arrival in arrivals[moment % len(arrivals)]:
            line.ask(arrival.priority, owner=arrival.owner, model=arrival.model)
        if line.take(models=[*MODELS, "patient"]) is patient:
            return
        if left is not None:
            left -= 1
            assert left >= 0
        line.clock.now += seconds


def test_everyone_in_a_long_line_of_low_priority_is_served_in_time_among_critical_ones() -> None:
    line = Line()
    low = [line.ask(LOW, owner=owner % 3) for owner in range(30)]
    line.ask(CRITICAL)
    while any(item in line.waiting for item in low):
        line.ask(CRITICAL)
        taken = line.take()
        served = sum(item not in line.waiting for item in low)
        assert served >= line.clock.now // (LOW * AGEING_SECONDS + 1)
        assert taken is not None
        line.clock.now += 1


def test_a_long_line_that_is_served_does_not_hold_up_who_is_urgent() -> None:
    # A batch job of two hours; if each of its items aged, it would hold up everybody else to its end.
    line = Line()
    for _ in range(1000):
        line.ask(LOW)
    for _ in range(500):
        line.take()
        line.clock.now += 7.0
    urgent = line.ask(CRITICAL)
    assert line.take() is urgent


def test_a_model_without_a_free_row_holds_nobody_up() -> None:
    line = Line()
    full = [line.ask(CRITICAL, model="m") for _ in range(2 * LOOK_AHEAD)]
    other = line.ask(LOW, model="n")
    assert line.take(models=["n"]) is other
    assert line.take(models=["n"]) is None
    assert line.take(models=[]) is None
    assert line.take() is full[0]


def small(item: Sequence) -> bool:
    return len(item.prompt) < 100


def test_smaller_ones_go_before_one_without_room_but_only_so_many() -> None:
    line = Line()
    large = line.ask(prompt=1000)
    passed = 0
    for owner in range(10 * MAX_PASSED):
        line.ask(owner=owner)
        passed += line.take(small) is not None
    assert passed == MAX_PASSED
    line.ask(CRITICAL)
    assert line.take(small) is None
    assert line.take() is large
    assert line.take(small) is not None


def test_one_without_room_is_asked_first_from_then_on() -> None:
    line = Line()
    large = line.ask(prompt=1000)
    assert line.take(small) is None
    line.ask(CRITICAL)
    assert line.take() is large


def test_nobody_less_urgent_goes_before_one_without_room() -> None:
    line = Line()
    line.ask(HIGH, prompt=1000)
    less = line.ask(NORMAL)
    as_urgent, more = line.ask(HIGH, owner=1), line.ask(CRITICAL)
    assert [line.take(small) for _ in range(3)] == [more, as_urgent, None]
    assert less in line.waiting


def test_one_without_room_holds_nobody_up_while_its_model_has_no_row() -> None:
    line = Line()
    large = line.ask(prompt=1000, model="m")
    for _ in range(3 * MAX_PASSED):
        assert line.take(small) is None
        other = line.ask(LOW, model="n")
        assert line.take(small, models=["n"]) is other
    assert large in line.waiting
    passes = line.ask(model="m")
    assert line.take(small) is passes


def test_one_without_room_that_is_cancelled_holds_nobody_up() -> None:
    line = Line()
    large = line.ask(CRITICAL, prompt=1000)
    other = line.ask(LOW)
    assert line.take(small) is None
    assert line.waiting.report().held == 1
    assert line.waiting.remove(large)
    assert line.waiting.report().held == 0
    assert line.take(small) is other


def test_the_first_that_fits_is_the_one_taken() -> None:
    line = Line()
    for prompt in (1000, 1000, 10, 1000, 10):
        line.ask(prompt=prompt)
    fitted: list[Sequence] = []

    def reserve(item: Sequence) -> bool:
        if small(item):
            fitted.append(item)
        return small(item)

    taken = [line.take(reserve), line.take(reserve), line.take(reserve)]
    assert taken == [*fitted, None]
    assert len(fitted) == 2


def test_a_long_line_is_not_searched_to_its_end() -> None:
    line = Line()
    for number in range(4096):
        line.ask(owner=number % 8, priority=Priority(number % 4))
    asked: list[Sequence] = []

    def refuse(item: Sequence) -> bool:
        asked.append(item)
        return False

    assert line.take(refuse) is None
    assert line.take(refuse) is None
    assert len(asked) <= 2 * (LOOK_AHEAD + 1)


def test_two_owners_share_by_tokens_what_their_requests_receive() -> None:
    line = Line()
    received = {1: 0, 2: 0}
    for _ in range(10):
        line.ask(owner=1, answer=10)
        line.ask(owner=2, answer=90)
    for _ in range(600):
        item = line.take()
        assert item is not None
        line.waiting.charge(item, item.max_tokens)
        received[item.owner] += len(item.prompt) + item.max_tokens
        line.ask(owner=item.owner, answer=item.max_tokens)
        assert abs(received[1] - received[2]) <= 100


def test_who_is_removed_is_not_taken() -> None:
    line = Line()
    gone, stays = line.ask(), line.ask()
    assert line.waiting.remove(gone)
    assert not line.waiting.remove(gone)
    assert line.take() is stays
    assert not line.waiting.remove(stays)
    assert line.take() is None


def test_the_report_says_who_waits_and_for_how_long() -> None:
    line = Line()
    assert line.waiting.report() == WaitingReport()
    line.ask(LOW, prompt=5)
    line.clock.now = 3.0
    line.ask(LOW, prompt=6, owner=1, model="n")
    line.ask(CRITICAL, prompt=7)
    line.clock.now = 4.0
    assert line.waiting.report() == WaitingReport((1, 0, 0, 2), (7, 0, 0, 11), 4.0, 0)


def test_connections_that_come_and_go_leave_nothing_behind() -> None:
    line = Line()
    strangers = count()

    def come_and_go(connections: int) -> None:
        for _ in range(connections):
            line.ask(owner=next(strangers), model=f"model {next(strangers)}")
            line.ask(owner=next(strangers))
            for item in list(line.waiting):
                assert line.waiting.take([item.model], lambda _: True) is item
                line.waiting.charge(item, 10)

    come_and_go(1000)
    tracemalloc.start()
    try:
        come_and_go(1000)
        before, _ = tracemalloc.get_traced_memory()
        come_and_go(5000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 32 * 1024


REQUESTS = st.lists(
    st.tuples(
        PRIORITIES,
        st.integers(0, 3),
        st.sampled_from(MODELS),
        st.integers(1, 3000),
        st.integers(1, 3000),
        st.integers(0, 30),
    ),
    max_size=60,
)


@given(REQUESTS, st.integers(1, 4))
def test_everybody_who_can_ever_fit_runs_once_and_memory_is_never_overdrawn(
    requests: list[tuple[Priority, int, str, int, int, int]], rows: int
) -> None:
    line = Line()
    budget = MemoryBudget[Sequence](20_000)
    for model in MODELS:
        budget.set_model(model, Footprint(weights=2000, kv_per_token=2, kv_fixed=7, prefill_peak=500))
    steps: dict[Sequence, int] = {}
    for priority, owner, model, prompt, answer, length in requests:
        assert budget.can_ever(model, prompt, answer)
        item = line.ask(priority, owner=owner, model=model, prompt=prompt, answer=answer)
        steps[item] = length
    running: dict[Sequence, int] = {}
    ran: list[Sequence] = []
    while len(line.waiting) or running:
        free = [m for m in MODELS if sum(item.model == m for item in running) < rows]
        while (item := line.take(budget.reserve, free)) is not None:
            running[item] = steps[item]
            ran.append(item)
            free = [m for m in MODELS if sum(item.model == m for item in running) < rows]
        report = budget.report()
        assert report.weights_bytes + report.reserved_bytes <= 20_000
        # Nothing runs only if nothing waits: a line that stands still would hang here.
        assert running
        for item in [item for item, left in running.items() if not left]:
            budget.release(item)
        running = {item: left - 1 for item, left in running.items() if left}
        line.clock.now += 1.0
    assert len(ran) == len(steps)
    assert set(ran) == set(steps)


class Waitings(RuleBasedStateMachine):
    """Items are put, removed and taken in any order, with any models open and any amount of memory."""

    @initialize()
    def begin(self) -> None:
        self.line = Line()
        self.there: list[Sequence] = []

    @rule(
        priority=PRIORITIES,
        owner=st.integers(0, 3),
        model=st.sampled_from(MODELS),
        prompt=st.integers(1, 100),
    )
    def put(self, priority: Priority, owner: int, model: str, prompt: int) -> None:
        self.there.append(self.line.ask(priority, owner=owner, model=model, prompt=prompt))

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.there))
        assert self.line.waiting.remove(item)
        self.there.remove(item)

    @rule(
        models=st.lists(st.sampled_from(MODELS), unique=True),
        memory=st.integers(0, 100),
    )
    def take(self, models: list[str], memory: int) -> None:
        item = self.line.take(lambda item: len(item.prompt) <= memory, models)
        if item is not None:
            assert item.model in models
            assert len(item.prompt) <= memory
            self.there.remove(item)
            self.line.waiting.charge(item, 10)

    @rule(models=st.lists(st.sampled_from(MODELS), unique=True))
    def take_with_room_for_everybody(self, models: list[str]) -> None:
        item = self.line.take(models=models)
        candidates = [other for other in self.there if other.model in models]
        if item is None:
            assert not candidates
        else:
            alike = [
                (other.owner, other.priority, other.model) == (item.owner, item.priority, item.model)
                for other in candidates
            ]
            assert candidates[alike.index(True)] is item
            self.there.remove(item)

    @rule(seconds=st.floats(0, 30))
    def pass_time(self, seconds: float) -> None:
        self.line.clock.now += seconds

    @invariant()
    def the_line_is_what_was_put_and_neither_taken_nor_removed(self) -> None:
        assert list(self.line.waiting) == self.there
        report = self.line.waiting.report()
        assert len(self.line.waiting) == sum(report.counts) == len(self.there)
        assert sum(report.prompt_tokens) == sum(len(item.prompt) for item in self.there)
        first = min((item.submitted_at for item in self.there), default=self.line.clock.now)
        assert report.oldest_wait_seconds == self.line.clock.now - first
        assert report.held <= len({item.model for item in self.there})


TestWaiting = Waitings.TestCase
