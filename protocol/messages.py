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
ProgressToken = Annotated[
    Annotated[int, Meta(ge=-SAFE_INTEGER, le=SAFE_INTEGER)] | Annotated[str, Meta(max_length=256)],
    Meta(description="Names a stream: a request that has one is answered by `$/progress` with it."),
]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]

# What has a title here is a type with a name in the schema too.
FinishReason = Annotated[
    Literal["stop", "length", "cancelled"],
    Meta(title="FinishReason", description="`length`: `maxTokens`, or the end of the model's context."),
]
EngineState = Annotated[
    Literal["starting", "ready", "failed", "stopping"],
    Meta(
        title="EngineState",
        description="`starting` until MLX runs; `failed` if it cannot run here, or can no longer; `stopping` "
        "when all that could be has been answered and the process is about to end.",
    ),
]
ModelState = Annotated[
    Literal["loading", "ready", "unloading", "unloaded"],
    Meta(title="ModelState", description="Requests for a model that is `loading` wait for it."),
]
DtypeRequest = Annotated[
    Literal["auto", "stored", "float32", "float16", "bfloat16"],
    Meta(title="DtypeRequest", description="`auto` is `stored`, except where that is far slower."),
]
PriorityClass = Annotated[
    Literal["critical", "high", "normal", "low"],
    Meta(title="PriorityClass", description="Who goes first; one that is passed over for long rises."),
]


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


class FlowControl(Params):
    """Asks for paced streams: text beyond `windowBytes` that no `$/streamAck` has confirmed is held back.

    What is held back is merged, never dropped, and the end of a stream does not wait for the window.
    """

    window_bytes: Annotated[int, Meta(ge=1, le=SAFE_INTEGER)]


class InitializeParams(Params):
    """Who is calling, and what it can do.

    `protocolVersion` is the one that the client speaks; one that the server does not is refused. `processId`
    is the process to end with: when it is gone, so is a sidecar that serves it alone. No `capabilities` of
    clients are known yet; they are ignored.
    """

    protocol_version: int
    client_info: ClientInfo | UnsetType = UNSET
    process_id: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    capabilities: dict[str, Any] = {}
    flow_control: FlowControl | None = None


class ServerInfo(Result):
    """Name and version of this server."""

    name: str
    version: str


class Limits(Result):
    """Bounds that a client can rely on.

    `maxFrameBytes` holds for what the server reads, `maxSentFrameBytes` for what it writes. Of one connection
    `maxInFlight` requests may wait for their answers; one more is `overloaded`. A stream with
    more than `maxUnsentBytes` waiting for a connection that does not read ends with `slow_consumer`; beyond
    twice that the connection ends.
    """

    max_frame_bytes: int
    max_sent_frame_bytes: int
    max_batch_members: int
    max_in_flight: int
    max_unsent_bytes: int


class InitializeResult(Result):
    """`protocolVersion` is the one that will be spoken. `capabilities` maps a feature to true.

    A feature that is not there is not supported. `instanceId` tells this process from one that ran before it.
    """

    protocol_version: int
    server_info: ServerInfo
    capabilities: dict[str, bool]
    limits: Limits
    instance_id: str


class ServerInfoResult(InitializeResult):
    """What `initialize` would answer, and the process behind it."""

    process_id: int
    platform: str
    state: EngineState
    uptime_ms: float


class PingResult(Result):
    """How the server is.

    `inFlight` counts the other requests of this connection. `lastStepAgeMs` is the time since the engine last
    made progress; null when it is idle.
    """

    state: EngineState
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
    """Where the time of a load went, in milliseconds; `runtimeMs` is the wait for MLX itself to start."""

    runtime_ms: float
    weights_ms: float
    warmup_ms: float


class LoadResult(Result):
    """A model that is ready. `dtype` is the precision it runs in; `reason` says why, where that is not plain.

    `parameters` counts its weights, `bytes` is the memory that they take, `vocabulary` counts its token ids.
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


class Batching(Result):
    """Whether sequences of a model are decoded together. If not, they take turns, and `reason` says why."""

    active: bool
    reason: str | UnsetType = UNSET


class CompiledSteps(Result):
    """Whether decode steps are compiled whole. If not, `reason` says why the code runs as it stands."""

    active: bool
    reason: str | UnsetType = UNSET


class ModelInfo(Result):
    """One line of `models`; the numbers are absent until the model is ready. `inUse` counts its requests.

    `batching` and `compiledSteps` stand in `stats` only; the first is about what has been tried so far.
    """

    model: str
    state: ModelState
    in_use: int
    dtype: str | UnsetType = UNSET
    parameters: int | UnsetType = UNSET
    context_length: int | UnsetType = UNSET
    bytes: int | UnsetType = UNSET
    batching: Batching | UnsetType = UNSET
    compiled_steps: CompiledSteps | UnsetType = UNSET


class ModelsResult(Result):
    """Models in memory, in the order they were loaded."""

    models: list[ModelInfo]


# -- generate --


class Message(Params):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text


Messages = Annotated[
    list[Message],
    Meta(min_length=1, max_length=65536, description="Goes through the model's chat template."),
]
LogitBias = Annotated[
    dict[int, Annotated[float, Meta(ge=-1000, le=1000)]],
    Meta(
        max_length=65536,
        description="By the id of a token: what is added to its logit.",
        extra_json_schema={"propertyNames": {"pattern": "^[0-9]+$"}},
    ),
]
Seed = Annotated[
    Annotated[int, Meta(ge=0, le=SAFE_INTEGER)] | None,
    Meta(description="The same seed gives the same text, whatever else runs; null is another one each time."),
]
StopTexts = Annotated[
    StopString | Annotated[list[StopString], Meta(max_length=16)],
    Meta(description="The answer ends before the first of these texts."),
]
StopTokenIds = Annotated[
    list[TokenId],
    Meta(max_length=256, description="The answer ends before the first of these tokens."),
]
LogProbCount = Annotated[
    Annotated[int, Meta(ge=0, le=20)] | None,
    Meta(
        description="Whether to say how likely each token was, and how many of the likeliest to name with it."
    ),
]
DeadlineMs = Annotated[
    Annotated[int, Meta(ge=1, le=2**31 - 1)] | None,
    Meta(description="From the request's arrival to the end of its answer; then it is `deadline_exceeded`."),
]
Deduplicate = Annotated[
    bool, Meta(description="Whether work that is under way for an identical request may be shared.")
]


class GenerateParams(Params):
    """One of `messages`, `prompt`, `tokens`, and how to sample.

    Sampling follows this order: repetition, presence and frequency penalties, logit bias, temperature, then
    top-k, top-p and min-p on the tempered distribution. `temperature` 0 takes the likeliest token, whatever
    the truncations say. The repetition penalty looks at prompt and answer, the other two at the answer only.

    None of `priority`, `deadlineMs`, `deduplicate` and `logProbs` changes the answer.
    """

    model: ModelName
    messages: Messages | UnsetType = UNSET
    prompt: Annotated[Text, Meta(description="Is continued as it stands.")] | UnsetType = UNSET
    tokens: Annotated[TokenIds, Meta(description="A prompt as ids.")] | UnsetType = UNSET
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1, description="The longest answer.")] = 1024
    temperature: Annotated[float, Meta(ge=0, le=100, description="0 is greedy.")] = 0.0
    top_p: Annotated[float, Meta(ge=0, le=1, description="1 is off.")] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1, description="0 is off.")] = 0
    min_p: Annotated[float, Meta(ge=0, le=1, description="0 is off.")] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100, description="1 is off.")] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-100, le=100, description="0 is off.")] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100, description="0 is off.")] = 0.0
    logit_bias: LogitBias = {}
    seed: Seed = None
    stop: StopTexts = []
    stop_token_ids: StopTokenIds = []
    log_probs: LogProbCount = None
    priority: PriorityClass = "normal"
    deadline_ms: DeadlineMs = None
    deduplicate: Deduplicate = True
    partial_result_token: ProgressToken | UnsetType = UNSET


LogProb = Annotated[float | None, Meta(description="A natural logarithm; null is minus infinity.")]


class Candidate(Result):
    """A token that could have come, and the logarithm of its probability."""

    token: int
    log_prob: LogProb


class TokenLogProbs(Result):
    """The logarithm of the probability of the token that came; `top` holds the likeliest ones, in order.

    The probabilities are the model's own, before penalties, bias, temperature and truncation.
    """

    log_prob: LogProb
    top: list[Candidate]


class GenerateProgress(Result):
    """`value` of `$/progress`: text that became final, and the ids of the tokens it came from.

    `seq` counts from 1. While the connection is busy what follows is merged into one value: its `seq` is then
    that of the last part, and `merged` says how many parts there are. `logProbs` has one element for each of
    `tokens`, if the request asked for that.
    """

    seq: int
    text: str
    tokens: list[int]
    merged: int = 1
    log_probs: list[TokenLogProbs] | UnsetType = UNSET


class Usage(Result):
    """Token counts. An end-of-sequence or stop token is not counted as part of the answer."""

    prompt_tokens: int
    completion_tokens: int


class Timings(Result):
    """Measured where the work is done. `ttftMs` runs from the request's arrival to its first token.

    Of a request that shared the work of another only what was done after it came is counted.
    """

    queue_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms: float
    tokens_per_second: float


class GenerateResult(Result):
    """The end of a generation. `text`, `tokens` and `logProbs` stand here only when it was not streamed.

    When it was, `lastSeq` is the `seq` of the last progress (0 if there was none) and `textBytes` the length
    of all its text in UTF-8, so that a client can tell that it has everything. `shared` says that its tokens
    were not computed for it, but for an identical request that came before and was under way.
    """

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    text: str | UnsetType = UNSET
    tokens: list[int] | UnsetType = UNSET
    log_probs: list[TokenLogProbs] | UnsetType = UNSET
    last_seq: int | UnsetType = UNSET
    text_bytes: int | UnsetType = UNSET
    shared: bool = False


# -- tokens --


class TokenizeParams(Params):
    """One of `text` and `messages`. `addSpecialTokens` is for a text; a chat template brings its own."""

    model: ModelName
    text: Text | UnsetType = UNSET
    messages: Messages | UnsetType = UNSET
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


class PulseStats(NativeComponent):
    """`answered` counts pings answered without Python; `overtook` those that overtook what came before."""

    answered: int | UnsetType = UNSET
    overtook: int | UnsetType = UNSET


class NativeStats(Result):
    """One entry per native component: whether it is `active`, and if not, the `reason`."""

    blas: BlasStats
    pages: PagesStats
    pulse: PulseStats


class MemoryStats(Result):
    """Of the process (by the operating system) and of MLX (by its allocator), in bytes.

    Requests are let in as long as `weightsBytes`, what the models take, and `reservedBytes`, what those that
    were let in will take at their full length, stay within `budgetBytes`. All three are absent until MLX has
    started.
    """

    resident_bytes: int
    peak_resident_bytes: int
    mlx_active_bytes: int
    mlx_cache_bytes: int
    mlx_peak_bytes: int
    budget_bytes: int | UnsetType = UNSET
    weights_bytes: int | UnsetType = UNSET
    reserved_bytes: int | UnsetType = UNSET


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
    native: NativeStats


# -- notifications --


class CancelParams(Params):
    """The id of the request to cancel; one that is not in flight is ignored."""

    id: int | str


class StreamAckParams(Params):
    """`seq` is the last that was dealt with; acks are absolute, so a lost one is healed by the next."""

    token: ProgressToken
    seq: Annotated[int, Meta(ge=0, le=SAFE_INTEGER)]


class ProgressParams(Result):
    """`token` is the `partialResultToken` of the request that this belongs to."""

    token: int | str
    value: GenerateProgress
