"""Models and adapters: onto this machine, into memory, and out of it."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from ..jsonrpc import SAFE_INTEGER
from .base import ModelName, Params, ProgressToken, Result

ModelState = Annotated[
    Literal["queued", "loading", "ready", "draining", "unloading", "unloaded", "evicted", "failed"],
    Meta(
        title="ModelState",
        description="`queued` waits for its turn or for room, `draining` for the end of its requests. "
        "`evicted` made room for another: the next request brings it back. Requests for a model that is "
        "`queued`, `loading`, `draining` or `evicted` wait for it, in order.",
    ),
]
LoadPhase = Annotated[
    Literal["queued", "checking", "weights", "warmup"],
    Meta(title="LoadPhase", description="`queued` until it is its turn and there is room."),
]
PullPhase = Annotated[
    Literal["fetching", "checking", "importing"],
    Meta(title="PullPhase", description="`importing` turns a file of another format into a model folder."),
]
DtypeRequest = Annotated[
    Literal["auto", "stored", "float32", "float16", "bfloat16"],
    Meta(title="DtypeRequest", description="`auto` is `stored`, except where that is far slower."),
]
Alias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=256,
        description="Another name that requests may use for a model, and that can be moved to another one.",
    ),
]
AdapterName = Annotated[
    str, Meta(min_length=1, max_length=256, description="What requests call a LoRA adapter of a model.")
]
Revision = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=256,
        description="Branch, tag or commit of a hub model; the model is then called `model@revision`.",
    ),
]
TtlMs = Annotated[
    Annotated[int, Meta(ge=0, le=SAFE_INTEGER)] | None,
    Meta(description="Unused for so long the model leaves memory, until it is asked for; null is never."),
]


class LoadParams(Params):
    """`model` is a name that `mlx-sidecar pull` brought, an absolute folder, or an id in the hub's cache.

    To a model that is loaded already `alias`, `pin` and `ttlMs` apply as to a new one. A model that has a
    `pin` is never evicted. `ttlMs` is the server's setting unless it is given.
    """

    model: ModelName
    revision: Revision | UnsetType = UNSET
    alias: Alias | UnsetType = UNSET
    dtype: DtypeRequest = "auto"
    pin: bool | UnsetType = UNSET
    ttl_ms: TtlMs | UnsetType = UNSET
    partial_result_token: ProgressToken | UnsetType = UNSET


class LoadProgress(Result):
    """`value` of `$/progress` for `load` and `reload`: how far it is. The newest replaces those before it.

    `seq` counts from 1. Of the `weights` so many bytes and tensors are in memory; `remainingMs` is a guess by
    the pace so far.
    """

    seq: int
    phase: LoadPhase
    done_bytes: int
    total_bytes: int
    tensors: int
    total_tensors: int
    remaining_ms: float | UnsetType = UNSET


class PagesReport(Result):
    """How much of the model's weight files the page cache already held when loading began."""

    resident_bytes: int
    total_bytes: int


class LoadPhases(Result):
    """Where the time of a load went, in milliseconds; `runtimeMs` is the wait for MLX itself to start."""

    runtime_ms: float
    weights_ms: float
    warmup_ms: float


class LoadResult(Result):
    """A model that is ready, under the name `model`.

    `dtype` is the precision it runs in; `reason` says why, where that is not plain. `parameters` counts its
    weights, `bytes` is the memory that they take, `vocabulary` counts its token ids.
    """

    model: str
    state: ModelState
    dtype: str
    parameters: int
    context_length: int
    vocabulary: int
    bytes: int
    load_ms: float
    phases: LoadPhases
    reason: str | UnsetType = UNSET
    pages: PagesReport | UnsetType = UNSET


class ReloadParams(Params):
    """`model` is the name or an alias of a loaded one."""

    model: ModelName
    partial_result_token: ProgressToken | UnsetType = UNSET


class AliasParams(Params):
    """`model` is the loaded model that `alias` stands for from now on; null takes the alias away."""

    alias: Alias
    model: ModelName | None


class AliasResult(Result):
    """What the alias stands for now, and what it stood for before; null is nothing."""

    alias: str
    model: str | None
    previous: str | None


class UnloadParams(Params):
    """`model` as it was named in `load`, or an alias. Without `force` an unload waits for its requests.

    With `force` they end with the error `unloaded`; so do those of an unload that waits already.
    """

    model: ModelName
    force: bool = False


class UnloadResult(Result):
    """The model's memory has been given back."""

    model: str
    state: ModelState


class PullParams(Params):
    """`model` is a name that `mlx-sidecar list` knows, or an id of the hub."""

    model: ModelName
    revision: Revision | UnsetType = UNSET
    partial_result_token: ProgressToken | UnsetType = UNSET


class PullProgress(Result):
    """`value` of `$/progress` for `pull`: how far it is. The newest replaces those before it.

    `seq` counts from 1; `remainingMs` is a guess by the pace so far.
    """

    seq: int
    phase: PullPhase
    done_bytes: int
    total_bytes: int
    remaining_ms: float | UnsetType = UNSET


class PullResult(Result):
    """A model that is on this machine now and can be loaded. `bytes` is what its files take."""

    model: str
    bytes: int
    revision: str | UnsetType = UNSET


class LoadAdapterParams(Params):
    """`path` is the absolute path of a folder with a LoRA adapter, of mlx-lm or PEFT.

    `adapter` is the name that requests will use, and must not be loaded already.
    """

    model: ModelName
    adapter: AdapterName
    path: ModelName


class AdapterInfo(Result):
    """An adapter that is loaded: its rank, the bytes it takes, and how many requests use it."""

    adapter: str
    rank: int
    bytes: int
    in_use: int


class LoadAdapterResult(AdapterInfo):
    """The adapter is ready. `modules` counts the projections that it changes."""

    model: str
    modules: int
    load_ms: float


class UnloadAdapterParams(Params):
    """Without `force` an unload waits for the requests that use the adapter; with it they end, `unloaded`."""

    model: ModelName
    adapter: AdapterName
    force: bool = False


class UnloadAdapterResult(Result):
    """The adapter's memory has been given back."""

    model: str
    adapter: str


class ModelFailure(Result):
    """Why the last load failed: the error that was answered, by its `kind`."""

    kind: str
    message: str


class Batching(Result):
    """Whether sequences of a model are decoded together. If not, they take turns, and `reason` says why."""

    active: bool
    reason: str | UnsetType = UNSET


class CompiledSteps(Result):
    """Whether decode steps are compiled whole. If not, `reason` says why the code runs as it stands."""

    active: bool
    reason: str | UnsetType = UNSET


class ModelInfo(Result):
    """One line of `models`. What is known once the model is ready is absent until then.

    `dtype` is the precision that it runs in, and `reason` why. `bytes` is what its weights take; `kvBytes`
    what the caches of its requests may grow to, `kvBytesPerToken` what each token adds, `prefillPeakBytes`
    what a step needs at most beyond both. `inUse` counts its requests now, `uses` all since it was first
    loaded, `loads` how often it came into memory, the last time in `loadMs`; it was last used `idleMs` ago.
    `failure` says why the last load failed.

    `batching` and `compiledSteps` stand in `stats` only; the first is about what has been tried so far.
    """

    model: str
    state: ModelState
    in_use: int
    uses: int
    loads: int
    pinned: bool
    aliases: list[str]
    adapters: list[AdapterInfo]
    ttl_ms: int | None
    idle_ms: float | UnsetType = UNSET
    dtype: str | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    parameters: int | UnsetType = UNSET
    context_length: int | UnsetType = UNSET
    bytes: int | UnsetType = UNSET
    kv_bytes: int | UnsetType = UNSET
    kv_bytes_per_token: int | UnsetType = UNSET
    prefill_peak_bytes: int | UnsetType = UNSET
    load_ms: float | UnsetType = UNSET
    failure: ModelFailure | UnsetType = UNSET
    batching: Batching | UnsetType = UNSET
    compiled_steps: CompiledSteps | UnsetType = UNSET


class ModelsResult(Result):
    """Models that were loaded, in that order, whether they are in memory now or not."""

    models: list[ModelInfo]
