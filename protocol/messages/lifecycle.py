"""Opening a connection, and signs of life."""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from ..jsonrpc import SAFE_INTEGER
from .base import Params, Result

EngineState = Annotated[
    Literal["starting", "ready", "failed", "stopping"],
    Meta(
        title="EngineState",
        description="`starting` until MLX runs; `failed` if it cannot run here, or can no longer; `stopping` "
        "when all that could be has been answered and the process is about to end.",
    ),
]


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
