"""Which models will be asked for soon, learned from when they were asked for.

Two simple patterns, and nothing else:

- A period: bursts of use of a model begin at regular intervals. After Shahrad et al., "Serverless in the
  Wild" (USENIX ATC 2020), who decide from the spread of a function's idle times whether to bring it back
  ahead of its next use.
- A succession: a model's turn begins soon after another's. After Griffioen and Appleton, "Reducing File
  System Latency using a Predictive Approach" (USENIX Summer 1994), who count what follows within a lookahead.

A prediction counts as wrong whether or not somebody acted on it, so a pattern that stopped is given up, and
one that came back is trusted again, without a load for nothing. A model is brought back once for each window
of a prediction. Times are seconds on one clock; one that goes backwards stands still.
"""

import math
import statistics
from collections import deque
from collections.abc import Collection
from typing import NamedTuple

MAX_MODELS = 256
"""Of more the one that was not asked for the longest is forgotten."""

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


class PredictionReport(NamedTuple):
    """How many models were brought back and were then used in time, or not; some may still be waited for."""

    predictions: int = 0
    hits: int = 0
    misses: int = 0
    hit_rate: float | None = None


class _Window(NamedTuple):
    """Until when a model that was brought back is to be used; `open` until that is decided."""

    until: float
    open: bool = True


class _Period:
    """The bursts of one model, and how far their intervals can be trusted."""

    def __init__(self, at: float) -> None:
        self._began = self._last_use = at
        self._intervals: deque[float] = deque(maxlen=_INTERVALS)
        self._regularity: tuple[float, float] | None = None
        self._trust = _FIRST_TRUST

    def note(self, at: float) -> None:
        if at - self._last_use >= BURST_SECONDS:
            interval = at - self._began
            self._judge(interval)
            self._intervals.append(interval)
            self._regularity = _regularity(self._intervals)
            self._began = at
        self._last_use = at

    def predict(self, now: float) -> Prediction | None:
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


class _Turn(NamedTuple):
    """Requests for one model with none for another between them, and less than a burst apart."""

    model: str
    began: float
    last_use: float


class _Succession:
    """What followed the turns of one model: who, and how long after the turn began; None for nobody soon."""

    def __init__(self) -> None:
        self._followers: deque[tuple[str | None, float]] = deque(maxlen=_FOLLOWERS)

    def note(self, model: str, after: float) -> None:
        self._followers.append((model if after <= _FOLLOW_SECONDS else None, after))

    def predict(self, model: str, began: float, now: float) -> Prediction | None:
        delays = [after for follower, after in self._followers if follower == model]
        latest = began + _FOLLOW_SECONDS
        if len(delays) < _MIN_TIMES or now > latest:
            return None
        share = len(delays) / len(self._followers)
        if share <= _MAJORITY:
            return None
        expected = max(now, began + statistics.median(delays))
        return Prediction(expected, began + min(delays), latest, share)


class _History:
    """What is remembered of one model."""

    def __init__(self, at: float) -> None:
        self.period = _Period(at)
        self.succession = _Succession()


class Predictor:
    """Learns from every request, says what to bring back, and counts how often that was right."""

    def __init__(self) -> None:
        self._now = -math.inf
        self._histories: dict[str, _History] = {}
        self._windows: dict[str, _Window] = {}
        self._turn: _Turn | None = None
        self._predictions = self._hits = self._misses = 0

    def note_request(self, model: str, at: float) -> None:
        """Learn that a model was asked for."""
        at = self._advance(at)
        window = self._windows.pop(model, None)
        self._hits += window is not None and window.open
        if (history := self._histories.pop(model, None)) is None:
            history = _History(at)
        # Put back at the end: the first is the one that was not asked for the longest.
        self._histories[model] = history
        history.period.note(at)
        self._take_turn(model, at)
        if len(self._histories) > MAX_MODELS:
            self._forget(next(iter(self._histories)))

    def next_use(self, model: str, now: float) -> float | None:
        """Return when the model is expected next, not before `now`; None if nothing is known."""
        now = self._advance(now)
        prediction = self._predict(model, now)
        return None if prediction is None else max(now, prediction.expected)

    def wanted(self, now: float, absent: Collection[str], lead_seconds: float) -> list[str]:
        """Return who of `absent` is to be brought back now, the most certain first, then the most urgent.

        `lead_seconds` is how long ahead of its earliest use a model is to be there.
        """
        now = self._advance(now)
        due: list[tuple[float, float, str]] = []
        for model in absent:
            prediction = None if model in self._windows else self._predict(model, now)
            if prediction is not None and prediction.earliest - lead_seconds <= now:
                due.append((-prediction.confidence, prediction.expected, model))
        return [model for _, _, model in sorted(due)]

    def note_brought_back(self, model: str, at: float) -> None:
        """Learn that a model is being brought back; to be called when that begins.

        If its window went by since it was wanted, that is a miss at once.
        """
        at = self._advance(at)
        if model in self._windows:
            return
        self._predictions += 1
        if (prediction := self._predict(model, at)) is None:
            self._misses += 1
        else:
            self._windows[model] = _Window(prediction.latest)

    def note_evicted(self, model: str, at: float) -> None:
        """Learn that a model left memory; if it was brought back and never used, that is a miss."""
        self._advance(at)
        window = self._windows.get(model)
        if window is not None and window.open:
            self._misses += 1
            self._windows[model] = window._replace(open=False)

    def report(self) -> PredictionReport:
        """Return what became of the models brought back; the rate is None before the first is decided."""
        decided = self._hits + self._misses
        rate = self._hits / decided if decided else None
        return PredictionReport(self._predictions, self._hits, self._misses, rate)

    def _advance(self, at: float) -> float:
        self._now = max(self._now, at)
        for model in [model for model, window in self._windows.items() if window.until < self._now]:
            self._misses += self._windows.pop(model).open
        return self._now

    def _take_turn(self, model: str, at: float) -> None:
        turn = self._turn
        if turn is not None and turn.model == model and at - turn.last_use < BURST_SECONDS:
            self._turn = turn._replace(last_use=at)
            return
        if turn is not None and (previous := self._histories.get(turn.model)) is not None:
            previous.succession.note(model, at - turn.began)
        self._turn = _Turn(model, at, at)

    def _forget(self, model: str) -> None:
        del self._histories[model]
        window = self._windows.pop(model, None)
        self._misses += window is not None and window.open

    def _predict(self, model: str, now: float) -> Prediction | None:
        """Return what comes sooner, of the predictions that can be trusted."""
        history, turn = self._histories.get(model), self._turn
        if history is None or turn is None:
            return None
        found = [history.period.predict(now)]
        if turn.model != model and (current := self._histories.get(turn.model)) is not None:
            found.append(current.succession.predict(model, turn.began, now))
        return min((one for one in found if one is not None), key=lambda one: one.expected, default=None)


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
