import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from mlx_sidecar.runtime.engine.sequence import Sampling, Sequence
from mlx_sidecar.runtime.scheduling.memory import KV_STEP_TOKENS, Footprint, MemoryBudget, MemoryReport

MODELS = ["small", "large"]
FOOTPRINTS = {
    "small": Footprint(weights=5_000, kv_per_token=1, kv_fixed=10, prefill_peak=400),
    "large": Footprint(weights=20_000, kv_per_token=4, kv_fixed=0, prefill_peak=3000),
}


def request(model: str, prompt: int, max_tokens: int) -> Sequence:
    return Sequence(
        model=model,
        prompt=[1] * prompt,
        max_tokens=max_tokens,
        sampling=Sampling(),
        stop_token_ids=frozenset(),
        on_emission=lambda _: None,
    )


def budget_of(total: int, *models: str) -> MemoryBudget[Sequence]:
    budget = MemoryBudget[Sequence](total)
    for model in models:
        budget.set_model(model, FOOTPRINTS[model])
    return budget


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "steps"),
    [
        (1, 1, 1),
        (KV_STEP_TOKENS - 1, 1, 1),
        (KV_STEP_TOKENS, 1, 2),
        (1, KV_STEP_TOKENS * 3, 4),
    ],
)
def test_a_sequence_is_projected_at_its_full_length_in_whole_steps(
    prompt: int, max_tokens: int, steps: int
) -> None:
    budget = budget_of(10**6, *MODELS)
    assert budget.projection("small", prompt, max_tokens) == 10 + steps * KV_STEP_TOKENS
    assert budget.projection("large", prompt, max_tokens) == 4 * steps * KV_STEP_TOKENS


def test_the_peak_of_prefill_is_counted_once_and_is_that_of_the_largest_who_runs() -> None:
    budget = budget_of(10**6, *MODELS)
    small, other, large = request("small", 1, 1), request("small", 1, 1), request("large", 1, 1)
    reserved: list[int] = []
    for item in (small, other, large):
        assert budget.reserve(item)
        reserved.append(budget.report().reserved_bytes)
    assert reserved == [266 + 400, 2 * 266 + 400, 2 * 266 + 1024 + 3000]
    budget.release(large)
    assert budget.report().reserved_bytes == 2 * 266 + 400


def test_who_does_not_fit_changes_nothing_and_fits_once_there_is_room() -> None:
    budget = budget_of(5_000 + 400 + 2 * 266, "small")
    first, second, third = (request("small", 1, 1) for _ in range(3))
    assert budget.reserve(first)
    assert budget.reserve(second)
    full = budget.report()
    assert full == MemoryReport(5_932, 5_000, 0, 932, 0, (("small", 532),))
    assert not budget.reserve(third)
    assert budget.report() == full
    budget.release(first)
    assert budget.reserve(third)


def test_a_budget_can_be_used_to_its_last_byte() -> None:
    needed = 5_000 + 400 + 266
    assert budget_of(needed, "small").reserve(request("small", 1, 1))
    assert not budget_of(needed - 1, "small").reserve(request("small", 1, 1))


def test_to_reserve_or_release_twice_is_to_do_it_once() -> None:
    budget = budget_of(10**6, "small")
    item = request("small", 1, 1)
    assert budget.reserve(item)
    once = budget.report()
    assert budget.reserve(item)
    assert budget.report() == once
    assert budget.release(item)
    assert not budget.release(item)
    assert budget.report() == MemoryReport(10**6, 5_000, 0, 0, 995_000)


@given(st.integers(0, 40_000), st.sampled_from(MODELS), st.integers(1, 3000), st.integers(1, 3000))
def test_what_can_ever_fit_is_what_fits_when_nothing_runs(
    total: int, model: str, prompt: int, max_tokens: int
) -> None:
    budget = budget_of(total, *MODELS)
    can = budget.can_ever(model, prompt, max_tokens)
    assert can == (budget.needed(model, prompt, max_tokens) <= budget.available_bytes)
    assert can == budget.reserve(request(model, prompt, max_tokens))


def test_models_that_take_more_than_the_budget_leave_room_for_nobody() -> None:
    budget = budget_of(24_000, *MODELS)
    assert not budget.reserve(request("small", 1, 1))
    assert budget.report() == MemoryReport(24_000, 25_000, 0, 0, 0)
    budget.forget_model("large")
    assert budget.reserve(request("small", 1, 1))


class Budgeting(RuleBasedStateMachine):
    """Requests and models come and go in any order; the sums are made again from scratch each time."""

    running = Bundle("running")
    total = 40_000

    @initialize()
    def begin(self) -> None:
        self.budget = budget_of(self.total)
        self.models: set[str] = set()
        self.reserved: set[Sequence] = set()

    @rule(model=st.sampled_from(MODELS))
    def load(self, model: str) -> None:
        self.budget.set_model(model, FOOTPRINTS[model])
        self.models.add(model)

    @rule(model=st.sampled_from(MODELS))
    def unload(self, model: str) -> None:
        if not any(item.model == model for item in self.reserved):
            self.budget.forget_model(model)
            self.models.discard(model)

    @rule(
        target=running,
        model=st.sampled_from(MODELS),
        prompt=st.integers(1, 4000),
        max_tokens=st.integers(1, 4000),
    )
    def reserve(self, model: str, prompt: int, max_tokens: int) -> Sequence:
        item = request(model, prompt, max_tokens)
        if model in self.models:
            together = {*self.reserved, item}
            fits = self.used(together) <= self.total
            assert self.budget.reserve(item) == fits
            if fits:
                self.reserved = together
        return item

    @rule(item=consumes(running))
    def release(self, item: Sequence) -> None:
        self.budget.release(item)
        self.reserved.discard(item)

    @invariant()
    def the_report_is_the_sum_of_what_is_there(self) -> None:
        weights = self.used(set())
        used = self.used(self.reserved)
        free = max(self.total - used, 0)
        report = self.budget.report()
        assert report._replace(kv_bytes=()) == MemoryReport(self.total, weights, 0, used - weights, free)
        assert all(kv > 0 for _, kv in report.kv_bytes)

    def used(self, reserved: set[Sequence]) -> int:
        weights = sum(FOOTPRINTS[model].weights for model in self.models)
        caches = sum(
            self.budget.projection(item.model, len(item.prompt), item.max_tokens) for item in reserved
        )
        peaks = [FOOTPRINTS[item.model].prefill_peak for item in reserved]
        return weights + caches + max(peaks, default=0)


TestBudgeting = Budgeting.TestCase
