"""The clients of a server that listens: let in, watched, and seen off, each without regard to the others."""

import logging
import socket
import threading
from collections.abc import Callable

import anyio
from anyio.abc import TaskGroup

from mlx_sidecar.config.settings import Settings

from .channel import Channel
from .connection import Connection, OnEvent
from .peer import PeerEvent
from .unix_socket import Listener

log = logging.getLogger("server")

CANCEL_SECONDS = 2.0
FLUSH_SECONDS = 2.0

Post = Callable[..., None]


class Guests:
    """Everybody who comes through `listener`.

    `open_connection` makes a running connection out of a channel; `post` calls a function on the event loop.
    After a guest's last word its requests may run for `eof_grace_ms`, unless it is gone altogether.
    """

    def __init__(
        self,
        listener: Listener,
        open_connection: Callable[[Channel, OnEvent], Connection],
        post: Post,
        tasks: TaskGroup,
        settings: Settings,
    ) -> None:
        self._listener = listener
        self._open_connection = open_connection
        self._post = post
        self._settings = settings
        self._tasks = tasks
        self.present: set[Connection] = set()
        self._leaving: set[Connection] = set()
        self._on_failure: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._accept_all, name="acceptor", daemon=True)

    def start(self, on_failure: Callable[[], None]) -> None:
        """Let clients in. `on_failure` is called, on the event loop, if that cannot go on."""
        self._on_failure = on_failure
        self._thread.start()

    def _accept_all(self) -> None:
        try:
            while (client := self._listener.accept()) is not None:
                self._post(self._let_in, client)
        except OSError:
            log.exception("listening has failed")
            self._post(self._on_failure)

    def _let_in(self, client: socket.socket) -> None:
        if len(self.present) >= self._settings.max_connections:
            log.warning("a client was turned away: %d are connected", len(self.present))
            client.close()
            return
        channel = Channel.over(client)
        try:
            self.present.add(self._open_connection(channel, self._on_event))
        except (OSError, RuntimeError) as error:  # No descriptor or no thread is left.
            log.warning("a client was turned away: %s", error)
            channel.release()

    def _on_event(self, guest: Connection, event: PeerEvent) -> None:
        if guest not in self.present:
            return  # Stopping the outbox of one who is gone breaks it.
        if event is PeerEvent.GONE:
            guest.cancel_all()
            self.present.discard(guest)
            self._leaving.discard(guest)
            return
        if event is PeerEvent.BROKEN:
            guest.peer.channel.close()
        if event is not PeerEvent.INPUT_ENDED:
            guest.peer.intake.shut_down = True
            guest.cancel_all()
        if guest not in self._leaving:
            self._leaving.add(guest)
            self._tasks.start_soon(self._see_off, guest)

    async def _see_off(self, guest: Connection) -> None:
        with anyio.move_on_after(self._settings.eof_grace_ms / 1000):
            await guest.settled()
        guest.cancel_all()
        with anyio.move_on_after(CANCEL_SECONDS):
            await guest.settled()
        guest.flush()
        written = anyio.Event()
        guest.peer.outbox.when_idle(lambda: self._post(written.set))
        with anyio.move_on_after(FLUSH_SECONDS):
            await written.wait()
        guest.peer.channel.close()
