"""Who leaves memory: to make room for a model that is to be loaded, or because nobody has used it for long.

The best victim comes first in this order; each rule decides where those before it leave a tie:

1. idle before in use, because one in use has to be drained first;
2. nothing known about its next use before expected back, because only what is known can be kept for a reason;
3. of those expected back, the one expected last (Belady, "A study of replacement algorithms for a
   virtual-storage computer", IBM Systems Journal 5(2), 1966);
4. the least recently used.

Victims are taken in this order until there is room. Of those that tie in all four the fewest bytes that are
enough are taken. In the end whoever does not have to leave after all is spared, the worst victim first.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

_MOST_SUMS = 4096
"""So many sums are looked at for the fewest bytes: exact for 12 models that tie, bounded for any number."""


class Resident(NamedTuple):
    """A model in memory. Times are seconds on one clock; `ttl` is None where the default holds.

    `next_use` is when it is expected back, None if nothing is expected. It protects a model however far ahead
    it lies: leave it None where keeping the memory for so long would be a waste.
    """

    name: str
    bytes: int
    last_used: float
    in_use: bool
    pinned: bool
    next_use: float | None = None
    ttl: float | None = None


class Plan(NamedTuple):
    """Who has to leave, the best victim first: `evict` can now, `drain` must become idle before.

    Not `possible`: what is pinned and the budget leave too little, and both lists are empty.
    """

    evict: list[str]
    drain: list[str]
    possible: bool


def choose_victims(residents: Iterable[Resident], needed_bytes: int, free_bytes: int) -> Plan:
    """Return who has to leave so that `needed_bytes` are free; `free_bytes` below 0 is a budget overdrawn.

    Nobody leaves in vain: without any one of the plan there would be too little.
    """
    missing = needed_bytes - free_bytes
    if missing <= 0:
        return Plan([], [], possible=True)
    candidates = sorted((one for one in residents if not one.pinned), key=_order)
    if sum(one.bytes for one in candidates) < missing:
        return Plan([], [], possible=False)
    victims = _spare(_take(candidates, missing), missing)
    return Plan(
        evict=[one.name for one in victims if not one.in_use],
        drain=[one.name for one in victims if one.in_use],
        possible=True,
    )


def expired(residents: Iterable[Resident], now: float, default_ttl: float | None) -> list[str]:
    """Return the models that lay idle for their time to live or longer, the least recently used first.

    A `ttl` of infinity means never, and so does a default of None. One that is expected back before as much
    time again has passed stays: to load it again would cost more than to keep it.
    """
    return [one.name for one in sorted(residents, key=_order) if _is_expired(one, now, default_ttl)]


def _is_expired(one: Resident, now: float, default_ttl: float | None) -> bool:
    ttl = default_ttl if one.ttl is None else one.ttl
    if one.in_use or one.pinned or ttl is None or now - one.last_used < ttl:
        return False
    return one.next_use is None or not now <= one.next_use <= now + ttl


def _rank(one: Resident) -> tuple[bool, bool, float, float]:
    return one.in_use, one.next_use is not None, -(one.next_use or 0.0), one.last_used


def _order(one: Resident) -> tuple[tuple[bool, bool, float, float], int, str]:
    return _rank(one), -one.bytes, one.name


def _take(candidates: Sequence[Resident], missing: int) -> list[Resident]:
    """Return the best victims that free `missing` bytes; all candidates together do."""
    taken: list[Resident] = []
    for _, group in groupby(candidates, key=_rank):
        tied = list(group)
        total = sum(one.bytes for one in tied)
        if total >= missing:
            return taken + _fewest_bytes(tied, missing)
        taken += tied
        missing -= total
    return taken


def _fewest_bytes(tied: list[Resident], missing: int) -> list[Resident]:
    """Return those with the smallest sum that is enough: subset sum over the sums that can be reached."""
    best, best_sum = tied, sum(one.bytes for one in tied)
    too_small: dict[int, list[Resident]] = {0: []}
    for one in tied:
        for before, chosen in list(too_small.items()):
            total = before + one.bytes
            if missing <= total < best_sum:
                best, best_sum = [*chosen, one], total
            elif total < missing and len(too_small) < _MOST_SUMS:
                too_small.setdefault(total, [*chosen, one])
    return best


def _spare(victims: list[Resident], missing: int) -> list[Resident]:
    surplus = sum(one.bytes for one in victims) - missing
    kept: list[Resident] = []
    for one in reversed(victims):
        if one.bytes <= surplus:
            surplus -= one.bytes
        else:
            kept.append(one)
    return kept[::-1]
