"""What the engine is given and what it gives back; plain values, no MLX."""

import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from msgspec import Struct, field

from mlx_sidecar.protocol.errors import InternalError, SidecarError

from ..scheduling.priority import Priority

FinishReason = Literal["stop", "length", "cancelled", "failed"]


class Displaced(InternalError):
    """It had not begun, and its model has to leave memory first. It goes back to wait for the model."""


class Sampling(Struct, frozen=True):
    """How the next token is chosen; see `GenerateParams` for the meaning and order of each part."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0


class LogProbs(NamedTuple):
    """How likely the model found a token, as a natural logarithm, and the likeliest ones: ids, logarithms."""

    of_token: float
    top: list[tuple[int, float]]


class Sequence(Struct, eq=False):
    """One row in a batch: prompt ids, limits, sampling, and the times at which things happened to it.

    `log_probs` is how many likeliest tokens to name beside each one, None for no log-probabilities at all.

    Times are `time.monotonic()` seconds, written by the inference thread, and so are `tokens`, the answer so
    far, and `failure`, what went wrong if it ends as "failed". `on_emission` is called on the event loop.
    `owner` is whoever it competes for, in fair share. `adapter` is the name of the one it runs with, None for
    the model as it is.
    """

    model: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop_token_ids: frozenset[int]
    on_emission: Callable[["Emission"], None]
    priority: Priority = Priority.NORMAL
    owner: int = 0
    log_probs: int | None = None
    adapter: str | None = None
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    tokens: list[int] = field(default_factory=list[int])
    failure: SidecarError | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.tokens)

    @property
    def last_token(self) -> int:
        """The token that decoding goes on from."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]


class Emission(NamedTuple):
    """One thing that happened to a sequence in a step: a token, its end, or both."""

    sequence: Sequence
    token: int | None
    finish: FinishReason | None
    log_probs: LogProbs | None = None


class AdapterReport(NamedTuple):
    """An adapter that a model has: its share of the bytes that adapters take there, and its largest rank."""

    name: str
    nbytes: int
    rank: int


class BatchReport(NamedTuple):
    """One model at one moment: sequences by what is done with them, decode batches, and adapters.

    `why_alone` says why every sequence is a batch of its own, `why_not_compiled` why decode steps run by the
    model's code as it stands; None if there is no reason for that. Steps with an adapter are never compiled.
    """

    prefilling: int = 0
    running: int = 0
    groups: int = 0
    why_alone: str | None = None
    why_not_compiled: str | None = None
    adapters: tuple[AdapterReport, ...] = ()


class MemoryUse(NamedTuple):
    """MLX's allocator, in bytes, as of the last step; `cache_limit` is what unused buffers may take."""

    active: int = 0
    cached: int = 0
    peak: int = 0
    cache_limit: int = 0


class Device(NamedTuple):
    """What MLX runs on: "cpu", "metal" or "cuda". `wired_limit_bytes` is Metal's; None elsewhere."""

    kind: str
    mlx_version: str
    start_ms: float
    wired_limit_bytes: int | None = None
