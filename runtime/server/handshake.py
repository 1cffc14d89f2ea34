"""`initialize`: what is said when a connection opens, and the greeting that can be given before all else.

Importing asyncio, uvloop and anyio takes longer than everything else before the first answer. A host that has
already said `initialize` when the process gets here need not wait for it. Whatever else it has said is left
for the connection, which knows how to answer it.
"""

import os
import select
import time
from typing import NamedTuple

from mlx_sidecar.protocol import jsonrpc
from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import InvalidParams
from mlx_sidecar.protocol.framing import MAX_INBOUND_FRAME_BYTES, Framing
from mlx_sidecar.protocol.methods import PARAMS_DECODERS
from mlx_sidecar.protocol.version import VERSION

from .stdio import Wire, write_all

INSTANCE_ID = f"{os.getpid()}-{time.time_ns():x}"
"""Tells this process from one that ran before it."""

_FIRST_READ_BYTES = 64 * 1024


class Greeting(NamedTuple):
    """`accepted` holds the params of an answered `initialize`; `unread` is for the connection."""

    unread: bytes
    accepted: m.InitializeParams | None

    @property
    def framing(self) -> Framing | None:
        """NDJSON if something has been answered in it, otherwise still to be found out."""
        return None if self.accepted is None else Framing.NDJSON


def accept(params: m.InitializeParams) -> m.InitializeResult:
    """Return the answer to `initialize`.

    Raises:
        InvalidParams: the client speaks another version.
    """
    if params.protocol_version != m.PROTOCOL_VERSION:
        raise InvalidParams("protocolVersion", f"this server speaks version {m.PROTOCOL_VERSION} only")
    return m.InitializeResult(
        protocol_version=m.PROTOCOL_VERSION,
        server_info=m.ServerInfo(name="mlx-sidecar", version=VERSION),
        capabilities={"streaming": True, "cancel": True},
        limits=m.Limits(max_frame_bytes=MAX_INBOUND_FRAME_BYTES),
        instance_id=INSTANCE_ID,
    )


def greet(wire: Wire) -> Greeting:
    """Answer an `initialize` that is waiting already; return at once if there is none."""
    waiting = select.poll()
    waiting.register(wire.read, select.POLLIN)
    if not waiting.poll(0):
        return Greeting(b"", None)
    data = os.read(wire.read, _FIRST_READ_BYTES)
    line, newline, rest = data.partition(b"\n")
    if not newline:
        return Greeting(data, None)
    try:
        request = jsonrpc.decode_request(line)
        if request.method != "initialize" or not isinstance(request.id, jsonrpc.RequestId):
            return Greeting(data, None)
        params = jsonrpc.decode_params(request.params, PARAMS_DECODERS["initialize"].decode)
        answer = jsonrpc.encode_result(request.id, accept(params))
        write_all(wire.write, answer + b"\n")
    except (jsonrpc.BadFrame, InvalidParams, OSError):
        # The connection finds the same, and says so.
        return Greeting(data, None)
    return Greeting(rest, params)
