"""The one frame that answers a batch, sent when its last member has been answered."""

import threading
from collections.abc import Callable

from mlx_sidecar.protocol import jsonrpc
from mlx_sidecar.protocol.errors import ResponseTooLarge
from mlx_sidecar.protocol.framing import MAX_OUTBOUND_FRAME_BYTES

_REFUSAL_BYTES = 64 * 1024
"""Kept free for each member: for a refusal, even with a long id, there is always room."""


class BatchReply:
    """Collects `expected` responses, from any thread, and gives `send` the array of them."""

    def __init__(self, expected: int, send: Callable[[bytes], None]) -> None:
        self._expected = expected
        self._send = send
        self._lock = threading.Lock()
        self._responses: list[bytes] = []
        self._room = MAX_OUTBOUND_FRAME_BYTES - expected * (_REFUSAL_BYTES + 1) - 2

    def put(self, request_id: jsonrpc.RequestId | None, response: bytes) -> None:
        """Add a response; one that would make the frame too long is replaced by an error."""
        with self._lock:
            if len(response) > max(self._room, _REFUSAL_BYTES):
                response = jsonrpc.encode_outcome(request_id, ResponseTooLarge(MAX_OUTBOUND_FRAME_BYTES))
            self._room -= len(response) + 1
            self._responses.append(response)
            complete = len(self._responses) == self._expected
        if complete:
            self._send(b"[" + b",".join(self._responses) + b"]")
