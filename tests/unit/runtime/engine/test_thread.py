"""The inference thread over batches that fail on command; the real batch is tested in the real process."""

import queue
from collections.abc import Generator

import pytest

from mlx_sidecar.native.blas import Blas
from mlx_sidecar.runtime.engine.sequence import Emission, Sampling, Sequence
from mlx_sidecar.runtime.engine.thread import InferenceThread
from mlx_sidecar.runtime.telemetry.vitals import Vitals


class ScriptedBatch:
    """Gives every sequence one token a step, up to its limit; fails where it is told to."""

    def __init__(self, *failures: str) -> None:
        self.failures = set(failures)
        self.rows: dict[Sequence, int] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, sequence: Sequence) -> None:
        self._may_fail("add")
        self.rows[sequence] = 0

    def remove(self, sequence: Sequence) -> bool:
        self._may_fail("remove")
        return self.rows.pop(sequence, None) is not None

    def step(self) -> list[Emission]:
        self._may_fail("step")
        emissions: list[Emission] = []
        for sequence in list(self.rows):
            self.rows[sequence] += 1
            ended = self.rows[sequence] == sequence.max_tokens
            emissions.append(Emission(sequence, self.rows[sequence], "length" if ended else None))
            if ended:
                del self.rows[sequence]
        return emissions

    def reset(self) -> list[Sequence]:
        self._may_fail("reset")
        left = list(self.rows)
        self.rows.clear()
        return left

    def _may_fail(self, what: str) -> None:
        if what in self.failures:
            raise RuntimeError(what)


class Bench:
    """A running thread, what it delivered, and whether it died."""

    def __init__(self) -> None:
        self.delivered: queue.Queue[Emission] = queue.Queue()
        self.deaths: queue.Queue[BaseException] = queue.Queue()
        self.vitals = Vitals()
        self.engine = InferenceThread(self._deliver, self.deaths.put, Blas(), self.vitals)
        self.engine.start()
        self.engine.started().result(60)

    def attach(self, model: str, batch: ScriptedBatch) -> ScriptedBatch:
        self.engine.run(lambda: self.engine.attach(model, batch)).result(10)
        return batch

    def submit(self, model: str, max_tokens: int) -> Sequence:
        sequence = Sequence(model, [1], max_tokens, Sampling(), frozenset(), lambda _: None)
        self.engine.submit(sequence)
        return sequence

    def end_of(self, sequence: Sequence) -> Emission:
        while True:
            emission = self.delivered.get(timeout=10)
            if emission.sequence is sequence and emission.finish is not None:
                return emission

    def _deliver(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            self.delivered.put(emission)


@pytest.fixture
def bench() -> Generator[Bench]:
    bench = Bench()
    yield bench
    assert bench.engine.stop(10)


def test_a_sequence_gets_its_tokens_in_order_and_one_end(bench: Bench) -> None:
    bench.attach("m", ScriptedBatch())
    sequence = bench.submit("m", 3)
    assert [bench.delivered.get(timeout=10) for _ in range(3)] == [
        Emission(sequence, 1, None),
        Emission(sequence, 2, None),
        Emission(sequence, 3, "length"),
    ]


def test_a_step_that_fails_ends_its_batch_only_and_the_model_works_again(bench: Bench) -> None:
    broken = bench.attach("broken", ScriptedBatch("step"))
    bench.attach("sound", ScriptedBatch())
    lost, kept = bench.submit("broken", 2), bench.submit("sound", 50)
    ends = {bench.end_of(lost).finish, bench.end_of(kept).finish}
    assert ends == {"failed", "length"}
    broken.failures.clear()
    assert bench.end_of(bench.submit("broken", 2)).finish == "length"


def test_a_sequence_that_cannot_be_added_ends_alone(bench: Bench) -> None:
    batch = bench.attach("m", ScriptedBatch("add"))
    assert bench.end_of(bench.submit("m", 2)).finish == "failed"
    batch.failures.clear()
    assert bench.end_of(bench.submit("m", 2)).finish == "length"


def test_a_cancel_that_fails_ends_every_sequence_and_the_thread_goes_on(bench: Bench) -> None:
    batch = bench.attach("m", ScriptedBatch("remove"))
    sequence = bench.submit("m", 10**9)
    bench.engine.cancel(sequence)
    assert bench.end_of(sequence).finish == "failed"
    batch.failures.clear()
    assert bench.end_of(bench.submit("m", 1)).finish == "length"


def test_a_cancelled_sequence_ends_once(bench: Bench) -> None:
    bench.attach("m", ScriptedBatch())
    sequence = bench.submit("m", 10**9)
    bench.engine.cancel(sequence)
    bench.engine.cancel(sequence)
    assert bench.end_of(sequence).finish == "cancelled"
    bench.engine.run(lambda: None).result(10)
    assert bench.delivered.empty()


def test_a_sequence_for_a_model_that_has_gone_is_cancelled(bench: Bench) -> None:
    bench.attach("m", ScriptedBatch())
    sequence = bench.submit("m", 10**9)
    bench.engine.run(lambda: bench.engine.detach("m")).result(10)
    assert bench.end_of(sequence).finish == "cancelled"
    assert bench.end_of(bench.submit("m", 1)).finish == "cancelled"


def test_work_runs_on_the_thread_and_its_errors_come_back(bench: Bench) -> None:
    assert bench.engine.run(lambda: 41 + 1).result(10) == 42
    with pytest.raises(ZeroDivisionError):
        bench.engine.run(lambda: 1 // 0).result(10)


def test_a_thread_that_cannot_go_on_says_so_and_fails_every_sequence() -> None:
    bench = Bench()
    bench.attach("sound", ScriptedBatch())
    bench.attach("broken", ScriptedBatch("step", "reset"))
    sequences = [bench.submit(model, 10**9) for model in ("sound", "broken")]
    ends: dict[Sequence, str] = {}
    while len(ends) < 2:
        emission = bench.delivered.get(timeout=10)
        if emission.finish is not None:
            ends[emission.sequence] = emission.finish
    assert ends == dict.fromkeys(sequences, "failed")
    assert str(bench.deaths.get(timeout=10)) == "reset"
    assert bench.vitals.state == "failed"
    assert bench.engine.stop(10)
    assert bench.deaths.empty()
