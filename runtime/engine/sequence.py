"""What the engine is given and what it gives back; plain values, no MLX."""

import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from msgspec import Struct, field

FinishReason = Literal["stop", "length", "cancelled", "failed"]


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


class Sequence(Struct, eq=False):
    """One row in a batch: prompt ids, limits, sampling, and the times at which things happened to it.

    Times are `time.monotonic()` seconds, written by the inference thread. `on_emission` is called on the
    event loop.
    """

    model: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop_token_ids: frozenset[int]
    on_emission: Callable[["Emission"], None]
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None


class Emission(NamedTuple):
    """One thing that happened to a sequence in a step: a token, its end, or both."""

    sequence: Sequence
    token: int | None
    finish: FinishReason | None


class MemoryUse(NamedTuple):
    """MLX's allocator, in bytes, as of the last step."""

    active: int = 0
    cached: int = 0
    peak: int = 0


class Device(NamedTuple):
    """What MLX runs on: "cpu", "metal" or "cuda"."""

    kind: str
    mlx_version: str
    start_ms: float
