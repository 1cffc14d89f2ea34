"""Two simple patterns in the times at which models were asked for, and nothing else.

- A period: bursts of use of a model begin at regular intervals. After Shahrad et al., "Serverless in the
  Wild" (USENIX ATC 2020), who decide from the spread of a function's idle times whether to bring it back
  ahead of its next use.
- A succession: a model's turn begins soon after another's. After Griffioen and Appleton, "Reducing File
  System Latency using a Predictive Approach" (USENIX Summer 1994), who count what follows within a lookahead.

A prediction counts as wrong whether or not somebody acted on it, so a pattern that stopped is given up, and
one that came back is trusted again, without a load for nothing. Times are seconds on one clock that never
goes backwards.
"""

import math
import statistics
from collections import deque
from collections.abc import Collection
from typing import NamedTuple

BURST_SECONDS = 30.0
"""Uses closer together than this are one burst."""

_MIN_TIMES = 3
"""So often a pattern must have been seen."""

_INTERVALS = 5
_REGULAR_SHARE = 0.8
"""One in five may be odd: what runs on working days is regular over a weekend."""
_TOLERANCE_SHARE = 0.1
_MAX_TOLERANCE_SECONDS = 900.0

_FIRST_TRUST = 0.75
_ENOUGH_TRUST = 0.5
"""Trust in a period moves half way to 1 when it holds and to 0 when it does not: one or two misses end it."""

_FOLLOW_SECONDS = 300.0
_FOLLOWERS = 8
_MAJORITY = 0.75
"""More than this share of the last turns must have been followed alike: one or two misses end that too."""


class Prediction(NamedTuple):
    """When a model is asked for next: likely, at the earliest, at the latest; `confidence` is at most 1."""

    expected: float
    earliest: float
    latest: float
    confidence: float


class Period:
    """The bursts of one model, and how far their intervals can be trusted."""

    def __init__(self, at: float) -> None:
        self._began = self._last_use = at
        self._intervals: deque[float] = deque(maxlen=_INTERVALS)
        self._regularity: tuple[float, float] | None = None
        self._trust = _FIRST_TRUST

    def note(self, at: float) -> None:
        """Learn that the model was asked for."""
        if at - self._last_use >= BURST_SECONDS:
            interval = at - self._began
            self._judge(interval)
            self._intervals.append(interval)
            self._regularity = _regularity(self._intervals)
            self._began = at
        self._last_use = at

    def predict(self, now: float) -> Prediction | None:
        """Return when the next burst begins; None if there is no period, or none that can be trusted."""
        if self._regularity is None:
            return None
        period, spread = self._regularity
        missed = _missed(now - self._began, period)
        confidence = self._trust * 0.5**missed
        if confidence < _ENOUGH_TRUST:
            return None
        expected = self._began + (missed + 1) * period
        return Prediction(expected, expected - spread, expected + _tolerance(period), confidence)

    def _judge(self, interval: float) -> None:
        """Compare what was predicted with what came."""
        if self._regularity is None:
            return
        period, _ = self._regularity
        missed = _missed(interval, period)
        self._trust *= 0.5**missed
        off = abs(interval - (missed + 1) * period)
        self._trust += ((1.0 if off <= _tolerance(period) else 0.0) - self._trust) / 2


class Succession:
    """What followed the turns of one model: who, and how long after the turn began; None for nobody soon."""

    def __init__(self) -> None:
        self._followers: deque[tuple[str | None, float]] = deque(maxlen=_FOLLOWERS)

    def note(self, model: str, after: float) -> None:
        """Learn who followed a turn, and how long after it began."""
        self._followers.append((model if after <= _FOLLOW_SECONDS else None, after))

    def predict(self, model: str, began: float, now: float) -> Prediction | None:
        """Return when `model` follows the turn that began then; None if it does not, or is overdue."""
        delays = [after for follower, after in self._followers if follower == model]
        latest = began + _FOLLOW_SECONDS
        if len(delays) < _MIN_TIMES or now > latest:
            return None
        share = len(delays) / len(self._followers)
        if share <= _MAJORITY:
            return None
        expected = max(now, began + statistics.median(delays))
        return Prediction(expected, began + min(delays), latest, share)


def _regularity(intervals: Collection[float]) -> tuple[float, float] | None:
    """Return the period and the most that a regular interval was off it; None if too few are regular."""
    if len(intervals) < _MIN_TIMES:
        return None
    period = statistics.median(intervals)
    off = [abs(interval - period) for interval in intervals]
    regular = [distance for distance in off if distance <= _tolerance(period)]
    enough = max(_MIN_TIMES, math.ceil(_REGULAR_SHARE * len(off)))
    return (period, max(regular)) if len(regular) >= enough else None


def _missed(elapsed: float, period: float) -> int:
    """Return how many windows went by since a burst began."""
    return max(0, math.ceil((elapsed - _tolerance(period)) / period) - 1)


def _tolerance(period: float) -> float:
    return min(_TOLERANCE_SHARE * period, _MAX_TOLERANCE_SECONDS)
