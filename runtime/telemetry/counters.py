"""Totals since the start, kept on the event loop."""

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import DeadlineExceeded, Overloaded


class Counters:
    """Generations and tokens."""

    def __init__(self) -> None:
        self.started = 0
        self.shared = 0
        self._finished = 0
        self._cancelled = 0
        self._failed = 0
        self._overloaded = 0
        self._deadline_exceeded = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0

    def count(self, result: m.GenerateResult) -> None:
        """Add a generation that ended."""
        if result.finish_reason == "cancelled":
            self._cancelled += 1
        else:
            self._finished += 1
        self._prompt_tokens += result.usage.prompt_tokens
        self._completion_tokens += result.usage.completion_tokens

    def count_failure(self, error: Exception) -> None:
        """Add a generation that ended with an error."""
        self._failed += 1
        self._overloaded += isinstance(error, Overloaded)
        self._deadline_exceeded += isinstance(error, DeadlineExceeded)

    def requests(self) -> m.RequestStats:
        """Return the totals of generations."""
        return m.RequestStats(
            started=self.started,
            finished=self._finished,
            cancelled=self._cancelled,
            failed=self._failed,
            shared=self.shared,
            overloaded=self._overloaded,
            deadline_exceeded=self._deadline_exceeded,
        )

    def tokens(self) -> m.TokenStats:
        """Return the totals of tokens."""
        return m.TokenStats(prompt=self._prompt_tokens, completion=self._completion_tokens)
