"""Who is in memory: a real engine thread, models without weights that take memory and give a token a step."""

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from msgspec import UNSET
from support.scripted_batch import ScriptedBatch

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.native.blas import Blas
from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import InvalidModel, ModelNotLoaded, OutOfMemory, Unloaded
from mlx_sidecar.runtime.engine.sequence import Emission, Sampling, Sequence
from mlx_sidecar.runtime.engine.thread import InferenceThread
from mlx_sidecar.runtime.models.entry import Entry
from mlx_sidecar.runtime.models.housekeeping import Housekeeping
from mlx_sidecar.runtime.models.loaded import LoadedModel
from mlx_sidecar.runtime.models.registry import ModelRegistry
from mlx_sidecar.runtime.scheduling.memory import Footprint
from mlx_sidecar.runtime.telemetry.vitals import Vitals

pytestmark = pytest.mark.anyio

# Far above what MLX really holds in this process, of other tests: that counts as well.
KV_BYTES = 1_000_000
SIZE, BUDGET = 1000 * KV_BYTES, 3500 * KV_BYTES
"""Of a model called "a", "b" and so on, and of all memory: there is room for three and a little."""
HOUR, DAY = 3600.0, 86400.0


class Loading:
    """Gives models of a size; those called "broken…" fail, and all wait while a test holds them up."""

    def __init__(self, engine: InferenceThread) -> None:
        self.order: list[str] = []
        self.go_on = anyio.Event()
        self.go_on.set()
        self._engine = engine

    async def load(self, entry: Entry, key: str, _: object, make_room: Callable[[int], Any]) -> LoadedModel:
        size = SIZE * (4 if entry.name == "huge" else 1)
        await make_room(size)
        try:
            await self.go_on.wait()
            if entry.name.startswith("broken"):
                raise InvalidModel(entry.name, "it is broken")
        except BaseException:
            self._engine.release_claim(key)
            raise
        batch = ScriptedBatch()
        kv_per_token = 0 if entry.name == "endless" else KV_BYTES
        batch.footprint = Footprint(size, kv_per_token, kv_fixed=0, prefill_peak=0)
        await asyncio.wrap_future(self._engine.run(lambda: self._engine.attach(key, cast(Any, batch))))
        self.order.append(entry.name)
        phases = m.LoadPhases(runtime_ms=0, weights_ms=0, warmup_ms=0)
        facts = m.LoadResult(
            model=entry.name, state="ready", dtype="float32", parameters=1, context_length=1, vocabulary=1,
            bytes=size, load_ms=0, phases=phases,
        )  # fmt: skip
        return LoadedModel(entry.name, key, cast(Any, None), facts)


class House:
    """A registry over a running engine."""

    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()

        def post(callback: Callable[..., object], *args: object) -> None:
            loop.call_soon_threadsafe(callback, *args, context=context)

        self.settings = Settings(home=Path("/nowhere"), memory_budget_bytes=BUDGET)
        self.engine = InferenceThread(
            lambda emissions: post(self._hand_over, emissions),
            lambda _: None,
            Blas(),
            Vitals(),
            self.settings,
        )
        self.loading = Loading(self.engine)
        self.tasks = tasks
        me = cast(Any, self.loading)
        self.registry = ModelRegistry(self.engine, me, self.settings, tasks.start_soon, post)
        self.residency = self.registry.residency
        machine = cast(Any, SimpleNamespace(available_memory=lambda: None))
        self.housekeeping = Housekeeping(self.registry, self.engine, machine, self.settings)

    async def load(self, *names: str, **params: Any) -> None:
        for name in names:
            await self.registry.load(m.LoadParams(model=name, **params))

    async def unload(self, name: str, *, force: bool = False) -> None:
        await self.registry.unload(m.UnloadParams(model=name, force=force))

    async def ask(self, name: str, max_tokens: int = 1) -> None:
        """Use a model for one sequence, to its end; the memory of it grows with `max_tokens`."""
        async with self.registry.using(name) as (model, uses):
            ended = anyio.Event()
            sequence = Sequence(
                model.key, [1], max_tokens, Sampling(), frozenset(),
                lambda emission: ended.set() if emission.finish else None,
            )  # fmt: skip
            for use in uses:
                use.sequences.add(sequence)
            self.engine.submit(sequence)
            await ended.wait()
            if sequence.failure is not None:
                raise sequence.failure

    @asynccontextmanager
    async def in_use(self, *names: str) -> AsyncGenerator[Callable[[], None]]:
        """Keep models in use while the block runs, or until what is yielded is called."""
        done, begun = anyio.Event(), [anyio.Event() for _ in names]

        async def use(name: str, event: anyio.Event) -> None:
            async with self.registry.using(name):
                event.set()
                await done.wait()

        for name, event in zip(names, begun, strict=True):
            self.tasks.start_soon(use, name, event)
        for event in begun:
            await event.wait()
        try:
            yield done.set
        finally:
            done.set()

    def expect(self, **seconds: float) -> None:
        """Let models have been used every hour, so that they are expected so many seconds from now."""
        self.settings.predictive_preload = True
        predictor, now = self.residency.predictor, time.monotonic()
        hours = [hour * HOUR for hour in range(1, 5)]
        for at, name in sorted((now + ahead - ago, name) for name, ahead in seconds.items() for ago in hours):
            predictor.note_request(name, at)
        for name, ahead in seconds.items():
            assert predictor.next_use(name, now) == pytest.approx(now + ahead, abs=0.1)

    async def evict(self, name: str) -> None:
        assert await self.residency.evict(self.registry.find(name))

    async def look_ahead(self) -> None:
        """Do what is done every second, and wait until whoever was to come is there or was called off."""
        await self.housekeeping.look()
        await self.until(lambda: not {"queued", "loading"} & set(self.states().values()))

    def states(self) -> dict[str, str]:
        return {info.model: info.state for info in self.registry.infos()}

    def resident(self) -> str:
        """Return the names of those in memory."""
        return "".join(name for name, state in self.states().items() if state in ("ready", "draining"))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that happens by itself."""
        with anyio.fail_after(10):
            while not condition():
                await anyio.sleep(0.001)

    def _hand_over(self, emissions: Iterable[Emission]) -> None:
        for emission in emissions:
            emission.sequence.on_emission(emission)


@pytest.fixture
async def house() -> AsyncGenerator[House]:
    async with anyio.create_task_group() as tasks:
        house = House(tasks)
        house.engine.start()
        await asyncio.wrap_future(house.engine.started())
        yield house
        tasks.cancel_scope.cancel()
        assert house.engine.stop(10)


async def test_models_leave_memory_in_the_order_of_their_last_use(house: House) -> None:
    await house.load("a", "b", "c")
    await house.ask("a")
    await house.load("d")
    assert house.states() == {"a": "ready", "b": "evicted", "c": "ready", "d": "ready"}
    await house.load("e")
    assert house.resident() == "ade"
    assert house.registry.residency.evicted == 2


async def test_an_evicted_model_comes_back_when_it_is_asked_for(house: House) -> None:
    await house.load("a", "b", "c", "d")
    await house.ask("a")
    assert house.resident() == "acd"
    assert house.registry.residency.brought_back == 1
    (line,) = [info for info in house.registry.infos() if info.model == "a"]
    assert (line.uses, line.loads) == (1, 2)


async def test_what_is_pinned_stays_and_what_is_too_large_is_refused_with_numbers(house: House) -> None:
    await house.load("a", "b", "c", pin=True)
    with pytest.raises(OutOfMemory) as refused:
        await house.load("d")
    assert refused.value.data == {"neededBytes": SIZE, "availableBytes": 500 * KV_BYTES, "model": "d"}
    assert house.states() == {"a": "ready", "b": "ready", "c": "ready", "d": "failed"}
    await house.load("b", pin=False)
    await house.load("d")
    assert house.resident() == "acd"
    with pytest.raises(OutOfMemory):
        await house.load("huge")
    assert house.resident() == "acd"


async def test_nobody_leaves_where_that_is_not_allowed(house: House) -> None:
    house.settings.evict_models = False
    await house.load("a", "b", "c")
    with pytest.raises(OutOfMemory):
        await house.load("d")
    assert house.resident() == "abc"


async def test_a_model_in_use_is_drained_and_nobody_who_wants_it_is_dropped(house: House) -> None:
    await house.load("a", "b", "c")
    async with house.in_use("a", "b", "c") as done, anyio.create_task_group() as asking:
        asking.start_soon(house.load, "d")
        await house.until(lambda: "draining" in house.states().values())
        for name in "abcd":
            asking.start_soon(house.ask, name)
        assert house.states()["d"] == "loading"
        done()
    assert house.loading.order[:4] == ["a", "b", "c", "d"]
    assert house.registry.residency.brought_back >= 1


async def test_a_load_that_is_cancelled_lets_those_stay_that_it_would_have_drained(house: House) -> None:
    await house.load("a", "b", "c")
    async with house.in_use("a", "b", "c"), anyio.create_task_group() as asking:
        asking.start_soon(house.load, "d")
        await house.until(lambda: "draining" in house.states().values())
        asking.cancel_scope.cancel()
    await house.until(lambda: "d" not in house.states())
    assert set(house.states().values()) == {"ready"}
    await house.ask("a")


async def test_a_request_too_large_beside_the_others_makes_them_leave(house: House) -> None:
    await house.load("a", "b", "c")
    # 2048 tokens take twice a model's bytes: there is room for one model beside, its own.
    await house.ask("a", 2047)
    assert house.resident() == "a"
    await house.load("b", "c")
    async with house.in_use("b") as done, anyio.create_task_group() as asking:
        asking.start_soon(house.ask, "a", 2047)
        await house.until(lambda: house.states()["b"] == "draining")
        done()
    assert house.resident() == "a"
    with pytest.raises(OutOfMemory):
        await house.ask("a", 4096)


async def test_a_request_too_large_beside_what_is_pinned_is_refused(house: House) -> None:
    await house.load("a")
    await house.load("b", "c", pin=True)
    with pytest.raises(OutOfMemory):
        await house.ask("a", 2047)
    await house.ask("a", 10)


async def test_a_drained_model_still_ends_a_request_that_needs_the_memory_of_others(house: House) -> None:
    await house.load("a", "b", "c")
    async with house.in_use("b", "c") as done, anyio.create_task_group() as asking:
        asking.start_soon(house.ask, "a", 2047)
        await house.until(lambda: "draining" in house.states().values())
        asking.start_soon(house.load, "d")
        asking.start_soon(house.ask, "b")
        done()
    assert house.states()["d"] in ("ready", "evicted")


async def test_requests_for_a_model_that_loads_wait_and_share_one_load(house: House) -> None:
    house.loading.go_on = anyio.Event()
    async with anyio.create_task_group() as asking:
        for _ in range(3):
            asking.start_soon(house.load, "a")
        await house.until(lambda: house.states().get("a") == "loading")
        for _ in range(3):
            asking.start_soon(house.ask, "a")
        await anyio.wait_all_tasks_blocked()
        house.loading.go_on.set()
    assert house.loading.order == ["a"]
    assert house.registry.infos()[0].uses == 3


async def test_a_failed_load_leaves_its_reason_and_can_be_tried_again(house: House) -> None:
    for _ in range(2):
        with pytest.raises(InvalidModel):
            await house.load("broken", alias="chat")
        (line,) = house.registry.infos()
        assert (line.state, line.aliases) == ("failed", [])
        assert isinstance(line.failure, m.ModelFailure)
        assert line.failure.kind == "invalid_model"
        with pytest.raises(ModelNotLoaded):
            await house.ask("broken")
        with pytest.raises(ModelNotLoaded):
            await house.ask("chat")
    await house.until(lambda: house.engine.report().memory.claimed_bytes == 0)


async def test_of_many_failures_the_oldest_are_forgotten(house: House) -> None:
    for number in range(80):
        with pytest.raises(InvalidModel):
            await house.load(f"broken{number}")
    lines = house.registry.infos()
    assert len(lines) == 64
    assert lines[-1].model == "broken79"


async def test_an_unload_serves_who_came_before_and_a_load_behind_it_begins_anew(house: House) -> None:
    await house.load("a", alias="chat")
    async with house.in_use("a") as done, anyio.create_task_group() as asking:
        asking.start_soon(house.unload, "a")
        await house.until(lambda: house.states()["a"] == "draining")
        with pytest.raises(ModelNotLoaded):
            await house.ask("a")
        await house.load("a")
        await house.ask("a")
        assert [info.state for info in house.registry.infos()] == ["draining", "ready"]
        done()
    assert house.states() == {"a": "ready"}
    with pytest.raises(ModelNotLoaded):
        await house.ask("chat")


async def test_a_load_waits_for_room_that_an_unload_will_leave(house: House) -> None:
    await house.load("a", "b", pin=True)
    await house.load("c", pin=True)
    async with house.in_use("a") as done, anyio.create_task_group() as asking:
        asking.start_soon(house.unload, "a")
        await house.until(lambda: house.states()["a"] == "draining")
        asking.start_soon(house.load, "d")
        await house.until(lambda: house.states().get("d") == "loading")
        done()
    assert house.resident() == "bcd"


async def test_force_ends_who_runs_and_who_waits_also_when_an_unload_waits_already(house: House) -> None:
    await house.load("endless")
    outcomes: list[str] = []

    async def expect_unloaded(work: Awaitable[None]) -> None:
        with pytest.raises(Unloaded):
            await work
        outcomes.append("unloaded")

    async with anyio.create_task_group() as asking:
        asking.start_soon(expect_unloaded, house.ask("endless", 10**9))
        await house.until(lambda: bool(house.registry.infos()[0].in_use))
        asking.start_soon(house.unload, "endless")
        await house.until(lambda: house.states()["endless"] == "draining")
        await house.unload("endless", force=True)
    assert outcomes == ["unloaded"]
    assert house.states() == {}


async def test_unused_models_leave_after_their_time_to_live(house: House) -> None:
    await house.load("a", ttl_ms=0)
    await house.load("b", ttl_ms=None)
    await house.load("c")
    house.settings.model_ttl_ms = 10**9
    async with house.in_use("a"):
        await house.registry.residency.evict_expired()
        assert house.resident() == "abc"
    await house.until(lambda: not house.registry.infos()[0].in_use)
    await house.registry.residency.evict_expired()
    assert house.resident() == "bc"
    house.settings.model_ttl_ms = 0
    await house.registry.residency.evict_expired()
    assert house.resident() == "b"
    assert house.registry.residency.expired == 2


async def test_an_alias_moves_to_another_model_and_back(house: House) -> None:
    await house.load("a", "b")
    await house.load("a", alias="chat")
    used: list[str] = []
    for target in ("b", "a"):
        async with house.registry.using("chat") as (model, _):
            used.append(model.name)
        moved = house.registry.alias(m.AliasParams(alias="chat", model=target))
        assert (moved.previous, moved.model) == (used[-1], target)
    assert used == ["a", "b"]
    gone = house.registry.alias(m.AliasParams(alias="chat", model=None))
    assert (gone.previous, gone.model) == ("a", None)
    with pytest.raises(ModelNotLoaded):
        house.registry.find("chat")


async def test_a_renewed_model_takes_over_and_the_old_one_ends_what_it_has(house: House) -> None:
    await house.load("a")
    async with house.registry.using("a") as (old, _):
        await house.registry.reload(m.ReloadParams(model="a"))
        async with house.registry.using("a") as (new, _):
            assert new.key != old.key
        memory = house.engine.report().memory
        assert memory.weights_bytes == 2 * SIZE
    await house.until(lambda: house.engine.report().memory.weights_bytes == SIZE)


async def test_models_may_be_unloaded_while_others_expire(house: House) -> None:
    await house.load("a", "b", "c", ttl_ms=0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(house.registry.residency.evict_expired)
        for name in "abc":
            tasks.start_soon(house.unload, name)
    assert house.states() == {}


async def test_a_model_that_left_while_its_reload_waited_is_brought_in_anew(house: House) -> None:
    await house.load("a")
    await house.load("b", "c", pin=True)
    async with house.in_use("a") as done, anyio.create_task_group() as asking:
        # While the engine says nothing the load cannot see yet who has to leave for it.
        gate = threading.Event()
        house.engine.run(gate.wait)
        asking.start_soon(house.load, "d")
        await house.until(lambda: house.states().get("d") == "loading")
        asking.start_soon(house.registry.reload, m.ReloadParams(model="a"))
        await anyio.sleep(0)
        gate.set()
        await house.until(lambda: house.states()["a"] == "draining")
        done()
    assert house.resident() == "abc"
    assert house.engine.report().memory.weights_bytes == 3 * SIZE
    await house.ask("d")
    await house.until(lambda: house.engine.report().memory.weights_bytes == 3 * SIZE)


async def test_a_budget_that_shrinks_keeps_nobody_waiting_for_ever(house: House) -> None:
    await house.load("a", "b")
    async with house.in_use("a", "b"), anyio.create_task_group() as asking:
        asking.start_soon(house.ask, "a", 1000)
        house.loading.go_on = anyio.Event()
        asking.start_soon(house.load, "c")
        await house.until(lambda: house.states().get("c") == "loading")
        house.settings.memory_budget_bytes = SIZE
        await asyncio.wrap_future(house.engine.run(house.engine.reconfigure))
        with pytest.raises(OutOfMemory):
            await house.ask("b", 1000)
        house.settings.memory_budget_bytes = BUDGET
        await asyncio.wrap_future(house.engine.run(house.engine.reconfigure))
        house.loading.go_on.set()


async def test_memory_is_where_it_was_after_any_number_of_changes(house: House) -> None:
    for round_ in range(6):
        for name in "abcdef"[round_ % 3 :]:
            await house.load(name)
            await house.ask(name)
        await house.unload("abcdef"[3 + round_ % 3])
    for name in list(house.states()):
        await house.unload(name)
    memory = house.engine.report().memory
    assert (memory.weights_bytes, memory.claimed_bytes, memory.reserved_bytes) == (0, 0, 0)


async def test_a_model_that_is_expected_comes_back_into_free_memory(house: House) -> None:
    await house.load("a", "b")
    house.expect(a=5, b=HOUR / 2)
    await house.evict("a")
    await house.evict("b")
    await house.look_ahead()
    assert house.states() == {"a": "ready", "b": "evicted"}
    await house.ask("a")
    assert house.loading.order == ["a", "b", "a"]
    report = house.residency.predictor.report()
    assert (report.predictions, report.hits) == (1, 1)


async def test_a_model_that_is_expected_takes_the_place_of_the_oldest_idle_one(
    house: House,
) -> None:
    await house.load("a", "b", "c")
    house.expect(a=5)
    await house.evict("a")
    await house.load("d")
    await house.look_ahead()
    assert house.resident() == "acd"
    assert house.residency.evicted == 1


async def test_nobody_in_use_pinned_or_expected_too_leaves_for_one_that_is_expected(house: House) -> None:
    await house.load("a", "b")
    await house.load("c", pin=True)
    house.expect(a=5, d=300)
    await house.evict("a")
    await house.load("d")
    async with house.in_use("b") as done:
        await house.look_ahead()
        assert house.states() == {"a": "evicted", "b": "ready", "c": "ready", "d": "ready"}
        assert house.residency.predictor.report().predictions == 0
        done()
        await house.until(lambda: not house.registry.infos()[1].in_use)
        await house.look_ahead()
    assert house.resident() == "acd"


async def test_where_nobody_may_leave_one_that_is_expected_comes_into_free_memory_only(house: House) -> None:
    await house.load("a", "b", "c")
    house.expect(a=5)
    await house.evict("a")
    await house.load("d")
    house.settings.evict_models = False
    await house.look_ahead()
    assert house.resident() == "bcd"
    await house.unload("b")
    await house.look_ahead()
    assert house.resident() == "acd"


async def test_a_use_that_is_expected_soon_protects_and_one_far_ahead_protects_nobody(house: House) -> None:
    await house.load("a", "b", "c")
    house.expect(a=HOUR / 2, b=300)
    await house.load("d")
    assert house.resident() == "bcd"
    await house.load("e")
    assert house.resident() == "bde"


async def test_one_that_is_expected_gives_way_if_others_take_the_room_before_its_turn(house: House) -> None:
    await house.load("a", "b", "c")
    house.expect(a=5)
    await house.evict("a")
    async with house.in_use("b", "c"):
        async with anyio.create_task_group() as both:
            both.start_soon(house.residency.bring_back, house.registry.find("a"))
            both.start_soon(partial(house.load, "d", pin=True))
        await house.until(lambda: house.states()["a"] == "evicted")
        assert set(house.states().values()) == {"evicted", "ready"}
    report = house.residency.predictor.report()
    assert (report.predictions, report.misses) == (1, 1)
    assert house.registry.infos()[0].failure is UNSET
    assert house.loading.order == ["a", "b", "c", "d"]


async def test_one_that_was_expected_and_is_asked_for_on_its_way_comes_as_any_other(house: House) -> None:
    await house.load("a", "b", "c")
    house.expect(a=5)
    await house.evict("a")
    async with house.in_use("b", "c") as done, anyio.create_task_group() as all_:
        all_.start_soon(house.residency.bring_back, house.registry.find("a"))
        all_.start_soon(partial(house.load, "d", pin=True))
        await house.until(lambda: house.states()["a"] == "queued")
        all_.start_soon(house.ask, "a")
        await house.until(lambda: "draining" in house.states().values())
        done()
    assert house.loading.order == ["a", "b", "c", "d", "a"]
    assert house.residency.predictor.report().hits == 1


async def test_a_model_that_came_back_does_not_expire_before_its_use(house: House) -> None:
    await house.load("a")
    house.settings.predictive_preload = True
    # Every day, once 800 s earlier: next in 805 s, or in 5.
    latest = time.monotonic() + 805 - DAY
    for at in (latest - 3 * DAY + 800, latest - 2 * DAY, latest - DAY, latest):
        house.residency.predictor.note_request("a", at)
    await house.evict("a")
    house.settings.model_ttl_ms = 60_000
    house.registry.find("a").last_used -= HOUR
    for _ in range(2):
        await house.look_ahead()
        assert house.resident() == "a"


async def test_while_memory_is_short_those_that_are_expected_leave_last(house: House) -> None:
    await house.load("a", "b")
    await house.load("c", pin=True)
    house.expect(a=300)
    assert await house.residency.evict_oldest()
    assert house.resident() == "ac"
    assert await house.residency.evict_oldest()
    assert not await house.residency.evict_oldest()
    assert house.resident() == "c"
    assert house.residency.evicted == 2
