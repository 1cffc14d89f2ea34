"""What a side is asked and what it answers, one line of JSON each.

Times are milliseconds since the round began, as the client of that side saw them.
"""

from msgspec import Struct


class Request(Struct, rename="camel"):
    """One stream to be asked for. A side takes the ids or the text, which mean the same.

    With `after_tokens` it begins when every stream without has so many tokens.
    """

    tokens: list[int]
    text: str
    max_tokens: int
    after_tokens: int = 0


class Round(Struct, rename="camel"):
    """What is asked at once. `how` chooses among the ways of a side that has several."""

    requests: list[Request]
    how: str = ""


class Answer(Struct, rename="camel"):
    """One stream. A part is what came at once: when, and how many tokens; `ids` where the side tells them."""

    sent: float
    parts: list[tuple[float, int]]
    ids: list[int] = []
    text: str | None = None

    @property
    def tokens(self) -> int:
        """Return how many tokens came."""
        return sum(count for _, count in self.parts)


class Ready(Struct, rename="camel"):
    """What a side says when it is ready.

    `pid` is the process that holds the model, `first_token_ms` the time from its start to the first token of
    the request it was started with, `gflops` and `blas_threads` what its matrix products are made with.
    """

    pid: int
    load_ms: float | None = None
    first_token_ms: float | None = None
    gflops: float | None = None
    blas_threads: int | None = None
