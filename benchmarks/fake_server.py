# pyright: reportPrivateUsage=false
"""The real sidecar with a network that computes nothing: what is left is what everything around it costs.

    .venv/bin/python benchmarks/fake_server.py serve [OPTIONS]

Every step gives each sequence one token. By default the next step begins when the event loop takes the last
one; with STEPS_AHEAD in the environment that many may wait for it; with TOKENS_PER_SECOND each stream gets
that many.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.runtime import cli
from mlx_sidecar.runtime.engine.sequence import BatchReport, Emission, Sequence
from mlx_sidecar.runtime.models import registry
from mlx_sidecar.runtime.scheduling.memory import Footprint

# Ordinary words of the demo model's vocabulary.
WORDS = range(1000, 1512)


class FakeBatch:
    """A batch whose steps cost nothing; see `runtime.engine.batch.Batch`."""

    footprint = Footprint(weights=0, kv_per_token=0, kv_fixed=0, prefill_peak=0)
    prefill_chunk_tokens = 2048
    prefilled = 0

    def __init__(self) -> None:
        pace = os.environ.get("TOKENS_PER_SECOND")
        self._step_seconds = 1 / float(pace) if pace else None
        self._next_step_at = 0.0
        self._rows: dict[Sequence, int] = {}
        self._ahead = threading.Semaphore(int(os.environ.get("STEPS_AHEAD", "1")))

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in."""
        sequence.started_at = sequence.first_token_at = time.monotonic()
        self._rows[sequence] = 0

    def remove(self, sequence: Sequence) -> bool:
        """Drop a sequence."""
        return self._rows.pop(sequence, None) is not None

    def step(self) -> list[Emission]:
        """Give every sequence its next token."""
        self._wait()
        emissions: list[Emission] = []
        for sequence, count in self._rows.items():
            ended = count + 1 == sequence.max_tokens
            emissions.append(Emission(sequence, WORDS[count % len(WORDS)], "length" if ended else None))
            self._rows[sequence] = count + 1
        for emission in emissions:
            if emission.finish:
                emission.sequence.finished_at = time.monotonic()
                del self._rows[emission.sequence]
        return emissions

    def prepare(self) -> bool:
        """There is nothing to get ready."""
        return False

    def reset(self) -> list[Sequence]:
        """Drop everything."""
        left = list(self._rows)
        self._rows.clear()
        return left

    def attach_adapter(self, name: str, weights: object) -> None:
        """Take none."""
        raise NotImplementedError

    def detach_adapter(self, name: str) -> None:
        """Have none."""
        raise NotImplementedError

    def report(self) -> BatchReport:
        """Return what is being done."""
        return BatchReport(0, len(self._rows), 1)

    def taken(self) -> None:
        """Say that the event loop has taken a step."""
        self._ahead.release()

    def _wait(self) -> None:
        if self._step_seconds is None:
            self._ahead.acquire()
            return
        now = time.monotonic()
        self._next_step_at = max(self._next_step_at + self._step_seconds, now)
        time.sleep(self._next_step_at - now)


class Steps(deque[list[Emission]]):
    """The steps that wait for the event loop, which tell when it takes one."""

    def __init__(self, taken: Callable[[], None]) -> None:
        super().__init__()
        self._taken = taken

    def popleft(self) -> list[Emission]:
        """Take the oldest step."""
        self._taken()
        return super().popleft()


def load_nothing(self: registry.ModelRegistry, name: str, *_: object) -> m.LoadResult:
    """Stand in for the loading of a network; the tokenizer is the model's own."""
    engine, batch = self._engine, FakeBatch()
    engine.attach(name, batch)
    app: Any = engine._deliver.__self__  # pyright: ignore[reportFunctionMemberAccess]
    app._delivered = Steps(batch.taken)
    return m.LoadResult(
        model=name,
        state="ready",
        dtype="none",
        parameters=0,
        context_length=2**31,
        vocabulary=49152,
        bytes=0,
        load_ms=0,
        phases=m.LoadPhases(runtime_ms=0, weights_ms=0, warmup_ms=0),
    )


if __name__ == "__main__":
    registry.ModelRegistry._load_network = load_nothing  # pyright: ignore[reportAttributeAccessIssue]
    cli.main()
