"""Predictive preload, simulated: how often a model that was brought back is then used, and what it costs.

    .venv/bin/python benchmarks/prediction.py [ROUNDS]

Two weeks of requests to six models in a memory for two or three of them, with and without prediction, without
a time to live and with one. Who leaves, and who comes back in whose place, is decided as in the runtime, by
its own policies; but it looks every 5 s instead of every second, and loading and answering take no time. Time
is simulated, so the figures do not depend on the machine; a round is a seed.
"""

import random
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from report import publish

from mlx_sidecar.runtime.models.eviction import Resident, choose_victims, expired
from mlx_sidecar.runtime.models.housekeeping import LEAD_SECONDS
from mlx_sidecar.runtime.models.prediction import PredictionReport, Predictor
from mlx_sidecar.runtime.models.residency import SOON_SECONDS

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
DAYS = 14
TICK_SECONDS = 5.0
TTLS = {"no time to live": None, "10 min to live": 10 * MINUTE}

GIB = 1 << 30
SIZES = {
    "tiny": GIB,
    "small": 2 * GIB,
    "medium": 4 * GIB,
    "coder": 5 * GIB,
    "large": 8 * GIB,
    "huge": 10 * GIB,
}
BUDGET_BYTES = 12 * GIB


class Request(NamedTuple):
    """Somebody asks for a model."""

    at: float
    model: str


class Outcome(NamedTuple):
    """What a simulation came to."""

    warm_share: float
    loaded_bytes: int
    brought_back_bytes: int
    prediction: PredictionReport


def regular(dice: random.Random) -> Iterator[Request]:
    """Jobs by the hour, by the day and every 40 minutes, some seconds late; somebody at random beside."""
    for model, period, late in (("large", HOUR, 20), ("huge", DAY, 60), ("coder", 40 * MINUTE, 20)):
        for number in range(int(DAYS * DAY / period)):
            yield Request(number * period + dice.uniform(0, late), model)
    yield from at_random(dice, ("tiny", "small", "medium"), 20 * MINUTE)


def work_hours(dice: random.Random) -> Iterator[Request]:
    """Any of six models at random, from nine to five on working days."""
    for request in at_random(dice, tuple(SIZES), 5 * MINUTE):
        if request.at % (7 * DAY) < 5 * DAY and 9 * HOUR <= request.at % DAY < 17 * HOUR:
            yield request


def alternating(dice: random.Random) -> Iterator[Request]:
    """A large model about a minute after another, at random times; somebody at random beside them."""
    for request in at_random(dice, ("large",), 45 * MINUTE):
        yield request
        yield Request(request.at + dice.uniform(40, 90), "coder")
    yield from at_random(dice, ("tiny", "small", "medium"), 20 * MINUTE)


def at_random(
    dice: random.Random, models: tuple[str, ...] = tuple(SIZES), mean: float = 10 * MINUTE
) -> Iterator[Request]:
    """Requests without memory: exponential gaps, any of the models."""
    at = dice.expovariate(1 / mean)
    while at < DAYS * DAY:
        yield Request(at, dice.choice(models))
        at += dice.expovariate(1 / mean)


PATTERNS: dict[str, Callable[[random.Random], Iterator[Request]]] = {
    "regular": regular,
    "work hours": work_hours,
    "alternating": alternating,
    "random": at_random,
}


class Memory:
    """The models in memory; everybody is idle as soon as it was asked for."""

    def __init__(self, predictor: Predictor | None, ttl: float | None) -> None:
        self.predictor = predictor
        self.ttl = ttl
        self.last_used = dict.fromkeys(SIZES, 0.0)
        self.present: set[str] = set()
        self.warm = self.requests = self.loaded_bytes = self.brought_back_bytes = 0

    def ask(self, request: Request) -> None:
        """Use a model, after loading it if it is not there."""
        if self.predictor is not None:
            self.predictor.note_request(request.model, request.at)
        self.requests += 1
        self.warm += request.model in self.present
        if request.model not in self.present:
            self._load(request.model, request.at, self._residents(request.at))
        self.last_used[request.model] = request.at

    def tick(self, now: float) -> None:
        """Let go of what nobody uses, and bring back one that is wanted."""
        for name in expired(self._residents(now), now, self.ttl):
            self._evict(name, now)
        if self.predictor is None:
            return
        for name in self.predictor.wanted(now, SIZES.keys() - self.present, LEAD_SECONDS):
            # One that is expected soon does not go for another that is only expected too.
            if self._load(name, now, [one for one in self._residents(now) if one.next_use is None]):
                self.predictor.note_brought_back(name, now)
                self.brought_back_bytes += SIZES[name]
                return

    def _load(self, name: str, now: float, residents: list[Resident]) -> bool:
        free = BUDGET_BYTES - sum(SIZES[other] for other in self.present)
        plan = choose_victims(residents, SIZES[name], free)
        if plan.possible:
            for victim in plan.evict:
                self._evict(victim, now)
            self.loaded_bytes += SIZES[name]
            self.present.add(name)
        return plan.possible

    def _evict(self, name: str, now: float) -> None:
        self.present.remove(name)
        if self.predictor is not None:
            self.predictor.note_evicted(name, now)

    def _residents(self, now: float) -> list[Resident]:
        return [
            Resident(name, SIZES[name], self.last_used[name], False, False, self._next_use(name, now))
            for name in self.present
        ]

    def _next_use(self, name: str, now: float) -> float | None:
        at = None if self.predictor is None else self.predictor.next_use(name, now)
        return None if at is None or at > now + SOON_SECONDS else at


def simulate(requests: list[Request], predictor: Predictor | None, ttl: float | None) -> Outcome:
    """Return what the requests, in order of time, come to."""
    memory = Memory(predictor, ttl)
    ticks = 0
    for request in requests:
        while (now := ticks * TICK_SECONDS) <= request.at:
            memory.tick(now)
            ticks += 1
        memory.ask(request)
    report = PredictionReport() if predictor is None else predictor.report()
    return Outcome(memory.warm / memory.requests, memory.loaded_bytes, memory.brought_back_bytes, report)


def main() -> None:
    """Simulate every pattern with every seed."""
    figures: dict[str, list[float]] = {}
    for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        for pattern, requests_of in PATTERNS.items():
            requests = sorted(requests_of(random.Random(seed)))
            for life, ttl in TTLS.items():
                without = simulate(requests, None, ttl)
                outcome = simulate(requests, Predictor(), ttl)
                row = {
                    "found their model without prediction, %": _percent(without.warm_share),
                    "found their model, %": _percent(outcome.warm_share),
                    "hits, %": _percent(outcome.prediction.hit_rate),
                    "brought back, GiB a day": outcome.brought_back_bytes / GIB / DAYS,
                    "loaded / without prediction": outcome.loaded_bytes / without.loaded_bytes,
                }
                for figure, value in row.items():
                    if value is not None:
                        figures.setdefault(f"{pattern}, {life}: {figure}", []).append(value)
    publish("prediction", "benchmarks/prediction.py", "as named", figures)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


if __name__ == "__main__":
    main()
