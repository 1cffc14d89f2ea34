"""What is done about memory while nobody asks for anything: expiry, shortage, and looking ahead.

While memory is short something more is given up every second, in this order: what MLX keeps of unused
buffers, idle models one after the other, and at last new requests are refused. When there is enough again,
and a quarter more, requests are taken again; models come back when they are asked for.
"""

import asyncio
import logging
import time

import anyio
from msgspec import UNSET

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.native.pages import Pages
from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import Overloaded

from ..engine.thread import InferenceThread
from .registry import ModelRegistry

log = logging.getLogger("memory")

_EVERY_SECONDS = 1.0
_ENOUGH = 1.25
_RETRY_AFTER_MS = 2000
LEAD_SECONDS = 10.0
"""So long before its earliest likely use a model is brought back."""


class Housekeeping:
    """Looks once a second. Lives on the event loop."""

    def __init__(
        self, registry: ModelRegistry, engine: InferenceThread, pages: Pages, settings: Settings
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._pages = pages
        self._settings = settings
        self.pressure = m.PressureStats(level="none", caches=0, models=0, requests=0, restored=0)
        self.available_bytes: int | None = None

    async def run(self) -> None:
        """Look for ever, once MLX has started."""
        while not self._engine.started().done():
            await anyio.sleep(_EVERY_SECONDS)
        while self._engine.started().exception() is None:
            await anyio.sleep(_EVERY_SECONDS)
            try:
                await self.look()
            except Exception:
                log.exception("a look at the memory failed")

    async def look(self) -> None:
        """Do what there is to do now."""
        await self._registry.residency.evict_expired()
        await self._relieve()
        if self._settings.predictive_preload and self.pressure.level == "none":
            await self._look_ahead()

    def check(self) -> None:
        """Raise Overloaded while memory is so short that new requests are refused."""
        if self.pressure.level == "requests":
            self.pressure.requests += 1
            raise Overloaded(retry_after_ms=_RETRY_AFTER_MS, short_of="memory")

    async def _relieve(self) -> None:
        reason = self._shortage(1.0)
        if reason is not None:
            await self._give_up_more(reason)
        elif self.pressure.level != "none" and self._shortage(_ENOUGH) is None:
            log.info("there is enough memory again")
            self.pressure.level, self.pressure.reason = "none", UNSET
            self.pressure.restored += 1

    def _shortage(self, factor: float, *, with_caches: bool = True) -> str | None:
        self.available_bytes = self._pages.available_memory()
        least = self._settings.min_available_bytes * factor
        if self.available_bytes is not None and self.available_bytes < least:
            return f"the machine has {self.available_bytes} bytes available, less than {round(least)}"
        budget = self._engine.report().memory.budget_bytes
        held = self._engine.memory.active + (self._engine.memory.cached if with_caches else 0)
        if budget and held * factor > budget:
            return f"MLX holds {held} bytes of a budget of {budget}"
        return None

    async def _give_up_more(self, reason: str) -> None:
        pressure = self.pressure
        before = pressure.level
        await asyncio.wrap_future(self._engine.run(self._engine.give_memory_back))
        pressure.caches += 1
        if before == "none" or self._shortage(1.0, with_caches=False) is None:
            # Unused buffers alone were too much, and come again: nobody has to leave for them.
            pressure.level = "caches"
        elif await self._registry.residency.evict_oldest():
            pressure.models += 1
            pressure.level = "requests" if before == "requests" else "models"
        else:
            pressure.level = "requests"
        pressure.reason = reason
        if pressure.level != before:
            log.warning("memory is short: %s; given up: %s", reason, pressure.level)

    async def _look_ahead(self) -> None:
        residency = self._registry.residency
        absent = {entry.name: entry for entry in self._registry.entries if entry.state == "evicted"}
        for name in residency.predictor.wanted(time.monotonic(), absent.keys(), LEAD_SECONDS):
            if await residency.bring_back(absent[name]):
                log.info("%s is likely to be asked for and comes back", name)
                return  # What is left for another is known when this one is there.
