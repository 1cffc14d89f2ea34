"""From requests to sequences, over an engine that does nothing by itself."""

import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from msgspec import UNSET

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import InvalidParams, Overloaded, SidecarError
from mlx_sidecar.runtime.api.generate import GenerateApi
from mlx_sidecar.runtime.engine.sequence import Emission, Sequence
from mlx_sidecar.runtime.models.entry import Entry
from mlx_sidecar.runtime.models.loaded import LoadedModel, Use
from mlx_sidecar.runtime.pool import Pool
from mlx_sidecar.runtime.scheduling.priority import Priority
from mlx_sidecar.runtime.server.connection import Call
from mlx_sidecar.runtime.server.intake import Incoming
from mlx_sidecar.runtime.telemetry.counters import Counters
from mlx_sidecar.runtime.text.tokenizer import ModelTokenizer

pytestmark = pytest.mark.anyio

FOR_EVER = 10**6
SOON = 1


class Engine:
    """Takes sequences; what happens to them a test says."""

    def __init__(self) -> None:
        self.submitted: list[Sequence] = []
        self.cancelled: list[Sequence] = []
        self.seconds_a_token = 0.0
        self.full: list[int | None] = []
        """What is answered, one after the other, to who asks whether the line is full."""

    def submit(self, sequence: Sequence) -> None:
        self.submitted.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        self.cancelled.append(sequence)

    def first_token_seconds(self, _: str, prompt_tokens: int) -> float:
        return self.seconds_a_token * prompt_tokens

    def retry_after_ms(self, _: str) -> int | None:
        return self.full.pop(0) if self.full else None

    def end(self, sequence: Sequence, finish: Any = "length") -> None:
        sequence.on_emission(Emission(sequence, None, finish))


class Registry:
    """Has one model, once its load is done."""

    def __init__(self, folder: Path) -> None:
        self.loaded = anyio.Event()
        phases = m.LoadPhases(runtime_ms=0, weights_ms=0, warmup_ms=0)
        facts = m.LoadResult(
            model="m", state="ready", dtype="float32", parameters=1, context_length=256, vocabulary=271,
            bytes=1, load_ms=0, phases=phases,
        )  # fmt: skip
        self.model = LoadedModel("m", "m", ModelTokenizer(folder), facts)

    def find(self, name: str) -> Entry:
        return Entry(name, m.LoadParams(model=name))

    @asynccontextmanager
    async def using(
        self, _: str | Entry, adapter: str | None
    ) -> AsyncGenerator[tuple[LoadedModel, list[Use]]]:
        await self.loaded.wait()
        with self.model.in_use(adapter) as uses:
            yield self.model, uses


class Housekeeping:
    """Refuses requests when a test says so."""

    def __init__(self) -> None:
        self.refuses: SidecarError | None = None

    def check(self) -> None:
        if self.refuses is not None:
            raise self.refuses


class Bench:
    """Requests and what became of them, in the order in which they ended."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine()
        self.registry = Registry(folder)
        self.counters = Counters()
        self.pool = Pool(1)
        self.housekeeping = Housekeeping()
        self.api = GenerateApi(
            cast(Any, self.registry),
            cast(Any, self.engine),
            self.pool,
            self.counters,
            cast(Any, self.housekeeping),
        )
        self.outcomes: list[m.GenerateResult | SidecarError] = []
        self.tasks = anyio.create_task_group()

    def ask(self, connection: object = None, **params: Any) -> Call:
        """Begin a request."""
        given: dict[str, Any] = {"model": "m", "tokens": [1, 2, 3]} | params
        call = Call(cast(Any, connection), Incoming(1, "generate", None))
        self.tasks.start_soon(self._run, m.GenerateParams(**given), call)
        return call

    async def outcome(self) -> m.GenerateResult | SidecarError:
        """Return the next end of a request."""
        await self.until(lambda: bool(self.outcomes))
        return self.outcomes.pop(0)

    async def result(self) -> m.GenerateResult:
        """Return the next end of a request, which must be one in order."""
        outcome = await self.outcome()
        assert isinstance(outcome, m.GenerateResult)
        return outcome

    async def submitted(self, count: int = 1) -> list[Sequence]:
        """Return the sequences there are, once there are so many."""
        await self.until(lambda: len(self.engine.submitted) >= count)
        return self.engine.submitted

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the event loop run until a condition holds."""
        while not condition():
            await anyio.sleep(0)

    async def _run(self, params: m.GenerateParams, call: Call) -> None:
        try:
            self.outcomes.append(await self.api.generate(params, call))
        except SidecarError as error:
            self.outcomes.append(error)


@asynccontextmanager
async def bench(folder: Path, *, loaded: bool = True) -> AsyncGenerator[Bench]:
    bench = Bench(folder)
    if loaded:
        bench.registry.loaded.set()
    with anyio.fail_after(30):
        async with bench.tasks:
            yield bench
            bench.tasks.cancel_scope.cancel()


def refused(outcome: m.GenerateResult | SidecarError) -> dict[str, object]:
    assert isinstance(outcome, SidecarError)
    return {"kind": outcome.kind, **outcome.data}


def too_late(deadline_ms: int, *, never_started: bool) -> dict[str, object]:
    return {"kind": "deadline_exceeded", "deadlineMs": deadline_ms, "neverStarted": never_started}


# The line


async def test_a_full_line_refuses_before_a_prompt_is_looked_at(tiny_model: Path) -> None:
    async with bench(tiny_model) as b:
        b.engine.full = [250]
        b.ask(tokens=[])
        assert refused(await b.outcome()) == {"kind": "overloaded", "retryAfterMs": 250}
        b.ask(tokens=[])
        assert isinstance(await b.outcome(), InvalidParams)
        stats = b.counters.requests()
        assert (stats.started, stats.failed, stats.overloaded) == (2, 2, 1)


async def test_a_line_that_filled_meanwhile_refuses_too(tiny_model: Path) -> None:
    async with bench(tiny_model) as b:
        b.engine.full = [None, 40]
        b.ask()
        assert isinstance(await b.outcome(), Overloaded)
        assert b.engine.submitted == []


async def test_who_can_follow_another_needs_no_place_in_the_line_and_no_forecast(tiny_model: Path) -> None:
    async with bench(tiny_model) as b:
        b.ask()
        (sequence,) = await b.submitted()
        b.engine.full = [None, 40]
        b.engine.seconds_a_token = FOR_EVER
        b.ask(deadline_ms=FOR_EVER)
        await b.until(lambda: b.counters.shared == 1)
        b.engine.end(sequence)
        assert [(await b.result()).shared, (await b.result()).shared] == [False, True]
        assert b.counters.requests().shared == 1


# Deadlines


async def test_what_cannot_begin_in_time_is_refused_at_once(tiny_model: Path) -> None:
    async with bench(tiny_model) as b:
        b.engine.seconds_a_token = FOR_EVER / 1000 / 3 + 1
        b.ask(deadline_ms=FOR_EVER)
        assert refused(await b.outcome()) == too_late(FOR_EVER, never_started=True)
        assert b.engine.submitted == []
        stats = b.counters.requests()
        assert (stats.failed, stats.deadline_exceeded, stats.overloaded) == (1, 1, 0)


async def test_what_can_begin_in_time_is_not_refused(tiny_model: Path) -> None:
    async with bench(tiny_model) as b:
        b.engine.seconds_a_token = FOR_EVER / 1000 / 3 / 2
        b.ask(deadline_ms=FOR_EVER)
        await b.submitted()


async def test_a_deadline_ends_a_request_that_waits_for_a_load(tiny_model: Path) -> None:
    async with bench(tiny_model, loaded=False) as b:
        b.ask(deadline_ms=SOON)
        assert refused(await b.outcome()) == too_late(SOON, never_started=True)


async def test_a_deadline_ends_a_request_that_waits_to_be_tokenized(tiny_model: Path) -> None:
    async with bench(tiny_model) as b:
        free = threading.Event()
        b.tasks.start_soon(b.pool.run, free.wait)
        try:
            b.ask(tokens=UNSET, prompt="hello", deadline_ms=SOON)
            assert refused(await b.outcome()) == too_late(SOON, never_started=True)
            assert b.engine.submitted == []
        finally:
            free.set()


async def test_a_deadline_ends_a_request_in_the_line_and_its_sequence(tiny_model: Path) -> None:
    async with bench(tiny_model) as b:
        b.ask(deadline_ms=100)
        await b.submitted()
        assert refused(await b.outcome()) == too_late(100, never_started=True)
        assert b.engine.cancelled == b.engine.submitted
        assert not b.registry.model.use.sequences
        assert b.registry.model.use.users == 0


async def test_a_deadline_that_passes_while_it_runs_says_that_it_had_begun(tiny_model: Path) -> None:
    async with bench(tiny_model) as b:
        b.ask()
        (sequence,) = await b.submitted()
        sequence.started_at = 1.0
        b.ask(deadline_ms=100)
        assert refused(await b.outcome()) == too_late(100, never_started=False)
        assert b.engine.cancelled == [], "the other goes on"
        assert b.registry.model.use.sequences == {sequence}
        b.engine.end(sequence)
        assert (await b.result()).finish_reason == "length"


async def test_whoever_was_cancelled_in_time_is_never_too_late(tiny_model: Path) -> None:
    async with bench(tiny_model) as b:
        call = b.ask(deadline_ms=1000)
        (sequence,) = await b.submitted()
        call.on_cancel()
        b.ask(tokens=[9], deadline_ms=1001)
        # When this one's time is up, that of the first is too.
        assert refused(await b.outcome()) == too_late(1001, never_started=True)
        assert b.outcomes == []
        b.engine.end(sequence, "cancelled")
        assert (await b.result()).finish_reason == "cancelled"


# Who shares


@pytest.mark.parametrize(
    ("first", "second", "sequences"),
    [
        ({}, {}, 1),
        ({"seed": 1}, {"seed": 2}, 1),
        ({"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 1}, 1),
        ({"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 2}, 2),
        ({"temperature": 1.0}, {"temperature": 1.0}, 2),
        ({"stop": ["a"]}, {"stop": "b"}, 1),
        ({"stop_token_ids": [5]}, {}, 2),
        ({"max_tokens": 5}, {"max_tokens": 6}, 2),
        ({"max_tokens": 10**6}, {"max_tokens": 10**7}, 1),
        ({"deduplicate": False}, {}, 2),
        ({}, {"deduplicate": False}, 2),
        ({"priority": "high"}, {"priority": "low"}, 1),
        ({"priority": "low"}, {"priority": "high"}, 2),
        ({"tokens": UNSET, "prompt": "hello"}, {"tokens": UNSET, "prompt": "hello"}, 1),
    ],
    ids=str,
)
async def test_requests_share_if_they_must_get_the_same_tokens_and_may(
    tiny_model: Path, first: dict[str, Any], second: dict[str, Any], sequences: int
) -> None:
    async with bench(tiny_model) as b:
        for params in (first, second):
            b.ask(**params)
            await b.submitted()
        await b.until(lambda: len(b.engine.submitted) + b.counters.shared == 2)
        assert len(b.engine.submitted) == sequences


# What the engine is told


@pytest.mark.parametrize("priority", Priority)
async def test_the_engine_is_told_how_urgent_it_is_and_for_whom(tiny_model: Path, priority: Priority) -> None:
    mine, yours = object(), object()
    async with bench(tiny_model) as b:
        for connection, token in ((mine, 1), (mine, 2), (yours, 3)):
            b.ask(connection, tokens=[token], priority=priority.name.lower())
        sequences = await b.submitted(3)
        owners = [sequence.owner for sequence in sequences]
        assert owners[0] == owners[1] != owners[2]
        assert {sequence.priority for sequence in sequences} == {priority}
