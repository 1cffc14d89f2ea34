"""What is given up while memory is short, and when it is taken back."""

from collections.abc import Collection
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.protocol.errors import Overloaded
from mlx_sidecar.runtime.engine.sequence import MemoryUse
from mlx_sidecar.runtime.models.housekeeping import Housekeeping

pytestmark = pytest.mark.anyio

PLENTY, SHORT = 10_000, 100


class Machine:
    """A sidecar with a number of idle models, on a machine whose memory a test decides about."""

    def __init__(self, idle: int, available: int | None = PLENTY) -> None:
        self.available = available
        self.idle = idle
        self.gave_back = 0
        self.memory = MemoryUse()
        self.residency = self
        self.predictor = self
        self.entries = [SimpleNamespace(name=name, state="evicted") for name in "abc"]
        self.no_room_for: list[str] = []
        self.settings = Settings(home=Path("/nowhere"), min_available_bytes=1000)
        me = cast(Any, self)
        self.housekeeping = Housekeeping(me, me, me, self.settings)

    def available_memory(self) -> int | None:
        return self.available

    def report(self) -> Any:
        return SimpleNamespace(memory=SimpleNamespace(budget_bytes=5000))

    def run(self, work: Any) -> "Future[None]":
        work()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def give_memory_back(self) -> None:
        self.gave_back += 1

    async def evict_expired(self) -> None:
        pass

    async def evict_oldest(self) -> bool:
        self.idle -= 1
        return self.idle >= 0

    def wanted(self, _now: float, absent: Collection[str], _lead: float) -> list[str]:
        return [name for name in "cba" if name in absent]

    async def bring_back(self, entry: Any) -> bool:
        if entry.name in self.no_room_for:
            return False
        entry.state = "queued"
        return True

    def coming(self) -> str:
        return "".join(entry.name for entry in self.entries if entry.state == "queued")


async def test_with_enough_memory_nothing_is_given_up() -> None:
    machine = Machine(idle=1)
    await machine.housekeeping.look()
    machine.housekeeping.check()
    assert machine.housekeeping.pressure.level == "none"
    assert (machine.gave_back, machine.idle) == (0, 1)


async def test_a_shortage_takes_caches_then_idle_models_then_new_requests() -> None:
    machine = Machine(idle=2, available=SHORT)
    levels: list[str] = []
    for _ in range(5):
        await machine.housekeeping.look()
        levels.append(machine.housekeeping.pressure.level)
    assert levels == ["caches", "models", "models", "requests", "requests"]
    assert "100 bytes available" in str(machine.housekeeping.pressure.reason)
    with pytest.raises(Overloaded, match="short of memory") as refused:
        machine.housekeeping.check()
    assert refused.value.data["retryAfterMs"]
    pressure = machine.housekeeping.pressure
    assert (pressure.caches, pressure.models, pressure.requests) == (5, 2, 1)


async def test_requests_are_taken_again_when_there_is_clearly_enough() -> None:
    machine = Machine(idle=0, available=SHORT)
    for _ in range(2):
        await machine.housekeeping.look()
    machine.available = 1100
    await machine.housekeeping.look()
    with pytest.raises(Overloaded):
        machine.housekeeping.check()
    machine.available = PLENTY
    await machine.housekeeping.look()
    machine.housekeeping.check()
    assert machine.housekeeping.pressure.restored == 1


async def test_mlx_holding_more_than_the_budget_is_a_shortage_too() -> None:
    machine = Machine(idle=0, available=None)
    machine.memory = MemoryUse(active=4000, cached=2000)
    await machine.housekeeping.look()
    assert machine.housekeeping.pressure.level == "caches"
    assert "of a budget of 5000" in str(machine.housekeeping.pressure.reason)


async def test_of_those_expected_the_first_that_has_room_comes_back_then_the_next() -> None:
    machine = Machine(idle=0)
    await machine.housekeeping.look()
    assert machine.coming() == ""
    machine.settings.predictive_preload = True
    machine.no_room_for = ["c"]
    await machine.housekeeping.look()
    assert machine.coming() == "b"
    await machine.housekeeping.look()
    assert machine.coming() == "ab"


async def test_nobody_is_brought_back_while_memory_is_short() -> None:
    machine = Machine(idle=2, available=SHORT)
    machine.settings.predictive_preload = True
    await machine.housekeeping.look()
    assert machine.coming() == ""
    machine.available = PLENTY
    await machine.housekeeping.look()
    assert machine.coming() == "c"
