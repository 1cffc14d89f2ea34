"""The inference thread over batches that fail on command; the real batch is tested in the real process."""

import copy
import queue
from collections.abc import Generator
from pathlib import Path

import pytest
from support.scripted_batch import ScriptedBatch

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.native.blas import Blas
from mlx_sidecar.protocol.errors import EngineFailed, OutOfMemory
from mlx_sidecar.runtime.engine.device import DeviceLost
from mlx_sidecar.runtime.engine.sequence import Emission, Sampling, Sequence
from mlx_sidecar.runtime.engine.thread import InferenceThread
from mlx_sidecar.runtime.scheduling.memory import Footprint
from mlx_sidecar.runtime.telemetry.vitals import Vitals

SETTINGS = Settings(home=Path("/nowhere"), max_sequences=2, max_waiting=3, memory_budget_bytes=1 << 20)


class Bench:
    """A running thread, what it delivered, and whether it died."""

    def __init__(self) -> None:
        self.delivered: queue.Queue[Emission] = queue.Queue()
        self.deaths: queue.Queue[BaseException] = queue.Queue()
        self.ends: dict[Sequence, Emission] = {}
        self.vitals = Vitals()
        self.settings = copy.copy(SETTINGS)
        self.engine = InferenceThread(self._deliver, self.deaths.put, Blas(), self.vitals, self.settings)
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
        while sequence not in self.ends:
            emission = self.delivered.get(timeout=10)
            if emission.finish is not None:
                self.ends[emission.sequence] = emission
        return self.ends[sequence]

    def _deliver(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            self.delivered.put(emission)


@pytest.fixture
def bench() -> Generator[Bench]:
    bench = Bench()
    yield bench
    assert bench.engine.stop(10)


def test_an_idle_engine_gets_a_model_ready_a_little_at_a_time_until_somebody_asks(bench: Bench) -> None:
    batch = ScriptedBatch()
    batch.wants_to_prepare = True
    bench.attach("m", batch)
    for _ in range(3):
        assert batch.preparing.acquire(timeout=10)
        batch.prepared.release()
    assert batch.preparing.acquire(timeout=10)
    sequence = bench.submit("m", 3)
    batch.prepared.release()
    assert bench.end_of(sequence).finish == "length"
    assert batch.preparing.acquire(timeout=10)
    batch.wants_to_prepare = False
    batch.prepared.release()


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
    assert bench.delivered.get(timeout=10).token == 1
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


def test_more_sequences_than_rows_wait_their_turn_and_the_line_says_when_it_is_full(bench: Bench) -> None:
    bench.attach("m", ScriptedBatch())
    running = [bench.submit("m", 10**9) for _ in range(SETTINGS.max_sequences or 0)]
    waiting = [bench.submit("m", 1) for _ in range(SETTINGS.max_waiting)]
    bench.engine.run(lambda: None).result(10)
    bench.engine.run(lambda: None).result(10)
    report = bench.engine.report()
    assert (sum(report.waiting.counts), report.batches["m"].running) == (3, 2)
    assert (bench.engine.retry_after_ms("m") or 0) > 0
    bench.engine.cancel(waiting[2])
    assert bench.end_of(waiting[2]).finish == "cancelled"
    assert bench.engine.retry_after_ms("m") is None
    bench.engine.cancel(running[0])
    assert bench.end_of(waiting[0]).finish == "length"
    assert bench.end_of(waiting[1]).finish == "length"


def test_what_can_never_fit_is_refused_and_costs_nobody_anything(bench: Bench) -> None:
    bench.attach("m", ScriptedBatch())
    large = ScriptedBatch()
    large.footprint = Footprint(weights=1 << 19, kv_per_token=1 << 10, kv_fixed=0, prefill_peak=0)
    bench.attach("large", large)
    refused = bench.submit("large", 1000)
    assert bench.end_of(refused).finish == "failed"
    assert isinstance(refused.failure, OutOfMemory)
    needed, available = refused.failure.data["neededBytes"], refused.failure.data["availableBytes"]
    assert isinstance(needed, int)
    assert isinstance(available, int)
    assert needed > available
    assert bench.end_of(bench.submit("m", 2)).finish == "length"


def test_who_waits_for_memory_that_a_new_model_took_is_refused(bench: Bench) -> None:
    hungry = ScriptedBatch()
    hungry.footprint = Footprint(weights=0, kv_per_token=1 << 10, kv_fixed=0, prefill_peak=0)
    bench.attach("m", hungry)
    running, waiting = bench.submit("m", 500), bench.submit("m", 700)
    larger = ScriptedBatch()
    larger.footprint = Footprint(weights=1 << 19, kv_per_token=0, kv_fixed=0, prefill_peak=0)
    bench.attach("other", larger)
    assert bench.end_of(waiting).finish == "failed"
    assert isinstance(waiting.failure, OutOfMemory)
    assert bench.end_of(running).finish == "length"


def test_who_needs_the_memory_of_others_says_so_and_runs_once_they_have_left(bench: Bench) -> None:
    hunger: queue.Queue[tuple[str, int]] = queue.Queue()
    bench.engine.on_hungry = lambda model, needed: hunger.put((model, needed))
    hungry, larger = ScriptedBatch(), ScriptedBatch()
    hungry.footprint = Footprint(weights=0, kv_per_token=1 << 10, kv_fixed=0, prefill_peak=0)
    larger.footprint = Footprint(weights=1 << 19, kv_per_token=0, kv_fixed=0, prefill_peak=0)
    bench.attach("m", hungry)
    bench.attach("other", larger)
    waiting = bench.submit("m", 700)
    assert hunger.get(timeout=10) == ("m", 768 << 10)
    assert bench.engine.run(lambda: bench.engine.shortfall(768 << 10, "m")).result(10).ever == 256 << 10
    bench.engine.run(lambda: bench.engine.detach("other"))
    assert bench.end_of(waiting).finish == "length"
    assert hunger.empty()


def test_a_claim_lets_nobody_in_and_is_met_when_those_who_run_have_ended(bench: Bench) -> None:
    batch = ScriptedBatch()
    batch.footprint = Footprint(weights=0, kv_per_token=1 << 10, kv_fixed=0, prefill_peak=0)
    bench.attach("m", batch)
    bench.engine.on_hungry = lambda _, __: None
    running = bench.submit("m", 700)
    assert bench.delivered.get(timeout=10).sequence is running
    claim = bench.engine.claim("coming", 600 << 10)
    waiting = bench.submit("m", 500)
    claim.result(10)
    assert bench.end_of(running).finish == "length"
    assert bench.engine.report().memory.claimed_bytes == 600 << 10
    assert bench.engine.report().waiting.counts[2] == 1
    bench.engine.release_claim("coming")
    assert bench.end_of(waiting).finish == "length"


def test_a_claim_ends_when_its_model_is_attached(bench: Bench) -> None:
    bench.engine.claim("m", 1 << 19).result(10)
    bench.attach("m", ScriptedBatch())
    memory = bench.engine.report().memory
    assert (memory.claimed_bytes, memory.weights_bytes) == (0, ScriptedBatch.footprint.weights)


def test_other_limits_hold_from_the_next_step_on(bench: Bench) -> None:
    bench.attach("m", ScriptedBatch())
    settings = bench.settings
    settings.memory_budget_bytes, settings.max_waiting = 1 << 21, 1
    bench.engine.run(bench.engine.reconfigure).result(10)
    assert bench.engine.report().memory.budget_bytes == 1 << 21
    running = [bench.submit("m", 10**9) for _ in range(SETTINGS.max_sequences or 0)]
    bench.submit("m", 1)
    bench.engine.run(lambda: None).result(10)
    bench.engine.run(lambda: None).result(10)
    assert bench.engine.retry_after_ms("m") is not None
    for sequence in running:
        bench.engine.cancel(sequence)


def test_who_waits_hears_of_a_budget_that_has_shrunk_and_so_does_a_claim(bench: Bench) -> None:
    batch = ScriptedBatch()
    batch.footprint = Footprint(weights=1000, kv_per_token=1 << 10, kv_fixed=0, prefill_peak=0)
    bench.attach("m", batch)
    running, waiting = bench.submit("m", 700), bench.submit("m", 700)
    bench.settings.memory_budget_bytes = 2000
    bench.engine.run(bench.engine.reconfigure).result(10)
    assert bench.end_of(waiting).finish == "failed"
    assert isinstance(waiting.failure, OutOfMemory)
    assert bench.end_of(running).finish in ("length", "failed")
    assert bench.engine.claim("coming", 1 << 19).result(10) is False


def test_a_sequence_that_is_ended_with_an_error_has_it(bench: Bench) -> None:
    bench.attach("m", ScriptedBatch())
    sequence = bench.submit("m", 10**9)
    bench.engine.cancel(sequence, OutOfMemory(1, 0))
    assert bench.end_of(sequence).finish == "failed"
    assert isinstance(sequence.failure, OutOfMemory)


def test_a_lost_device_fails_every_sequence_with_an_error_worth_another_try() -> None:
    bench = Bench()
    bench.attach("sound", ScriptedBatch())
    lost = ScriptedBatch()
    lost.error = DeviceLost()
    lost.failures.add("step")
    bench.attach("lost", lost)
    sequences = [bench.submit(model, 10**9) for model in ("sound", "lost")]
    assert {bench.end_of(sequence).finish for sequence in sequences} == {"failed"}
    assert all(isinstance(sequence.failure, EngineFailed) for sequence in sequences)
    assert isinstance(bench.deaths.get(timeout=10), DeviceLost)
    assert bench.engine.stop(10)
