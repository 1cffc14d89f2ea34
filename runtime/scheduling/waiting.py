"""The line of sequences that do not run yet. Changed on the inference thread only, between two steps.

Who is next is decided in three steps, each over a handful of things:

1. The lane, which is a priority of a model. A lane rises one class for every `ageing_seconds` in which
   somebody waits in it and nobody is taken, past the highest class too. It is the lane that ages, not the
   item: ageing makes up for being passed over, and a long line of low priority that is served at its pace
   is not. With ageing items a thousand old ones of a batch job would all go before a critical one.
2. The owner within the lane, by service received; see `Lane`.
3. The item within the owner's line: first come, first served.

Nobody starves. A lane that was passed over for (priority + 1) * `ageing_seconds` outranks every lane that is
new or served after that moment, so each of the others goes before it at most once more. Within the lane every
token that others receive brings an owner closer to its turn.
"""

import time
from collections.abc import Callable, Container, Iterator
from itertools import chain, islice
from typing import Generic, NamedTuple

from .item import ItemT
from .lane import Lane
from .priority import Priority

MAX_PASSED = 16
"""How many may go before one who is next but for whom there is no memory; then the line waits for it."""

LOOK_AHEAD = 32
"""How many are looked at behind one who does not fit: the cost of a step must not grow with the line."""


class WaitingReport(NamedTuple):
    """The line at one moment. Counts and prompt tokens are by priority, the most urgent first.

    `held` is how many are next, each for its model, and wait for memory.
    """

    counts: tuple[int, ...] = (0,) * len(Priority)
    prompt_tokens: tuple[int, ...] = (0,) * len(Priority)
    oldest_wait_seconds: float = 0.0
    held: int = 0


class _Held(Generic[ItemT]):
    """One who is next for its model and does not fit, and how many have gone before it since."""

    def __init__(self, item: ItemT) -> None:
        self.item = item
        self.passed = 0


class Waiting(Generic[ItemT]):
    """Decides who runs next; see above. Costs O(lanes + owners who wait), however many wait."""

    def __init__(self, ageing_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.ageing_seconds = ageing_seconds
        self._clock = clock
        self._lanes: dict[tuple[str, Priority], Lane[ItemT]] = {}
        self._places: dict[ItemT, tuple[str, Priority]] = {}
        self._held: dict[str, _Held[ItemT]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[ItemT]:
        """Iterate over everybody who waits, in the order in which they came."""
        return iter(self._places)

    def put(self, item: ItemT) -> None:
        """Let an item wait that does not wait yet."""
        place = (item.model, item.priority)
        lane = self._lanes.get(place)
        if lane is None:
            lane = self._lanes[place] = Lane(item.priority, item.submitted_at)
        lane.put(item)
        self._places[item] = place

    def remove(self, item: ItemT) -> bool:
        """Let an item wait no longer, because it is not wanted any more; return whether it waited."""
        place = self._places.get(item)
        if place is None:
            return False
        self._lanes[place].remove(item)
        self._forget(item, place)
        return True

    def take(self, open_models: Container[str], fits: Callable[[ItemT], bool]) -> ItemT | None:
        """Return who runs next and let it wait no longer; None if nobody can run now.

        `open_models` are those with room for one more row: the others hold nobody up. `fits` says whether
        there is memory for an item. It may reserve it: the first one that fits is the one returned.

        One that is next and does not fit is held: nobody less urgent goes before it, nor more than
        `MAX_PASSED` of the others, and it is asked first from now on. There must come a time when it fits.
        """
        if not self._places:
            return None
        waiting_for_memory = [held for held in self._held.values() if held.item.model in open_models]
        for held in waiting_for_memory:
            if fits(held.item):
                return self._take(held.item, open_models)
            if held.passed >= MAX_PASSED:
                return None
        bar = min((held.item.priority for held in waiting_for_memory), default=Priority.LOW)
        for item in islice(self._in_order(open_models), LOOK_AHEAD):
            held = self._held.get(item.model)
            if item.priority > bar or (held is not None and held.item is item):
                continue
            if fits(item):
                return self._take(item, open_models)
            if held is None:
                self._held[item.model] = _Held(item)
                bar = min(bar, item.priority)
        return None

    def charge(self, item: ItemT, tokens: int) -> None:
        """Note that an item that was taken has received `tokens` more than its prompt."""
        lane = self._lanes.get((item.model, item.priority))
        if lane is not None:
            lane.charge(item.owner, tokens)

    def report(self) -> WaitingReport:
        """Return the state of the line. From any thread: it looks at a copy of who waits."""
        waiting, now = list(self._places), self._clock()
        counts, prompt_tokens = [0] * len(Priority), [0] * len(Priority)
        for item in waiting:
            counts[item.priority] += 1
            prompt_tokens[item.priority] += len(item.prompt)
        oldest = min((item.submitted_at for item in waiting), default=now)
        return WaitingReport(tuple(counts), tuple(prompt_tokens), now - oldest, len(self._held))

    def _in_order(self, open_models: Container[str]) -> Iterator[ItemT]:
        now = self._clock()
        lanes = [lane for (model, _), lane in self._lanes.items() if model in open_models]
        lanes.sort(key=lambda lane: lane.rank(now, self.ageing_seconds))
        return chain.from_iterable(lanes)

    def _take(self, item: ItemT, open_models: Container[str]) -> ItemT:
        place = self._places[item]
        self._lanes[place].take(item, self._clock())
        self._forget(item, place)
        for held in self._held.values():
            if held.item.model in open_models:
                held.passed += 1
        return item

    def _forget(self, item: ItemT, place: tuple[str, Priority]) -> None:
        del self._places[item]
        if not self._lanes[place]:
            del self._lanes[place]
        held = self._held.get(item.model)
        if held is not None and held.item is item:
            del self._held[item.model]
