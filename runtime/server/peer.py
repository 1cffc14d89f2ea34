"""One peer from its first byte, event loop or not: the thread that reads, the intake, the outbox.

Whatever the intake does not answer itself waits here, in order, until a connection on the event loop takes
it.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

from mlx_sidecar.native.pulse import IdsInFlight, Pulses
from mlx_sidecar.protocol.framing import FrameReader, Framing

from .channel import Channel
from .intake import Immediate, Incoming, Intake
from .outbox import Outbox

if TYPE_CHECKING:
    from .connection import Connection

log = logging.getLogger("server")

_CHUNKS_AHEAD = 16


class PeerEvent(Enum):
    """What can become of a peer."""

    INPUT_ENDED = "it will say no more"
    FRAMING_LOST = "its messages can no longer be told apart"
    BROKEN = "it stopped reading"
    GONE = "it is gone"
    EXIT = "it said exit"


Event = Callable[["Connection"], None]


class Peer:
    """The other end of a channel. `framing` pins what is otherwise found out from the first byte.

    With `pulses`, pings are answered also while no Python thread can run; see `native.pulse`.

    After `_CHUNKS_AHEAD` chunks that nobody has taken the thread stops reading, so a host that floods us
    fills its own pipe and not our memory.
    """

    def __init__(
        self,
        channel: Channel,
        immediate: dict[str, Immediate],
        framing: Framing | None = None,
        pulses: Pulses | None = None,
    ) -> None:
        reader = FrameReader(framing)
        self.channel = channel
        self.outbox = Outbox(channel, lambda frame: (reader.framing or Framing.NDJSON).wrap(frame))
        self.intake = Intake(reader, self.outbox, immediate)
        self._greeted = b""
        self._reader = reader
        self._pulse = channel.quicken(pulses, framing.value if framing else "") if pulses else None
        if self._pulse is not None:
            self.intake.in_flight = IdsInFlight(self._pulse)
        self._events: deque[Event] = deque()
        self._wake: Callable[[], None] = lambda: None
        self._room = threading.Semaphore(_CHUNKS_AHEAD)
        self.outbox.on_broken = lambda: self._happened(PeerEvent.BROKEN)
        # A daemon: blocked in a read it holds no lock, and the process may end under it.
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)

    def greet(self) -> None:
        """Deal, here and now, with what the peer has said already."""
        if self.channel.has_input():
            self._room.acquire()
            self._greeted = self.channel.read()
            self._take(self._greeted)

    def start(self) -> None:
        """Begin reading."""
        self.channel.read_ahead(self._greeted)
        self._thread.start()

    def attach(self, connection: "Connection", post: Callable[[Callable[[], None]], None]) -> None:
        """Let `connection` take, on the event loop, what has happened and what will; `post` calls there."""

        def take_all() -> None:
            while self._events:
                self._events.popleft()(connection)

        self._wake = lambda: post(take_all)
        take_all()

    def _run(self) -> None:
        try:
            self._read_all()
        except BaseException:
            # Nobody would read this peer any more, and it would wait for ever.
            log.exception("a peer could not be read any further")
            self._happened(PeerEvent.BROKEN)
        else:
            self._happened(PeerEvent.FRAMING_LOST if self.intake.lost else PeerEvent.INPUT_ENDED)
        self.channel.wait_until_gone()
        self._happened(PeerEvent.GONE)
        self.outbox.stop()
        self.channel.release()

    def _read_all(self) -> None:
        while not self.intake.lost:
            self._room.acquire()
            if not (chunk := self.channel.read()):
                self._take_in(self.intake.end())
                break
            self._take(chunk)

    def _take(self, chunk: bytes) -> None:
        if self._pulse is not None and (found := self._pulse.framing):
            # By a ping, perhaps, that never came here.
            self._reader.settle(Framing(found), begun=self._pulse.took_beginning)
        incoming = self.intake.feed(chunk)
        if self._pulse is not None and self.intake.shut_down:
            self._pulse.shut_down()
        self._take_in(incoming)

    def _take_in(self, incoming: list[Incoming]) -> None:
        if not incoming:
            self._room.release()
            return

        def take(connection: "Connection") -> None:
            try:
                connection.take(incoming)
            finally:
                self._room.release()

        self._add(take)

    def _happened(self, event: PeerEvent) -> None:
        self._add(lambda connection: connection.happened(event))

    def _add(self, event: Event) -> None:
        self._events.append(event)
        self._wake()
