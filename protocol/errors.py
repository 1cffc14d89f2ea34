"""Every error that can reach a client, in one place.

    SidecarError
    |-- ParseError              -32700  the frame is not JSON
    |-- InvalidRequest          -32600  JSON, but not a request that can be accepted
    |   |-- DuplicateId                 the id belongs to a request still in flight
    |   `-- ShuttingDown                it came after `shutdown`
    |-- MethodNotFound          -32601
    |-- InvalidParams           -32602  `data.path` names the parameter
    |-- InternalError           -32603  our fault, always
    |-- NotInitialized          -32002
    |-- RequestCancelled        -32800
    |-- ModelNotFound            1001   nothing by that name on this machine
    |-- ModelNotLoaded           1002   known perhaps, but not loaded now
    |-- InvalidModel             1003   there, but not a model that can be loaded
    |-- ContextOverflow          1004   the prompt does not fit the model's context
    |-- Unsupported              1005   understood, and not possible with this model
    |-- BackendUnavailable       1006   MLX cannot run on this machine
    |-- SlowConsumer             1007   the client does not read its stream
    |-- ResponseTooLarge         1008   the answer would be longer than a frame may be
    |-- Overloaded               1009   more is asked at once than will be taken
    |-- DeadlineExceeded         1010   its `deadlineMs` passed first, or would have
    |-- OutOfMemory              1011   it could never fit into the memory there is
    |-- GenerationFailed         1012   one answer cannot go on; its neighbours do
    |-- EngineFailed             1013   no answer can go on; the process ends
    |-- UnsafeModel              1014   its folder could run code, or leads out of itself
    |-- AdapterNotLoaded         1015   the model has no adapter of that name now
    |-- InvalidAdapter           1016   not an adapter that this model can use
    |-- Unloaded                 1017   its model or adapter was taken away by force
    `-- PullFailed               1018   the model could not be brought onto this machine

Codes follow JSON-RPC 2.0 and LSP where those define one; application errors are positive. A message says
what happened, whose fault it is and what to do. It never contains text of a library or a path of the
server: those go to the log. Clients switch on `data.kind`, never on the message.
"""

from typing import Any, ClassVar, Literal

import msgspec


class ErrorObject(msgspec.Struct, rename="camel", omit_defaults=True):
    """The `error` member of a response. `data` always holds `kind` and `retryable`."""

    code: int
    message: str
    data: dict[str, Any] | None = None


class SidecarError(Exception):
    """Base of everything below; `data` is added to the wire object's `data`."""

    code: ClassVar[int] = -32603
    kind: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **data: object) -> None:
        super().__init__(message)
        self.message = message
        self.data = data

    def to_wire(self) -> ErrorObject:
        """Return the error object as a client sees it."""
        data = {"kind": self.kind, "retryable": self.retryable, **self.data}
        return ErrorObject(code=self.code, message=self.message, data=data)


class ParseError(SidecarError):
    """The frame is not JSON. The client must encode it again; the connection goes on."""

    code, kind = -32700, "parse_error"

    def __init__(self) -> None:
        super().__init__("The frame is not valid JSON. Send one JSON-RPC object per frame, in UTF-8.")


class InvalidRequest(SidecarError):
    """Valid JSON that is not an acceptable JSON-RPC 2.0 request. The client's fault."""

    code, kind = -32600, "invalid_request"


class DuplicateId(InvalidRequest):
    """A second request uses an id that is still in flight; the first goes on untouched."""

    kind = "duplicate_id"

    def __init__(self, request_id: int | str) -> None:
        super().__init__(
            f"A request with id {request_id!r} is still in flight. Use a new id for every request.",
            id=request_id,
        )


class ShuttingDown(InvalidRequest):
    """The sidecar is going down and takes no more work."""

    kind, retryable = "shutting_down", True

    def __init__(self) -> None:
        super().__init__("The sidecar is shutting down. Start a new one and send the request there.")


class MethodNotFound(SidecarError):
    """No method of that name."""

    code, kind = -32601, "method_not_found"

    def __init__(self, method: str) -> None:
        super().__init__(f"There is no method {method[:100]!r}. Check the method table.", method=method[:100])


class InvalidParams(SidecarError):
    """A parameter is missing, unknown, of the wrong type or out of range; `path` names it."""

    code, kind = -32602, "invalid_params"

    def __init__(self, path: str, problem: str) -> None:
        path = path[:200]  # An unknown member may have any name.
        where = f"Parameter {path!r}" if path else "The parameters"
        super().__init__(f"{where}: {problem}. Correct the request and send it again.", path=path)
        self.path = path


class InternalError(SidecarError):
    """A defect of the sidecar. The log has the details; the request may be sent again."""

    code, kind, retryable = -32603, "internal_error", True

    def __init__(self) -> None:
        super().__init__(
            "The sidecar failed while handling this request. This is its own fault; "
            "its log says what happened. Other requests are not affected."
        )


class NotInitialized(SidecarError):
    """A request came before `initialize`."""

    code, kind = -32002, "not_initialized"

    def __init__(self) -> None:
        super().__init__("The first request must be 'initialize'. Send it and wait for the answer.")


class RequestCancelled(SidecarError):
    """The client cancelled this request. (`generate` ends with a normal result instead.)"""

    code, kind = -32800, "cancelled"

    def __init__(self) -> None:
        super().__init__("The request was cancelled, as asked.")


class ModelNotFound(SidecarError):
    """No model of that name is on this machine."""

    code, kind = 1001, "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"There is no model {model[:200]!r} on this machine. Run 'mlx-sidecar pull' for it, "
            "or name a model folder by its absolute path.",
            model=model[:200],
        )


class ModelNotLoaded(SidecarError):
    """The request names a model that is not loaded."""

    code, kind = 1002, "model_not_loaded"

    def __init__(self, model: str) -> None:
        super().__init__(f"Model {model[:200]!r} is not loaded. Call 'load' first.", model=model[:200])


class InvalidModel(SidecarError):
    """The folder is there but is not a model that can be loaded."""

    code, kind = 1003, "invalid_model"

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(f"Model {model[:200]!r} cannot be loaded: {problem}.", model=model[:200])


class ContextOverflow(SidecarError):
    """The prompt leaves no room for a token in the model's context."""

    code, kind = 1004, "context_overflow"

    def __init__(self, prompt_tokens: int, context_length: int) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens; the model's context holds {context_length}, answer "
            "included. Shorten the prompt.",
            promptTokens=prompt_tokens,
            contextLength=context_length,
        )


class Unsupported(SidecarError):
    """Understood, but not possible with this model or in this version."""

    code, kind = 1005, "unsupported"


class BackendUnavailable(SidecarError):
    """MLX could not be started on this machine."""

    code, kind = 1006, "backend_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "MLX could not be started on this machine. On Linux install the 'cpu' or the 'cuda' extra; "
            "the sidecar's log says what is missing."
        )


class SlowConsumer(SidecarError):
    """Too much of a stream waits for a client that does not read; the generation was ended."""

    code, kind, retryable = 1007, "slow_consumer", True

    def __init__(self, max_unsent_bytes: int) -> None:
        super().__init__(
            f"More than {max_unsent_bytes} bytes of this connection's streams were waiting to be read, so "
            "this one was ended. Read faster, or stream less at a time.",
            maxUnsentBytes=max_unsent_bytes,
        )


class ResponseTooLarge(SidecarError):
    """The answer is longer than `limits.maxSentFrameBytes`. Ask for less of it."""

    code, kind = 1008, "response_too_large"

    def __init__(self, max_sent_frame_bytes: int) -> None:
        super().__init__(
            f"The answer is longer than {max_sent_frame_bytes} bytes. Ask for a smaller part of it.",
            maxSentFrameBytes=max_sent_frame_bytes,
        )


class Overloaded(SidecarError):
    """Too many requests wait: this connection's (`maxInFlight`) or everybody's (`retryAfterMs`)."""

    code, kind, retryable = 1009, "overloaded", True

    def __init__(
        self,
        max_in_flight: int | None = None,
        *,
        retry_after_ms: int | None = None,
        short_of: Literal["places", "memory"] = "places",
    ) -> None:
        if retry_after_ms is None:
            super().__init__(
                f"{max_in_flight} requests of this connection are in flight. Wait until one has been "
                "answered.",
                maxInFlight=max_in_flight,
            )
        else:
            what = {
                "places": "As many requests as may be are waiting for the engine.",
                "memory": "The machine is short of memory, so no more requests are taken for now.",
            }
            super().__init__(
                f"{what[short_of]} Send this one again in {retry_after_ms} ms.",
                retryAfterMs=retry_after_ms,
            )


class DeadlineExceeded(SidecarError):
    """The answer was not complete `deadlineMs` after the request came, or could not have been."""

    code, kind = 1010, "deadline_exceeded"

    def __init__(self, deadline_ms: int, *, never_started: bool) -> None:
        how = "cannot begin" if never_started else "was not complete"
        super().__init__(
            f"The answer {how} within {deadline_ms} ms. Allow more time, ask for less, or for a higher "
            "priority.",
            deadlineMs=deadline_ms,
            neverStarted=never_started,
        )


class OutOfMemory(SidecarError):
    """It can never fit into the memory budget beside what must stay. Ask for less, or unload a model."""

    code, kind = 1011, "out_of_memory"

    def __init__(self, needed_bytes: int, available_bytes: int, *, model: str | None = None) -> None:
        if model is None:
            super().__init__(
                f"At its full length this request needs {needed_bytes} bytes of memory; beside the models "
                f"there are {available_bytes}. Shorten the prompt, lower maxTokens, or unload a model.",
                neededBytes=needed_bytes,
                availableBytes=available_bytes,
            )
        else:
            super().__init__(
                f"Model {model[:200]!r} needs {needed_bytes} bytes of memory; beside what must stay there "
                f"are {available_bytes}. Unload or unpin another model, allow a larger budget, or take a "
                "smaller model.",
                model=model[:200],
                neededBytes=needed_bytes,
                availableBytes=available_bytes,
            )


class GenerationFailed(SidecarError):
    """This answer cannot go on, and would fail again; the message says why. Its neighbours go on."""

    code, kind = 1012, "generation_failed"

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"The answer cannot go on: {problem}. {remedy}.")


class EngineFailed(SidecarError):
    """The device failed or stands still. The sidecar ends; send the request to the next one."""

    code, kind, retryable = 1013, "engine_failed", True

    def __init__(self) -> None:
        super().__init__(
            "The device failed, or has stood still for too long, and nothing can be generated any more. The "
            "sidecar ends now; start it again and send the request once more."
        )


class UnsafeModel(SidecarError):
    """The folder could run code of its own, or has files that lead out of it; it is not even looked into."""

    code, kind = 1014, "unsafe_model"

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(
            f"Model {model[:200]!r} is not loaded: {problem}. Nothing of a model is ever run; use a version "
            "without it.",
            model=model[:200],
        )


class AdapterNotLoaded(SidecarError):
    """The request names an adapter that its model does not have."""

    code, kind = 1015, "adapter_not_loaded"

    def __init__(self, model: str, adapter: str) -> None:
        super().__init__(
            f"Model {model[:200]!r} has no adapter {adapter!r}. Call 'loadAdapter' first.",
            model=model[:200],
            adapter=adapter,
        )


class InvalidAdapter(SidecarError):
    """The folder is not an adapter that this model can use."""

    code, kind = 1016, "invalid_adapter"

    def __init__(self, model: str, adapter: str, problem: str) -> None:
        super().__init__(
            f"Adapter {adapter!r} cannot be used with model {model[:200]!r}: {problem}.",
            model=model[:200],
            adapter=adapter,
        )


class Unloaded(SidecarError):
    """The model or adapter of this request was unloaded by force while it ran."""

    code, kind = 1017, "unloaded"

    def __init__(self, model: str, adapter: str | None = None) -> None:
        what = f"Model {model[:200]!r}" if adapter is None else f"Adapter {adapter!r}"
        data = {"model": model[:200]} | ({} if adapter is None else {"adapter": adapter})
        super().__init__(
            f"{what} was unloaded by force, and this request ended with it. Load it again to go on.", **data
        )


class PullFailed(SidecarError):
    """The model could not be brought onto this machine; the message says why."""

    code, kind = 1018, "pull_failed"

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(f"Model {model[:200]!r} could not be pulled: {problem}.", model=model[:200])
