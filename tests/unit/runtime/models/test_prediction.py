import random
import tracemalloc

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mlx_sidecar.runtime.models.prediction import MAX_MODELS, PredictionReport, Predictor

HOUR = 3600.0
LEAD = 30.0


def asked(model: str, times: list[float]) -> Predictor:
    predictor = Predictor()
    for at in times:
        predictor.note_request(model, at)
    return predictor


def pairs(count: int, gap: float = 60.0) -> Predictor:
    """`draft`, then `check`, again and again at times without a period."""
    predictor = Predictor()
    at = 0.0
    for number in range(count):
        predictor.note_request("draft", at)
        predictor.note_request("check", at + gap)
        at += HOUR * (1 + number**2 % 7)
    return predictor


def test_a_model_is_wanted_a_lead_ahead_of_its_next_use_and_not_before() -> None:
    predictor = asked("m", [0, HOUR, 2 * HOUR, 3 * HOUR])
    assert predictor.wanted(4 * HOUR - LEAD - 1, ["m"], LEAD) == []
    assert predictor.wanted(4 * HOUR - LEAD, ["m"], LEAD) == ["m"]


def test_a_model_that_varies_is_wanted_ahead_of_its_earliest_use() -> None:
    predictor = asked("m", [0, HOUR - 120, 2 * HOUR - 120, 3 * HOUR])
    assert predictor.wanted(4 * HOUR - 120 - LEAD, ["m"], LEAD) == ["m"]


def test_the_next_use_is_the_earliest_that_is_likely_and_never_in_the_past() -> None:
    predictor = asked("m", [0, HOUR - 120, 2 * HOUR - 120, 3 * HOUR])
    assert predictor.next_use("m", 3.5 * HOUR) == 4 * HOUR - 120
    assert predictor.next_use("m", 4 * HOUR + 60) == 4 * HOUR + 60


def test_only_what_is_absent_is_wanted() -> None:
    predictor = asked("m", [0, HOUR, 2 * HOUR, 3 * HOUR])
    assert predictor.wanted(4 * HOUR, [], LEAD) == []
    assert predictor.wanted(4 * HOUR, ["never seen"], LEAD) == []


def test_a_use_in_the_window_is_a_hit() -> None:
    predictor = asked("m", [0, HOUR, 2 * HOUR, 3 * HOUR])
    predictor.note_brought_back("m", 4 * HOUR - LEAD)
    assert predictor.report() == PredictionReport(1, 0, 0, None)
    predictor.note_request("m", 4 * HOUR + 20)
    assert predictor.report() == PredictionReport(1, 1, 0, 1.0)


def test_a_use_after_the_window_is_a_miss() -> None:
    predictor = asked("m", [0, HOUR, 2 * HOUR, 3 * HOUR])
    predictor.note_brought_back("m", 4 * HOUR - LEAD)
    predictor.note_request("m", 4.5 * HOUR)
    assert predictor.report() == PredictionReport(1, 0, 1, 0.0)


def test_one_evicted_before_its_use_is_a_miss_and_is_not_brought_back_twice_for_one_window() -> None:
    predictor = asked("m", [0, HOUR, 2 * HOUR, 3 * HOUR])
    predictor.note_brought_back("m", 4 * HOUR - LEAD)
    predictor.note_evicted("m", 4 * HOUR - 1)
    assert predictor.report() == PredictionReport(1, 0, 1, 0.0)
    assert predictor.wanted(4 * HOUR, ["m"], LEAD) == []
    predictor.note_request("m", 4 * HOUR)
    assert predictor.wanted(5 * HOUR - LEAD, ["m"], LEAD) == ["m"]
    assert predictor.report() == PredictionReport(1, 0, 1, 0.0)


def test_what_is_said_twice_counts_once() -> None:
    predictor = asked("m", [0, HOUR, 2 * HOUR, 3 * HOUR])
    for _ in range(2):
        predictor.note_brought_back("m", 4 * HOUR - LEAD)
    assert predictor.report() == PredictionReport(1, 0, 0, None)
    for _ in range(2):
        predictor.note_evicted("m", 4 * HOUR)
    assert predictor.report() == PredictionReport(1, 0, 1, 0.0)


def test_eviction_after_a_hit_is_no_miss() -> None:
    predictor = asked("m", [0, HOUR, 2 * HOUR, 3 * HOUR])
    predictor.note_brought_back("m", 4 * HOUR - LEAD)
    predictor.note_request("m", 4 * HOUR)
    predictor.note_evicted("m", 4 * HOUR + 900)
    assert predictor.report() == PredictionReport(1, 1, 0, 1.0)


def test_one_brought_back_that_nothing_predicts_is_a_miss_at_once() -> None:
    predictor = asked("m", [0])
    predictor.note_brought_back("m", 10)
    assert predictor.report() == PredictionReport(1, 0, 1, 0.0)


def test_a_period_that_stops_is_given_up_after_two_misses_at_most() -> None:
    for length in (4, 10, 200):
        predictor = asked("m", [hour * HOUR for hour in range(length)])
        brought = bring_back_whenever_wanted(predictor, "m", (length - 1) * HOUR, (length + 50) * HOUR)
        assert 1 <= brought <= 2
        assert predictor.next_use("m", (length + 50) * HOUR) is None
        assert predictor.report().misses == brought


def bring_back_whenever_wanted(predictor: Predictor, model: str, begin: float, end: float) -> int:
    """Play a runtime that follows every advice and evicts ten minutes later; return how often it did."""
    brought, at, since = 0, begin, None
    while at < end:
        if since is not None and at - since > 600:
            predictor.note_evicted(model, at)
            since = None
        if since is None and predictor.wanted(at, [model], LEAD):
            predictor.note_brought_back(model, at)
            brought, since = brought + 1, at
        at += LEAD
    return brought


def test_a_model_asked_for_at_random_is_hardly_ever_brought_back() -> None:
    dice = random.Random(7)
    predictor, at, brought = Predictor(), 0.0, 0
    for _ in range(500):
        predictor.note_request("m", at)
        upcoming = at + dice.expovariate(1 / HOUR)
        brought += bring_back_whenever_wanted(predictor, "m", at, upcoming)
        at = upcoming
    assert brought < 50


def test_a_model_that_follows_another_is_wanted_when_that_one_is_asked_for() -> None:
    predictor = pairs(5)
    assert predictor.wanted(99 * HOUR, ["check"], LEAD) == []
    predictor.note_request("draft", 100 * HOUR)
    assert predictor.next_use("check", 100 * HOUR) == 100 * HOUR + 60
    assert predictor.wanted(100 * HOUR, ["check"], LEAD) == []
    assert predictor.wanted(100 * HOUR + 60 - LEAD, ["check"], LEAD) == ["check"]
    predictor.note_brought_back("check", 100 * HOUR + 60 - LEAD)
    predictor.note_request("check", 100 * HOUR + 60)
    assert predictor.report() == PredictionReport(1, 1, 0, 1.0)


def test_what_follows_within_seconds_follows() -> None:
    predictor = pairs(5, gap=5)
    predictor.note_request("draft", 100 * HOUR)
    assert predictor.next_use("check", 100 * HOUR) == 100 * HOUR + 5


def test_after_a_pause_a_succession_is_expected_anew() -> None:
    predictor = pairs(5)
    predictor.note_request("draft", 100 * HOUR)
    assert predictor.next_use("check", 100 * HOUR + 400) is None
    predictor.note_request("draft", 100 * HOUR + 400)
    assert predictor.next_use("check", 100 * HOUR + 400) == 100 * HOUR + 460


def test_of_two_patterns_the_sooner_one_counts() -> None:
    predictor = Predictor()
    for hour in range(0, 12, 2):
        predictor.note_request("draft", hour * HOUR)
        predictor.note_request("check", hour * HOUR + 60)
    assert predictor.next_use("check", 11 * HOUR) == 12 * HOUR + 60
    predictor.note_request("draft", 11 * HOUR)
    assert predictor.next_use("check", 11 * HOUR) == 11 * HOUR + 60


def test_a_succession_that_stops_is_given_up_after_two_misses_at_most() -> None:
    for length in (3, 5, 40):
        predictor = pairs(length)
        brought = 0
        for number in range(20):
            at = (1000 + number**2) * HOUR
            predictor.note_request("draft", at)
            brought += bring_back_whenever_wanted(predictor, "check", at, at + 0.9 * HOUR)
        assert 1 <= brought <= 2
        assert predictor.report() == PredictionReport(brought, 0, brought, 0.0)


def test_a_pair_that_alternates_without_a_pause_is_brought_back_every_time() -> None:
    predictor = Predictor()
    for number in range(20):
        predictor.note_request(("a", "b")[number % 2], number * 60.0)
    at = 20 * 60.0
    for number in range(20, 30):
        absent = ("a", "b")[number % 2]
        assert predictor.wanted(at - 1, [absent], LEAD) == [absent]
        predictor.note_brought_back(absent, at - 1)
        predictor.note_request(absent, at)
        at += 60
    assert predictor.report() == PredictionReport(10, 10, 0, 1.0)


def test_the_most_certain_is_wanted_first() -> None:
    predictor = Predictor()
    for hour in range(20):
        if hour >= 16:
            predictor.note_request("new", hour * HOUR)
        predictor.note_request("sure", hour * HOUR)
    assert predictor.wanted(20 * HOUR - 1, ["new", "sure"], LEAD) == ["sure", "new"]


def test_a_clock_that_goes_backwards_stands_still() -> None:
    predictor = asked("m", [0, HOUR, 2 * HOUR, 3 * HOUR])
    predictor.note_request("m", HOUR)
    predictor.note_request("m", 3 * HOUR)
    assert predictor.next_use("m", 0) == 4 * HOUR


def test_the_model_not_asked_for_the_longest_is_forgotten() -> None:
    predictor = asked("first", [0, HOUR, 2 * HOUR, 3 * HOUR])
    predictor.note_brought_back("first", 4 * HOUR - LEAD)
    for number in range(MAX_MODELS):
        predictor.note_request(f"m{number}", 4 * HOUR - LEAD)
    assert predictor.next_use("first", 4 * HOUR - LEAD) is None
    assert predictor.report() == PredictionReport(1, 0, 1, 0.0)


def test_a_model_that_is_asked_for_again_is_not_forgotten() -> None:
    predictor = asked("first", [0, HOUR, 2 * HOUR, 3 * HOUR])
    for number in range(MAX_MODELS - 1):
        predictor.note_request(f"m{number}", 3.5 * HOUR)
    predictor.note_request("first", 4 * HOUR)
    predictor.note_request("new", 4 * HOUR)
    assert predictor.next_use("first", 4.5 * HOUR) == 5 * HOUR


def test_any_number_of_models_and_requests_is_remembered_in_bounded_memory() -> None:
    predictor = Predictor()

    def ask_for_many(first: int) -> int:
        for number in range(first, first + 8 * MAX_MODELS):
            predictor.note_request(str(number % (4 * MAX_MODELS)), number * HOUR)
            predictor.note_request(str(number % MAX_MODELS // 4), number * HOUR + 60)
            predictor.note_brought_back(str(number), number * HOUR + 60)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        ask_for_many(0)
        before = ask_for_many(10_000)
        assert ask_for_many(20_000) - before < 100_000
    finally:
        tracemalloc.stop()


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens, in whatever order and with whatever clock, the books balance and stay small."""

    names = st.integers(0, MAX_MODELS + 40).map(str) | st.sampled_from("ab")
    steps = st.floats(-100, 4000)

    def __init__(self) -> None:
        super().__init__()
        self.predictor = Predictor()
        self.now = 0.0
        self.brought = 0

    @rule(model=names, step=steps)
    def ask(self, model: str, step: float) -> None:
        self.now += step
        self.predictor.note_request(model, self.now)

    @rule(first=st.integers(0, MAX_MODELS), step=steps)
    def ask_for_many(self, first: int, step: float) -> None:
        for number in range(first, first + MAX_MODELS):
            self.now += step
            self.predictor.note_request(str(number), self.now)

    @rule(model=names, period=st.floats(31, 4000), times=st.integers(4, 8))
    def ask_regularly(self, model: str, period: float, times: int) -> None:
        for _ in range(times):
            self.now += period
            self.predictor.note_request(model, self.now)

    @rule(models=st.lists(names, max_size=5), step=steps)
    def follow_the_advice(self, models: list[str], step: float) -> None:
        self.now += step
        wanted = self.predictor.wanted(self.now, models, LEAD)
        assert set(wanted) <= set(models)
        for model in wanted:
            self.predictor.note_brought_back(model, self.now)
            assert model not in self.predictor.wanted(self.now, models, LEAD)

    @rule(model=names, step=steps)
    def bring_back_without_advice(self, model: str, step: float) -> None:
        self.now += step
        self.predictor.note_brought_back(model, self.now)

    @rule(model=names, step=steps)
    def evict(self, model: str, step: float) -> None:
        self.now += step
        self.predictor.note_evicted(model, self.now)

    @invariant()
    def next_use_is_never_in_the_past(self) -> None:
        for model in ("a", "b", "0"):
            expected = self.predictor.next_use(model, self.now)
            assert expected is None or expected >= self.now

    @invariant()
    def the_books_balance(self) -> None:
        report = self.predictor.report()
        assert 0 <= report.hits + report.misses <= report.predictions
        # All that are undecided are remembered one by one.
        assert report.predictions - report.hits - report.misses <= MAX_MODELS
        assert (report.hit_rate is None) == (report.hits + report.misses == 0)


TestAnyHistory = AnyHistory.TestCase
