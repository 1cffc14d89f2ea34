"""The one table of methods: what each takes and gives, and how it can fail."""

from typing import Any

from msgspec import Struct
from msgspec.json import Decoder

from . import errors as e
from . import messages as m

ErrorTypes = tuple[type[e.SidecarError], ...]

_LOADING: ErrorTypes = (
    e.ModelNotFound,
    e.InvalidModel,
    e.UnsafeModel,
    e.OutOfMemory,
    e.BackendUnavailable,
    e.EngineFailed,
)
"""A model may have to be brought back into memory for any request that names it."""


class Method(Struct, frozen=True):
    """A request method. `result` None means the answer is null; a `dict` is a document of its own schema.

    `errors` are those that only some methods have; a broken frame, wrong parameters and an internal error can
    happen to all, and an answer that is too large or a cancel to all that need the connection to be open.
    `progress` is the type of the values that a `partialResultToken` asks for.
    """

    name: str
    doc: str
    params: type[m.Params]
    result: type[m.Result] | type[dict[str, Any]] | None
    errors: ErrorTypes = ()
    progress: type[m.Result] | None = None
    before_initialize: bool = False
    in_batch: bool = True


class Notification(Struct, frozen=True):
    """A message without an answer."""

    name: str
    doc: str
    params: type[Struct]


METHODS = {
    method.name: method
    for method in (
        Method(
            "initialize",
            "Opens the connection; the first request, sent once. Answered before MLX is even imported.",
            m.InitializeParams,
            m.InitializeResult,
            (e.InvalidRequest,),
            before_initialize=True,
            in_batch=False,
        ),
        Method(
            "ping",
            "Answers at once, whatever the engine is doing.",
            m.NoParams,
            m.PingResult,
            before_initialize=True,
        ),
        Method(
            "server/info",
            "Says what `initialize` would, without opening the connection: for probes.",
            m.NoParams,
            m.ServerInfoResult,
            before_initialize=True,
        ),
        Method(
            "rpc.discover",
            "Returns the OpenRPC document of this protocol.",
            m.NoParams,
            dict[str, Any],
            before_initialize=True,
        ),
        Method(
            "load",
            "Brings a model into memory, evaluates all of its weights and warms it up, while others go on. "
            "Where there is no room idle models leave memory, or those in use once they are idle; they come "
            "back when they are asked for. A model that is there already is answered at once.",
            m.LoadParams,
            m.LoadResult,
            (*_LOADING, e.Unloaded),
            progress=m.LoadProgress,
        ),
        Method(
            "reload",
            "Reads a loaded model anew, as its files are now, while the old one serves; then new requests go "
            "to the new one, and the old one leaves memory when its last request has ended. If that fails, "
            "the old one stays.",
            m.ReloadParams,
            m.LoadResult,
            (*_LOADING, e.ModelNotLoaded, e.Unloaded),
            progress=m.LoadProgress,
        ),
        Method(
            "unload",
            "Gives a model's memory back after its requests have ended; `force` ends them.",
            m.UnloadParams,
            m.UnloadResult,
            (e.ModelNotLoaded,),
        ),
        Method(
            "alias",
            "Gives a loaded model another name, moves that to another model, or takes it away. Requests that "
            "have come go on where they are.",
            m.AliasParams,
            m.AliasResult,
            (e.ModelNotLoaded,),
        ),
        Method("models", "Lists the models that were loaded, oldest first.", m.NoParams, m.ModelsResult),
        Method(
            "pull",
            "Brings a model onto this machine, as `mlx-sidecar pull` does. A cancel stops it; what has come "
            "by then need not come again.",
            m.PullParams,
            m.PullResult,
            (e.PullFailed,),
            progress=m.PullProgress,
        ),
        Method(
            "loadAdapter",
            "Brings a LoRA adapter into memory beside a loaded model, which goes on. Requests choose it by "
            "name; different ones run in one batch.",
            m.LoadAdapterParams,
            m.LoadAdapterResult,
            (e.ModelNotLoaded, e.InvalidAdapter, e.UnsafeModel, e.OutOfMemory, e.Unsupported, e.EngineFailed),
        ),
        Method(
            "unloadAdapter",
            "Gives an adapter's memory back after its requests have ended; `force` ends them.",
            m.UnloadAdapterParams,
            m.UnloadAdapterResult,
            (e.ModelNotLoaded, e.AdapterNotLoaded),
        ),
        Method(
            "generate",
            "Answers a prompt: whole, or streamed as `$/progress` if the request has a `partialResultToken`. "
            'A cancel ends it with a result, whose `finishReason` is "cancelled".',
            m.GenerateParams,
            m.GenerateResult,
            (
                e.ModelNotLoaded,
                e.AdapterNotLoaded,
                *_LOADING,
                e.ContextOverflow,
                e.Unsupported,
                e.SlowConsumer,
                e.DeadlineExceeded,
                e.GenerationFailed,
                e.Unloaded,
            ),
            progress=m.GenerateProgress,
        ),
        Method(
            "tokenize",
            "Turns a text, or messages in the model's chat template, into ids.",
            m.TokenizeParams,
            m.TokenizeResult,
            (e.ModelNotLoaded, *_LOADING, e.Unsupported),
        ),
        Method(
            "detokenize",
            "Turns ids into text.",
            m.DetokenizeParams,
            m.DetokenizeResult,
            (e.ModelNotLoaded, *_LOADING),
        ),
        Method(
            "stats",
            "Says what the sidecar is doing and holding; cheap enough to poll.",
            m.NoParams,
            m.StatsResult,
        ),
        Method(
            "shutdown",
            "Cancels this connection's requests and answers null once each has been answered. Nothing but "
            "`exit` may follow.",
            m.NoParams,
            None,
            (e.RequestCancelled,),
            before_initialize=True,
            in_batch=False,
        ),
    )
}

CLIENT_NOTIFICATIONS = {
    notification.name: notification
    for notification in (
        Notification(
            "$/cancelRequest",
            "Ends a request of this connection; an id that is not in flight is ignored.",
            m.CancelParams,
        ),
        Notification(
            "$/streamAck",
            "Confirms a stream up to a `seq`, where `initialize` asked for `flowControl`.",
            m.StreamAckParams,
        ),
        Notification(
            "exit",
            "Ends a sidecar that serves one host, with code 0 after `shutdown` and 1 without. On a socket "
            "that was listened on it ends the connection.",
            m.NoParams,
        ),
    )
}

SERVER_NOTIFICATIONS = {
    "$/progress": Notification(
        "$/progress",
        "A part of a streamed answer, or how far a load or a pull is. Each is sent before the response, and "
        "none after it.",
        m.ProgressParams,
    )
}

PARAMS_DECODERS: dict[str, Decoder[Any]] = {
    name: Decoder(entry.params) for name, entry in (METHODS | CLIENT_NOTIFICATIONS).items()
}
"""Building a decoder costs far more than using it, so each type has one."""
