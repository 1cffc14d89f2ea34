"""What to expect of a model, from what was measured lately; one for each model.

Written on the inference thread, read on the event loop: every member is one number.
"""

from typing import NamedTuple

_WEIGHT_OF_NEW = 0.1
_BEST_FADES = 0.99
"""Of the best rate so much is left after each further chunk, so that one odd measurement does not stay."""

MIN_RETRY_MS = 1
MAX_RETRY_MS = 60_000
UNKNOWN_RETRY_MS = 1000


class ForecastReport(NamedTuple):
    """Measured means, the latest weighing most; None before the first measurement."""

    prefill_tokens_per_second: float | None = None
    decode_steps_per_second: float | None = None
    prompt_tokens_per_request: float | None = None
    completion_tokens_per_request: float | None = None


class Forecast:
    """Measures, and says what follows. `chunk_tokens` is the most that one step prefills."""

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._prefill = _Rate()
        self._decode = _Rate()
        self._best_prefill = 0.0
        self._prompt: float | None = None
        self._completion: float | None = None

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """Take in a chunk of prefill and how long it took."""
        if tokens <= 0 or seconds <= 0:
            return
        self._prefill.note(tokens, seconds)
        # Short chunks take longer for each token, so they say nothing about the least time of a long prompt.
        if tokens >= self._chunk_tokens:
            self._best_prefill = max(tokens / seconds, self._best_prefill * _BEST_FADES)

    def note_decode(self, seconds: float) -> None:
        """Take in how long a decode step took."""
        if seconds > 0:
            self._decode.note(1, seconds)

    def note_finished(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Take in a request that ended, for whatever reason."""
        self._prompt = _blend(self._prompt, prompt_tokens)
        self._completion = _blend(self._completion, completion_tokens)

    def first_token_seconds(self, prompt_tokens_ahead: int, prompt_tokens: int) -> float:
        """Return the least time in which a first token can come; 0.0 before a full chunk was measured.

        A bound, not an estimate: the best rate seen, nothing else running. `prompt_tokens_ahead` are those
        that will be prefilled before, whatever happens.
        """
        if not self._best_prefill:
            return 0.0
        return (prompt_tokens_ahead + prompt_tokens) / self._best_prefill

    def retry_after_ms(self, places: int, running: int) -> int:
        """Return when a place in a full line will likely be free, in 1 to 60 000 ms; 1000 before it is known.

        `places` is how many must leave the line first, at least one; `running` how many sequences run. Every
        time one of them ends, one leaves the line: a request takes its prompt's share of prefill, in which
        the others stand still, and its answer's share of steps, which it has in common with the others.
        """
        prefill, decode, prompt, completion = self.report()
        if prefill is None or decode is None or prompt is None or completion is None:
            return UNKNOWN_RETRY_MS
        milliseconds = 1000 * max(places, 1) * (prompt / prefill + completion / decode / max(running, 1))
        return round(min(max(milliseconds, MIN_RETRY_MS), MAX_RETRY_MS))

    def report(self) -> ForecastReport:
        """Return what was measured."""
        return ForecastReport(self._prefill.value, self._decode.value, self._prompt, self._completion)


class _Rate:
    """Amount per second: a ratio of sums in which the past fades, so long measurements count for more."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0
        self.value: float | None = None

    def note(self, amount: int, seconds: float) -> None:
        self._amount += amount - _WEIGHT_OF_NEW * self._amount
        self._seconds += seconds - _WEIGHT_OF_NEW * self._seconds
        self.value = self._amount / self._seconds


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT_OF_NEW * (new - old)
