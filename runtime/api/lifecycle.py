"""initialize, ping, shutdown."""

import time
from collections.abc import Awaitable, Callable

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import InvalidRequest

from ..engine.thread import InferenceThread
from ..server.connection import Call, Connection
from ..server.handshake import accept


class LifecycleApi:
    """What a peer says first, last, and to see if we are alive."""

    def __init__(self, engine: InferenceThread, watch_host: Callable[[int], None], started_at: float) -> None:
        self._engine = engine
        self._watch_host = watch_host
        self._started_at = started_at

    def initialize(self, params: m.InitializeParams, call: Call) -> m.InitializeResult:
        """Open the connection and let MLX begin to load behind the answer.

        Raises:
            InvalidRequest: the connection is open already.
            InvalidParams: the client speaks another version.
        """
        if call.connection.initialized:
            raise InvalidRequest("This connection is initialized already. Send 'initialize' once.")
        result = accept(params)
        self.opened(call.connection, params)
        # Importing MLX takes the interpreter for itself, for longer than this answer may.
        call.after_answer = self._engine.start
        return result

    def opened(self, connection: Connection, params: m.InitializeParams) -> None:
        """Note that `initialize` was accepted on this connection."""
        connection.initialized = True
        if params.process_id is not None:
            self._watch_host(params.process_id)

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
