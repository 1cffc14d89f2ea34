"""stats: one document about everything."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from .base import Result
from .lifecycle import EngineState
from .models import ModelInfo

PressureLevel = Annotated[
    Literal["none", "caches", "models", "requests"],
    Meta(
        title="PressureLevel",
        description="What is given up, in this order, while memory is short: caches, idle models, and then "
        "new requests are refused.",
    ),
]


class NativeComponent(Result):
    """What every native component reports: whether it works now, and if not, why."""

    active: bool
    reason: str | UnsetType = UNSET


class BlasStats(NativeComponent):
    """`calls` counts matrix products that MLX made through the faster library."""

    library: str | UnsetType = UNSET
    threads: int | UnsetType = UNSET
    calls: int | UnsetType = UNSET


class PagesStats(NativeComponent):
    """`queries` counts residency questions answered since the start."""

    queries: int | UnsetType = UNSET


class PulseStats(NativeComponent):
    """`answered` counts pings answered without Python; `overtook` those that overtook what came before."""

    answered: int | UnsetType = UNSET
    overtook: int | UnsetType = UNSET


class NativeStats(Result):
    """One entry per native component: whether it is `active`, and if not, the `reason`."""

    blas: BlasStats
    pages: PagesStats
    pulse: PulseStats


class PressureStats(Result):
    """What is given up now because memory is short, why, and how often each was since the start.

    `restored` counts how often the shortage has passed.
    """

    level: PressureLevel
    caches: int
    models: int
    requests: int
    restored: int
    reason: str | UnsetType = UNSET


class MemoryStats(Result):
    """Of the process and the machine (by the operating system) and of MLX (by its allocator), in bytes.

    Whatever comes into memory is let in as long as all of this stays within `budgetBytes`: `weightsBytes`,
    what the models and adapters take, `loadingBytes`, what those that are being loaded will take, or wait to
    take while requests end, and `reservedBytes`, what the requests that were let in will take at their full
    length. MLX keeps unused buffers up to `cacheLimitBytes`, never more than nobody else has a claim on.
    `wiredLimitBytes` is what Metal keeps from being paged out; 0 is off. All of them are absent until MLX
    has started.
    """

    resident_bytes: int
    peak_resident_bytes: int
    mlx_active_bytes: int
    mlx_cache_bytes: int
    mlx_peak_bytes: int
    pressure: PressureStats
    available_bytes: int | UnsetType = UNSET
    budget_bytes: int | UnsetType = UNSET
    weights_bytes: int | UnsetType = UNSET
    loading_bytes: int | UnsetType = UNSET
    reserved_bytes: int | UnsetType = UNSET
    cache_limit_bytes: int | UnsetType = UNSET
    wired_limit_bytes: int | UnsetType = UNSET


class ResidencyStats(Result):
    """Models in and out of memory since the start.

    `evicted` made room for others, `expired` were unused for their `ttlMs`, `broughtBack` came back because a
    request asked for them.
    """

    evicted: int
    expired: int
    brought_back: int


class PredictionStats(Result):
    """Models brought back before they were asked for, by the pattern of the requests so far.

    A prediction is a hit if the request came while it was expected; `hitRate` is hits of all decided.
    """

    active: bool
    predictions: int
    hits: int
    misses: int
    reason: str | UnsetType = UNSET
    hit_rate: float | UnsetType = UNSET


class RequestStats(Result):
    """Generations since the start. `shared` counts those that followed an identical one.

    `overloaded` and `deadlineExceeded` count those that ended with the error of that name; they are among
    the `failed`.
    """

    started: int
    finished: int
    cancelled: int
    failed: int
    shared: int
    overloaded: int
    deadline_exceeded: int


class TokenStats(Result):
    """Tokens since the start."""

    prompt: int
    completion: int


class WaitingStats(Result):
    """Sequences that wait to be let in, by their priority."""

    critical: int
    high: int
    normal: int
    low: int


class EngineStats(Result):
    """The inference thread. `steps` counts decode steps so far.

    Of the `sequences` that there are now some are `waiting`, some `prefilling`, and the others `running`:
    these are decoded in `decodeGroups` of like length. `device` and what follows are absent until MLX has
    started, which took `startMs`.
    """

    state: EngineState
    steps: int
    sequences: int
    waiting: WaitingStats
    prefilling: int
    running: int
    decode_groups: int
    device: str | UnsetType = UNSET
    mlx_version: str | UnsetType = UNSET
    start_ms: float | UnsetType = UNSET


class StatsResult(Result):
    """What the sidecar is doing and holding; cheap enough to poll."""

    uptime_ms: float
    memory: MemoryStats
    requests: RequestStats
    tokens: TokenStats
    engine: EngineStats
    models: list[ModelInfo]
    residency: ResidencyStats
    prediction: PredictionStats
    native: NativeStats
