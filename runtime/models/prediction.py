"""Which models will be asked for soon, learned from when they were asked for; see `patterns`.

A model is brought back once for each window of a prediction. Times are seconds on one clock; one that goes
backwards stands still.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

from .patterns import BURST_SECONDS, Period, Prediction, Succession

MAX_MODELS = 256
"""Of more the one that was not asked for the longest is forgotten."""


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


class _Turn(NamedTuple):
    """Requests for one model with none for another between them, and less than a burst apart."""

    model: str
    began: float
    last_use: float


class _History:
    """What is remembered of one model."""

    def __init__(self, at: float) -> None:
        self.period = Period(at)
        self.succession = Succession()


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
        """Return the earliest of the next use that is expected, not before `now`; None if none is."""
        now = self._advance(now)
        prediction = self._predict(model, now)
        return None if prediction is None else max(now, prediction.earliest)

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
        """Learn that a model left memory, or failed to come back.

        If it was brought back for a prediction and never used, that is a miss.
        """
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
