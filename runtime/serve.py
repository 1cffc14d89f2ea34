"""`mlx-sidecar serve`: from a command line to a running app.

A host is answered before the app is even imported; see `server/peer`.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from msgspec import Struct
from msgspec.json import encode

from mlx_sidecar.config.layers import Effective, SettingsSource
from mlx_sidecar.config.settings import Settings
from mlx_sidecar.config.values import ConfigError
from mlx_sidecar.protocol.framing import Framing

from .server import exit_codes
from .server.stdio import Wire, claim_stdio

if TYPE_CHECKING:
    from .server.channel import Channel
    from .server.unix_socket import Listener


class Endpoint(Struct, frozen=True):
    """Whom to serve: the host at `pipe`, guests at `listen` or a passed socket, else the host at stdio."""

    pipe: Path | None = None
    listen: Path | None = None
    passed_socket: bool = False
    framing: Framing | None = None


def serve(source: SettingsSource, endpoint: Endpoint) -> NoReturn:
    """Serve until there is a reason to end, and end the process with its exit code."""
    # First of all: whatever an import prints must not reach the wire.
    wire = claim_stdio()
    # Until the event loop listens for it: an exception in the middle of an import could leave half a library.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)  # None if it was closed when we were started.
    exit_code = exit_codes.INTERNAL_ERROR
    try:
        exit_code = _serve(source, endpoint, wire)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        if isinstance(error, MemoryError):
            exit_code = exit_codes.OUT_OF_MEMORY
    # Not sys.exit: with native threads in the process the interpreter's teardown is a place to crash, and
    # everything that must be written has been.
    if "mlx_sidecar.runtime.telemetry.logs" in sys.modules:
        from .telemetry.logs import finish_log

        finish_log()
    sys.stderr.flush()
    os._exit(exit_code)


def _serve(source: SettingsSource, endpoint: Endpoint, wire: Wire) -> int:
    try:
        effective = source.read()
    except ConfigError as error:
        sys.stderr.write(f"mlx-sidecar: {error}\n")
        return exit_codes.USAGE
    from .server.channel import Channel

    if endpoint == Endpoint(framing=endpoint.framing):
        return _serve_host(effective, Channel(wire.read, wire.write), endpoint.framing)
    from .server.unix_socket import AlreadyServed, Listener, SocketError, connect

    try:
        if endpoint.pipe is not None:
            return _serve_host(effective, Channel.over(connect(endpoint.pipe)), endpoint.framing)
        listener = Listener.bind(endpoint.listen) if endpoint.listen else Listener.adopt(os.environ)
    except SocketError as error:
        sys.stderr.write(f"mlx-sidecar: {error}\n")
        return exit_codes.ALREADY_SERVED if isinstance(error, AlreadyServed) else exit_codes.USAGE
    try:
        return _serve_guests(effective, listener, endpoint.framing, _announcement(listener, wire))
    finally:
        listener.close()


def _serve_host(effective: Effective, channel: "Channel", framing: Framing | None) -> int:
    from .api.presence import PresenceApi
    from .server.peer import Peer
    from .telemetry.vitals import Vitals

    _start_log(effective.settings)
    vitals = Vitals()
    host = Peer(channel, PresenceApi(vitals).methods(), framing, vitals.pulses)
    host.greet()
    host.start()
    from .app import serve_host

    return serve_host(effective, vitals, host)


def _serve_guests(
    effective: Effective, listener: "Listener", framing: Framing | None, on_ready: Callable[[], None]
) -> int:
    from .app import serve_guests
    from .telemetry.vitals import Vitals

    _start_log(effective.settings)
    return serve_guests(effective, Vitals(), listener, framing, on_ready)


def _start_log(settings: Settings) -> None:
    from .telemetry.logs import start_log

    start_log(settings.log_level, settings.log_format)


def _announcement(listener: "Listener", wire: Wire) -> Callable[[], None]:
    """Return a function that tells whoever started us that clients may come; nothing else goes to stdout."""

    def announce() -> None:
        from .server.unix_socket import notify_ready

        line = encode({"event": "listening", "path": listener.address}) + b"\n"
        with suppress(OSError):  # Nobody may want to know.
            os.write(wire.write, line)
        os.close(wire.write)
        notify_ready(os.environ)

    return announce
