"""Every message type. Params are closed (an unknown member is an error); results and notifications are open.

On the wire names are camelCase. Durations are milliseconds (`...Ms`), sizes are bytes (`...Bytes`), ids of
tokens are positions in the model's vocabulary.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from .jsonrpc import SAFE_INTEGER

PROTOCOL_VERSION = 1

Text = Annotated[str, Meta(max_length=16 * 1024 * 1024)]
ModelName = Annotated[str, Meta(min_length=1, max_length=4096)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(max_length=4 * 1024 * 1024)]
ProgressToken = Annotated[int, Meta(ge=-SAFE_INTEGER, le=SAFE_INTEGER)] | Annotated[str, Meta(max_length=256)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
FinishReason = Literal["stop", "length", "cancelled"]
ModelState = Literal["loading", "ready", "unloading", "unloaded"]
DtypeRequest = Literal["auto", "stored", "float32", "float16", "bfloat16"]


class Params(Struct, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """Base of what a client sends."""


class Result(Struct, rename="camel", kw_only=True, omit_defaults=True):
    """Base of what the server sends; clients ignore members they do not know."""


class NoParams(Params):
    """A method without parameters."""


# -- lifecycle --


class ClientInfo(Params):
    """Who is calling; used in the log only."""

    name: Annotated[str, Meta(max_length=256)]
    version: Annotated[str, Meta(max_length=256)] | UnsetType = UNSET


class InitializeParams(Params):
    """The first request of every connection."""

    protocol_version: int
    client_info: ClientInfo | UnsetType = UNSET
    process_id: Annotated[int, Meta(ge=1, le=SAFE_INTEGER)] | None = None
    capabilities: dict[str, Any] = {}


class ServerInfo(Result):
    """Name and version of this server."""

    name: str
    version: str


class Limits(Result):
    """Bounds that a client can rely on."""

    max_frame_bytes: int


class InitializeResult(Result):
    """`protocolVersion` is the one that will be spoken. `capabilities` maps a feature to true."""

    protocol_version: int
    server_info: ServerInfo
    capabilities: dict[str, bool]
    limits: Limits
    instance_id: str


class PingResult(Result):
    """`lastStepAgeMs` is the time since the engine last made progress; null when it is idle."""

    state: Literal["starting", "ready", "failed", "stopping"]
    uptime_ms: float
    in_flight: int
    last_step_age_ms: float | None


# -- models --


class LoadParams(Params):
    """`model` is a name that `mlx-sidecar pull` brought, an absolute folder, or an id in the hub's cache."""

    model: ModelName
    dtype: DtypeRequest = "auto"


class PagesReport(Result):
    """How much of the model's weight files the page cache already held when loading began."""

    resident_bytes: int
    total_bytes: int


class LoadPhases(Result):
    """Where the time of a load went, in milliseconds."""

    runtime_ms: float
    weights_ms: float
    warmup_ms: float


class LoadResult(Result):
    """A model that is ready. `reason` says why `dtype` is not the stored one, where it is not.

    `bytes` is the memory of the weights; `runtimeMs` counts the wait for MLX itself to start.
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


class UnloadParams(Params):
    """`model` as it was named in `load`. Without `force` an unload waits for the model's requests."""

    model: ModelName
    force: bool = False


class UnloadResult(Result):
    """The model's memory has been given back."""

    model: str
    state: ModelState


class ModelInfo(Result):
    """One line of `models`; the numbers are absent until the model is ready."""

    model: str
    state: ModelState
    in_use: int
    dtype: str | UnsetType = UNSET
    parameters: int | UnsetType = UNSET
    context_length: int | UnsetType = UNSET
    bytes: int | UnsetType = UNSET


class ModelsResult(Result):
    """Models in memory, in the order they were loaded."""

    models: list[ModelInfo]


# -- generate --


class Message(Params):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text


class GenerateParams(Params):
    """One of `messages`, `prompt`, `tokens`, and how to sample.

    Sampling follows this order: repetition, presence and frequency penalties, logit bias, temperature, then
    top-k, top-p and min-p on the tempered distribution. `temperature` 0 takes the likeliest token, whatever
    the truncations say. The repetition penalty looks at prompt and answer, the other two at the answer only.
    """

    model: ModelName
    messages: Annotated[list[Message], Meta(min_length=1, max_length=65536)] | UnsetType = UNSET
    prompt: Text | UnsetType = UNSET
    tokens: TokenIds | UnsetType = UNSET
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 1024
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    logit_bias: Annotated[dict[int, Annotated[float, Meta(ge=-1000, le=1000)]], Meta(max_length=65536)] = {}
    seed: Annotated[int, Meta(ge=0, le=SAFE_INTEGER)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] = []
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] = []
    partial_result_token: ProgressToken | UnsetType = UNSET


class GenerateProgress(Result):
    """`value` of `$/progress`: text that became final, and the ids of the tokens it came from."""

    seq: int
    text: str
    tokens: list[int]


class Usage(Result):
    """Token counts. An end-of-sequence or stop token is not counted as part of the answer."""

    prompt_tokens: int
    completion_tokens: int


class Timings(Result):
    """Measured where the work is done. `ttftMs` runs from the request's arrival to its first token."""

    queue_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms: float
    tokens_per_second: float


class GenerateResult(Result):
    """The end of a generation. `text` and `tokens` stand here only when it was not streamed."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    text: str | UnsetType = UNSET
    tokens: list[int] | UnsetType = UNSET
    last_seq: int | UnsetType = UNSET


# -- tokens --


class TokenizeParams(Params):
    """One of `text` and `messages`. Messages go through the model's chat template."""

    model: ModelName
    text: Text | UnsetType = UNSET
    messages: Annotated[list[Message], Meta(min_length=1, max_length=65536)] | UnsetType = UNSET
    add_special_tokens: bool = True


class TokenizeResult(Result):
    """Ids in the order of the text."""

    tokens: list[int]


class DetokenizeParams(Params):
    """Ids to turn into text; special tokens are left out unless asked for."""

    model: ModelName
    tokens: TokenIds
    skip_special_tokens: bool = True


class DetokenizeResult(Result):
    """Text of the ids; bytes that are not UTF-8 appear as U+FFFD."""

    text: str


# -- stats --


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


class NativeStats(Result):
    """One entry per native component."""

    blas: BlasStats
    pages: PagesStats


class MemoryStats(Result):
    """Of the process (by the operating system) and of MLX (by its allocator), in bytes."""

    resident_bytes: int
    peak_resident_bytes: int
    mlx_active_bytes: int
    mlx_cache_bytes: int
    mlx_peak_bytes: int


class RequestStats(Result):
    """Generations since the start."""

    started: int
    finished: int
    cancelled: int
    failed: int


class TokenStats(Result):
    """Tokens since the start."""

    prompt: int
    completion: int


class EngineStats(Result):
    """The inference thread. `device` is absent until MLX has started."""

    state: Literal["starting", "ready", "failed", "stopping"]
    steps: int
    sequences: int
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
    native: NativeStats


# -- notifications --


class CancelParams(Params):
    """The id of the request to cancel; one that is not in flight is ignored."""

    id: int | str


class ProgressParams(Result):
    """`token` is the `partialResultToken` of the request that this belongs to."""

    token: int | str
    value: GenerateProgress
