"""shutdown."""

from collections.abc import Awaitable

from mlx_sidecar.protocol import messages as m

from ..server.connection import Call


def shutdown(_: m.NoParams, call: Call) -> Awaitable[None]:
    """Cancel this connection's requests and answer when each has been answered; `exit` comes next."""
    call.on_cancel = lambda: None  # It is the end already.
    call.connection.cancel_all(but=call)
    return call.connection.settled(but=call)
