"""A batch without a model, for whatever drives batches."""

import threading

from mlx_sidecar.runtime.engine.sequence import BatchReport, Emission, Sequence
from mlx_sidecar.runtime.scheduling.memory import Footprint


class ScriptedBatch:
    """Gives every sequence one token a step, up to its limit; fails where it is told to."""

    footprint = Footprint(weights=1000, kv_per_token=0, kv_fixed=10, prefill_peak=0)
    prefill_chunk_tokens = 16
    prefilled = 0

    def __init__(self, *failures: str) -> None:
        self.failures = set(failures)
        self.error: Exception | None = None
        self.rows: dict[Sequence, int] = {}
        self.wants_to_prepare = False
        self.preparing = threading.Semaphore(0)
        self.prepared = threading.Semaphore(0)

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

    def prepare(self) -> bool:
        if self.wants_to_prepare:
            self.preparing.release()
            assert self.prepared.acquire(timeout=10)
        return self.wants_to_prepare

    def reset(self) -> list[Sequence]:
        self._may_fail("reset")
        left = list(self.rows)
        self.rows.clear()
        return left

    def attach_adapter(self, name: str, weights: object) -> None:
        raise NotImplementedError

    def detach_adapter(self, name: str) -> None:
        raise NotImplementedError

    def report(self) -> BatchReport:
        return BatchReport(0, len(self.rows), 1)

    def _may_fail(self, what: str) -> None:
        if what in self.failures:
            raise self.error or RuntimeError(what)
