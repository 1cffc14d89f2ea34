"""Those who wait for one model with one priority: owners take turns, each is served in its own order.

Turns are shared by service: the owner who has received the fewest tokens goes first (virtual token counters,
Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). Two owners who always wait therefore
receive the same, whatever the sizes of their requests, but for what is running at the moment.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic

from .item import ItemT
from .priority import Priority

AWAY_REMEMBERED = 256
"""Owners who wait for nothing now and whose counts are kept all the same; as many as may be connected."""


class Lane(Generic[ItemT]):
    """One line per owner. `since` is when somebody here was last taken, or began to wait if nobody was."""

    def __init__(self, priority: Priority, since: float) -> None:
        self.priority = priority
        self.since = since
        self._count = 0
        self._lines: dict[int, OrderedDict[ItemT, None]] = {}
        self._received: dict[int, float] = {}
        self._floor = 0.0

    def __len__(self) -> int:
        return self._count

    def rank(self, now: float, ageing_seconds: float) -> tuple[int, float]:
        """Return what lanes are compared by: the class after ageing, then since when; the least is first."""
        return self.priority - int((now - self.since) // ageing_seconds), self.since

    def put(self, item: ItemT) -> None:
        """Place an item behind the others of its owner."""
        line = self._lines.get(item.owner)
        if line is None:
            # Whoever was away has saved up nothing, and whoever is new owes nothing.
            self._floor = max(self._floor, min((self._received[owner] for owner in self._lines), default=0))
            self._received[item.owner] = max(self._received.get(item.owner, 0), self._floor)
            line = self._lines[item.owner] = OrderedDict()
        line[item] = None
        self._count += 1

    def remove(self, item: ItemT) -> None:
        """Drop an item that waits here."""
        line = self._lines[item.owner]
        del line[item]
        self._count -= 1
        if not line:
            self._leave(item.owner)

    def take(self, item: ItemT, now: float) -> None:
        """Drop an item because it is served now, and charge its owner for the prompt."""
        self.charge(item.owner, len(item.prompt))
        self.remove(item)
        self.since = now

    def charge(self, owner: int, tokens: int) -> None:
        """Note that an owner received service; nothing if its count is not kept."""
        if owner in self._received:
            self._received[owner] += tokens
            # The mean rises with every token, whoever comes and goes. If new owners began at the least count
            # alone, they could keep somebody waiting for ever by coming one after another.
            self._floor += tokens / len(self._received)

    def __iter__(self) -> Iterator[ItemT]:
        """Iterate in the order of service: the first of every owner, then the second of every owner, ...

        Lazily, because nearly always the first is taken. Nothing may be put or dropped meanwhile.
        """
        lines = [iter(self._lines[owner]) for owner in self._owners()]
        while lines:
            left: list[Iterator[ItemT]] = []
            for line in lines:
                item = next(line, None)
                if item is not None:
                    yield item
                    left.append(line)
            lines = left

    def _owners(self) -> list[int]:
        if len(self._lines) == 1:
            return list(self._lines)
        order = [
            (self._received[owner], next(iter(line)).submitted_at, owner)
            for owner, line in self._lines.items()
        ]
        return [owner for _, _, owner in sorted(order)]

    def _leave(self, owner: int) -> None:
        del self._lines[owner]
        # To the end, so that those who have been away longest are found first.
        self._received[owner] = self._received.pop(owner)
        if len(self._received) > len(self._lines) + AWAY_REMEMBERED:
            del self._received[next(other for other in self._received if other not in self._lines)]
