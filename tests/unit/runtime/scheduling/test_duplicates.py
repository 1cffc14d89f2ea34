"""Shared work over an engine of a few lines, whose sequences have a token for every step."""

import random
from collections.abc import Hashable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from mlx_sidecar.runtime.engine.sequence import Emission, FinishReason, LogProbs, Sampling, Sequence
from mlx_sidecar.runtime.scheduling.duplicates import MAX_REPLAY_TOKENS, Duplicates, Work, key_of
from mlx_sidecar.runtime.scheduling.priority import Priority

LENGTH = 12


def asked(prompt: int = 0, priority: Priority = Priority.NORMAL, max_tokens: int = LENGTH) -> Sequence:
    """What a request asks for. Nothing is ever emitted to it unless somebody follows it."""
    return Sequence("m", [prompt], max_tokens, Sampling(), frozenset(), lambda _: None, priority)


def alone(prompt: int) -> list[int]:
    """The tokens that a prompt leads to."""
    return random.Random(prompt).choices(range(1000), k=LENGTH)


class Engine:
    """Runs everything that is submitted side by side."""

    def __init__(self) -> None:
        self.running: dict[Sequence, int] = {}
        self.submitted: list[Sequence] = []
        self.cancelled: set[Sequence] = set()

    def submit(self, sequence: Sequence) -> None:
        self.submitted.append(sequence)
        self.running[sequence] = 0

    def cancel(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.cancelled.add(sequence)

    def step(self) -> None:
        for sequence, produced in list(self.running.items()):
            if sequence in self.cancelled:
                self.end(sequence, "cancelled")
                continue
            self.running[sequence] += 1
            token = alone(sequence.prompt[0])[produced % LENGTH]
            finish = "length" if produced + 1 == sequence.max_tokens else None
            if finish is not None:
                del self.running[sequence]
            log_probs = None if sequence.log_probs is None else LogProbs(float(token), [])
            sequence.on_emission(Emission(sequence, token, finish, log_probs))

    def end(self, sequence: Sequence, finish: FinishReason) -> None:
        del self.running[sequence]
        sequence.on_emission(Emission(sequence, None, finish))


class Reader:
    """A follower that keeps what it is given, and may leave at a token as if it were a stop string."""

    def __init__(self, leave_after: int | None = None) -> None:
        self.tokens: list[int] = []
        self.log_probs: list[LogProbs] = []
        self.replayed = 0
        self.finish: FinishReason | None = None
        self.work: Work | None = None
        self._leave_after = leave_after

    def replay(self, tokens: list[int], log_probs: list[LogProbs]) -> None:
        assert self.tokens == []
        self.tokens += tokens
        self.log_probs += log_probs
        self.replayed = len(tokens)

    def on_emission(self, emission: Emission) -> None:
        assert self.finish is None, "nothing comes after the end"
        if emission.token is not None:
            self.tokens.append(emission.token)
        if emission.log_probs is not None:
            self.log_probs.append(emission.log_probs)
        self.finish = emission.finish
        if len(self.tokens) == self._leave_after:
            self.leave()

    def leave(self) -> bool:
        assert self.work is not None
        return self.work.leave(self)

    def leave_in_order(self) -> bool:
        assert self.work is not None
        return self.work.leave_in_order(self)


class Bench:
    """An engine and the requests that want something of it."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.duplicates = Duplicates(self.engine.submit, self.engine.cancel)

    def ask(self, sequence: Sequence | None = None, *, alone: bool = False, **reader: Any) -> Reader:
        sequence = sequence or asked()
        key: Hashable = None if alone else key_of(sequence)
        new = Reader(**reader)
        new.work = self.duplicates.find(key, sequence) or self.duplicates.begin(key, sequence)
        new.work.join(new)
        return new

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()


@pytest.fixture
def bench() -> Bench:
    return Bench()


STEP = st.just(("step", 0))
ASK = st.tuples(st.just("ask"), st.integers(0, 2))
LEAVE = st.tuples(st.sampled_from(["leave", "leave in order"]), st.integers(0, 30))


@given(st.lists(STEP | ASK | LEAVE, max_size=80))
def test_whoever_comes_and_goes_everybody_gets_what_it_would_get_alone(
    schedule: list[tuple[str, int]],
) -> None:
    bench = Bench()
    readers: list[Reader] = []
    staying: list[Reader] = []
    prompts: dict[Reader, int] = {}
    for what, number in schedule:
        if what == "step":
            bench.steps(1)
        elif what == "ask":
            readers.append(bench.ask(asked(number)))
            staying.append(readers[-1])
            prompts[readers[-1]] = number
        elif staying:
            reader = staying.pop(number % len(staying))
            reader.leave() if what == "leave" else reader.leave_in_order()
        prompts_running = [
            sequence.prompt[0] for sequence in bench.engine.running.keys() - bench.engine.cancelled
        ]
        assert len(prompts_running) == len(set(prompts_running)), "no work is done twice"
    bench.steps(LENGTH + 1)
    for reader in readers:
        assert reader.tokens == alone(prompts[reader])[: len(reader.tokens)]
    for reader in staying:
        assert (reader.tokens, reader.finish) == (alone(prompts[reader]), "length")
    followed = {reader.work.sequence for reader in staying if reader.work is not None}
    assert not followed & bench.engine.cancelled
    assert not bench.engine.running


def test_who_comes_late_is_given_the_past_at_once_and_then_what_comes(bench: Bench) -> None:
    bench.ask()
    bench.steps(5)
    late = bench.ask()
    assert (late.tokens, late.replayed) == (alone(0)[:5], 5)
    bench.steps(1)
    assert late.tokens == alone(0)[:6]


def test_who_comes_late_is_given_the_past_log_probabilities_too(bench: Bench) -> None:
    bench.ask(structs.replace(asked(), log_probs=0))
    bench.steps(5)
    late = bench.ask(structs.replace(asked(), log_probs=0))
    bench.steps(LENGTH)
    assert late.replayed == 5
    assert [one.of_token for one in late.log_probs] == alone(0)


def test_who_comes_before_the_first_token_is_given_nothing_yet(bench: Bench) -> None:
    bench.ask()
    assert bench.ask().replayed == 0


def test_the_work_goes_on_until_nobody_follows_it(bench: Bench) -> None:
    first, second = bench.ask(), bench.ask()
    bench.steps(2)
    assert not first.leave()
    bench.steps(2)
    assert (len(first.tokens), len(second.tokens)) == (2, 4)
    assert not bench.engine.cancelled
    assert second.leave()
    assert bench.engine.cancelled == {*bench.engine.submitted}
    bench.steps(1)
    assert second.finish is None


def test_leaving_twice_is_leaving_once(bench: Bench) -> None:
    first, second = bench.ask(), bench.ask()
    assert [first.leave(), first.leave()] == [False, False]
    assert not bench.engine.cancelled
    assert [second.leave(), second.leave()] == [True, True]


def test_the_last_who_leaves_in_order_is_told_when_it_has_ended(bench: Bench) -> None:
    first, last = bench.ask(), bench.ask()
    assert not first.leave_in_order()
    assert last.leave_in_order()
    bench.steps(1)
    assert (first.finish, last.finish) == (None, "cancelled")


def test_nobody_joins_what_is_about_to_end_or_has_ended(bench: Bench) -> None:
    bench.ask().leave_in_order()
    second = bench.ask()
    bench.steps(LENGTH)
    assert second.finish == "length"
    third = bench.ask()
    assert third.replayed == 0
    assert len(bench.engine.submitted) == 3


def test_who_leaves_at_a_token_takes_it_from_nobody(bench: Bench) -> None:
    readers = [bench.ask(leave_after=stop) for stop in (3, None, 3, 5, None)]
    bench.steps(LENGTH)
    assert [len(reader.tokens) for reader in readers] == [3, LENGTH, 3, 5, LENGTH]


@pytest.mark.parametrize("finish", ["failed", "cancelled"])
def test_an_end_that_nobody_asked_for_is_told_to_everybody(bench: Bench, finish: FinishReason) -> None:
    readers = [bench.ask(), bench.ask()]
    bench.engine.end(bench.engine.submitted[0], finish)
    assert [reader.finish for reader in readers] == [finish] * 2


def test_who_is_more_urgent_does_not_wait_behind_who_is_less(bench: Bench) -> None:
    low, critical = asked(priority=Priority.LOW), asked(priority=Priority.CRITICAL)
    bench.ask(low)
    bench.ask(critical)
    assert bench.engine.submitted == [low, critical]
    # From now on there is something better to follow.
    bench.ask(asked(priority=Priority.LOW))
    bench.ask(asked(priority=Priority.CRITICAL))
    assert bench.engine.submitted == [low, critical]
    assert bench.engine.running.keys() == {low, critical}


def test_the_end_of_the_one_that_is_followed_no_more_does_not_hide_the_other(bench: Bench) -> None:
    first = bench.ask(asked(priority=Priority.LOW))
    bench.ask(asked(priority=Priority.HIGH))
    first.leave()
    bench.steps(1)
    bench.ask()
    assert len(bench.engine.submitted) == 2


def test_urgency_has_no_say_once_there_are_tokens(bench: Bench) -> None:
    bench.ask(asked(priority=Priority.LOW))
    bench.steps(1)
    assert bench.ask(asked(priority=Priority.CRITICAL)).replayed == 1


def test_who_wants_no_company_follows_nobody_and_is_followed_by_nobody(bench: Bench) -> None:
    bench.ask(alone=True)
    bench.ask()
    bench.ask(alone=True)
    assert len(bench.engine.submitted) == 3


def test_nobody_is_made_to_catch_up_on_more_than_the_event_loop_can_bear(bench: Bench) -> None:
    bench.ask(asked(max_tokens=2 * MAX_REPLAY_TOKENS))
    bench.steps(MAX_REPLAY_TOKENS)
    assert bench.ask(asked(max_tokens=2 * MAX_REPLAY_TOKENS)).replayed == MAX_REPLAY_TOKENS
    bench.steps(1)
    assert bench.ask(asked(max_tokens=2 * MAX_REPLAY_TOKENS)).replayed == 0


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"prompt": [0, 0]},
        {"max_tokens": LENGTH + 1},
        {"stop_token_ids": frozenset({7})},
        {"adapter": "other"},
        *(
            {"sampling": structs.replace(Sampling(), **change)}
            for change in (
                {"temperature": 0.5},
                {"top_p": 0.5},
                {"top_k": 3},
                {"min_p": 0.5},
                {"repetition_penalty": 1.5},
                {"presence_penalty": 0.5},
                {"frequency_penalty": 0.5},
                {"logit_bias": {3: 1.0}},
                {"seed": 1},
            )
        ),
    ],
    ids=str,
)
def test_whatever_changes_the_tokens_makes_it_other_work(change: dict[str, Any]) -> None:
    assert key_of(asked()) == key_of(asked())
    assert key_of(structs.replace(asked(), **change)) != key_of(asked())


def test_the_order_in_which_biases_are_named_makes_no_difference() -> None:
    keys = [
        key_of(structs.replace(asked(), sampling=Sampling(logit_bias=bias)))
        for bias in ({1: 0.5, 2: 0.25}, {2: 0.25, 1: 0.5}, {1: 0.25, 2: 0.5})
    ]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("change", [{"priority": Priority.LOW}, {"owner": 9}, {"submitted_at": 1.0}], ids=str)
def test_who_asks_and_when_makes_no_difference(change: dict[str, Any]) -> None:
    assert key_of(structs.replace(asked(), **change)) == key_of(asked())
