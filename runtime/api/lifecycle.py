"""initialize, ping, shutdown."""

import os
import time
from collections.abc import Awaitable, Callable

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import InvalidParams, InvalidRequest
from mlx_sidecar.protocol.framing import MAX_INBOUND_FRAME_BYTES
from mlx_sidecar.protocol.version import VERSION

from ..engine.thread import InferenceThread
from ..server.connection import Call


class LifecycleApi:
    """What a peer says first, last, and to see if we are alive."""

    def __init__(self, engine: InferenceThread, watch_host: Callable[[int], None], started_at: float) -> None:
        self._engine = engine
        self._watch_host = watch_host
        self._started_at = started_at
        self._instance_id = f"{os.getpid()}-{time.time_ns():x}"

    def initialize(self, params: m.InitializeParams, call: Call) -> m.InitializeResult:
        """Open the connection and let MLX begin to load behind the answer.

        Raises:
            InvalidRequest: the connection is open already.
            InvalidParams: the client speaks another version.
        """
        if call.connection.initialized:
            raise InvalidRequest("This connection is initialized already. Send 'initialize' once.")
        if params.protocol_version != m.PROTOCOL_VERSION:
            raise InvalidParams("protocolVersion", f"this server speaks version {m.PROTOCOL_VERSION} only")
        call.connection.initialized = True
        if params.process_id is not None:
            self._watch_host(params.process_id)
        # Importing MLX takes the interpreter for itself, for longer than this answer may.
        call.after_answer = self._engine.start
        return m.InitializeResult(
            protocol_version=m.PROTOCOL_VERSION,
            server_info=m.ServerInfo(name="mlx-sidecar", version=VERSION),
            capabilities={"streaming": True, "cancel": True},
            limits=m.Limits(max_frame_bytes=MAX_INBOUND_FRAME_BYTES),
            instance_id=self._instance_id,
        )

    def ping(self, _: m.NoParams, call: Call) -> m.PingResult:
        """Answer at once, whatever the engine is doing."""
        return m.PingResult(
            state=self._engine.state,
            uptime_ms=(time.monotonic() - self._started_at) * 1000,
            in_flight=call.connection.in_flight - 1,
            last_step_age_ms=self._engine.last_step_age_ms(),
        )

    def shutdown(self, _: m.NoParams, call: Call) -> Awaitable[None]:
        """Cancel this connection's requests and answer when each has been answered; `exit` comes next."""
        # At once, and not in the awaitable: what follows in the same write is already too late.
        call.connection.shut_down = True
        call.connection.cancel_all(but=call)
        return call.connection.settled(but=call)
