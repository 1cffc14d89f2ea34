"""initialize, ping, server/info, rpc.discover: what is answered on the reading thread, at any time.

Nothing here may wait or import anything heavy: these answers come before there is an event loop.
"""

import os
import platform
import time
from typing import Any

import msgspec

from mlx_sidecar.protocol import jsonrpc
from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import InvalidParams, InvalidRequest
from mlx_sidecar.protocol.framing import MAX_INBOUND_FRAME_BYTES, MAX_OUTBOUND_FRAME_BYTES
from mlx_sidecar.protocol.version import VERSION

from ..server.intake import Immediate, Intake
from ..server.outbox import MAX_UNSENT_BYTES
from ..telemetry.vitals import Vitals


class PresenceApi:
    """What a peer says first, and to see if we are alive."""

    def __init__(self, vitals: Vitals) -> None:
        self._vitals = vitals

    def methods(self) -> dict[str, Immediate]:
        """Return the handlers by the names of their methods."""
        return {
            "initialize": self.initialize,
            "ping": self.ping,
            "server/info": self.info,
            "rpc.discover": self.discover,
        }

    def initialize(self, params: m.InitializeParams, intake: Intake) -> m.InitializeResult:
        """Open the connection.

        Raises:
            InvalidRequest: it is open already.
            InvalidParams: the client speaks another version.
        """
        if intake.initialized:
            raise InvalidRequest("This connection is initialized already. Send 'initialize' once.")
        if params.protocol_version != m.PROTOCOL_VERSION:
            raise InvalidParams("protocolVersion", f"this server speaks version {m.PROTOCOL_VERSION} only")
        intake.open(params)
        return m.InitializeResult(**_IDENTITY)

    def ping(self, _: m.NoParams, intake: Intake) -> m.PingResult:
        """Answer, whatever the engine and the event loop are doing."""
        return m.PingResult(
            state=self._vitals.state,
            uptime_ms=self._vitals.uptime_ms(),
            in_flight=len(intake.in_flight),
            last_step_age_ms=self._vitals.last_step_age_ms(),
        )

    def info(self, _: m.NoParams, __: Intake) -> m.ServerInfoResult:
        """Say who we are."""
        return m.ServerInfoResult(
            **_IDENTITY,
            process_id=os.getpid(),
            platform=f"{platform.system()} {platform.machine()}",
            state=self._vitals.state,
            uptime_ms=self._vitals.uptime_ms(),
        )

    def discover(self, _: m.NoParams, __: Intake) -> msgspec.Raw:
        """Return the OpenRPC document."""
        from mlx_sidecar.protocol import openrpc

        return msgspec.Raw(openrpc.stored())


_LIMITS = m.Limits(
    max_frame_bytes=MAX_INBOUND_FRAME_BYTES,
    max_sent_frame_bytes=MAX_OUTBOUND_FRAME_BYTES,
    max_batch_members=jsonrpc.MAX_BATCH_MEMBERS,
    max_in_flight=jsonrpc.MAX_IN_FLIGHT,
    max_unsent_bytes=MAX_UNSENT_BYTES,
)

_IDENTITY: dict[str, Any] = {
    "protocol_version": m.PROTOCOL_VERSION,
    "server_info": m.ServerInfo(name="mlx-sidecar", version=VERSION),
    "capabilities": {"streaming": True, "cancel": True, "batch": True, "flowControl": True},
    "limits": _LIMITS,
    "instance_id": f"{os.getpid()}-{time.time_ns():x}",
}
