"""What waits to be written to one peer: a control lane, and a slot for every stream.

Sending never waits for the pipe. While the pipe takes everything, whoever sends writes; when it does not, a
thread takes over until it has caught up. Meanwhile control frames (responses, errors) overtake progress, and
the parts of a stream gather in its slot, to go out as one.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

from mlx_sidecar.protocol import jsonrpc
from mlx_sidecar.protocol.messages import ProgressParams

from .channel import Channel
from .stream import Part, Stream

log = logging.getLogger("server")

MAX_UNSENT_BYTES = 16 * 1024 * 1024
"""Enough for the fastest engine and a peer that stops reading for some ten seconds."""

_WRITE_BYTES = 64 * 1024
"""Streams fill a write up to here, so that a control frame never waits behind more than this."""

Item = tuple[Stream | None, Part | bytes]
"""A part of a stream; or its response, which goes behind its parts; or, without a stream, a control frame"""


class Outbox:
    """What one peer is sent. Any thread may send.

    `wrap` frames a message. `on_broken` is called once, on whichever thread, when the peer does not read any
    more. `window` is the text, in bytes, that each stream may have under way without an ack; None is no
    bound.
    """

    def __init__(
        self, channel: Channel, wrap: Callable[[bytes], bytes], max_unsent_bytes: int = MAX_UNSENT_BYTES
    ) -> None:
        self._channel = channel
        self._wrap = wrap
        self._max_unsent = max_unsent_bytes
        self._state = threading.Condition()
        self._control: deque[bytes] = deque()
        self._ready: deque[Stream] = deque()
        self._streams: dict[int | str, Stream] = {}
        self._unsent = 0
        self._control_bytes = 0
        self._writing = False
        self._broken = False
        self._rest = memoryview(b"")
        self._has_rest = threading.Event()
        self._thread: threading.Thread | None = None
        self._on_idle: list[Callable[[], None]] = []
        self.on_broken: Callable[[], None] = lambda: None
        self.window: int | None = None

    def send(self, frame: bytes) -> None:
        """Send a control frame."""
        self.put(((None, frame),))

    def put(self, items: Iterable[Item]) -> None:
        """Send all of `items`; in one write, if the pipe has room for them."""
        overflowed: list[Stream] = []
        with self._state:
            flooded = self._unsent > 2 * self._max_unsent
            for stream, content in items:
                if isinstance(content, bytes):
                    self._put_frame(stream, content)
                elif stream is not None and not self._put_part(stream, content):
                    overflowed.append(stream)
            mine = self._begin()
        for stream in overflowed:
            stream.on_overflow()
        if flooded:
            log.warning("the peer does not read what it asked for")
            self._fail() if mine else self._break()
        elif mine:
            self._write_here()

    def ack(self, token: int | str, seq: int) -> None:
        """Confirm a stream up to `seq`; an unknown token is ignored."""
        with self._state:
            stream = self._streams.get(token)
            if stream is None:
                return
            stream.ack(seq)
            self._queue(stream)
            mine = self._begin()
        if mine:
            self._write_here()

    def wait_for_room(self) -> None:
        """Return once the peer has read most of its responses: who does not read them should ask no more.

        Streams do not count. They have an end of their own, and the acks that they wait for must be read.
        """
        with self._state:
            self._state.wait_for(lambda: self._control_bytes <= self._max_unsent or self._broken)

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call `callback`, on whichever thread, once all that was sent has been written or never will be."""
        with self._state:
            if self._writing:
                self._on_idle.append(callback)
                return
        callback()

    def wait_until_idle(self, timeout: float | None) -> None:
        """Return once all that was sent has been written or never will be, or after `timeout` seconds."""
        with self._state:
            self._state.wait_for(lambda: not self._writing, timeout)

    def stop(self) -> None:
        """Drop what is left and end the thread. Close the channel first: nobody may be stuck in a write."""
        self._break()
        self.wait_until_idle(None)

    def _put_frame(self, stream: Stream | None, frame: bytes) -> None:
        self._unsent += len(frame)
        if stream is None:
            self._control_bytes += len(frame)
            self._control.append(frame)
        else:
            stream.response = frame
            self._queue(stream)

    def _put_part(self, stream: Stream, part: Part) -> bool:
        """Return whether there is room for more."""
        if stream.response is not None:
            return True  # A request that was torn down has been answered before its sequence has ended.
        self._streams[stream.token] = stream
        self._unsent += stream.add(part)
        self._queue(stream)
        return self._unsent <= self._max_unsent or self._broken

    def _queue(self, stream: Stream) -> None:
        if not stream.queued and stream.ready(self.window):
            stream.queued = True
            self._ready.append(stream)

    def _begin(self) -> bool:
        """Return whether it is for the caller to write now. Needs the lock."""
        if self._broken:
            self._drop()
        if self._writing or not (self._control or self._ready):
            return False
        self._writing = True
        return True

    def _write_here(self) -> None:
        while data := self._next():
            try:
                sent = self._channel.try_write(data)
            except OSError:
                self._fail()
                return
            if sent < len(data):
                self._leave_to_thread(memoryview(data)[sent:])
                return

    def _leave_to_thread(self, rest: memoryview) -> None:
        with self._state:
            if self._broken:  # The thread may have ended.
                self._end_writing()
                return
            self._rest = rest
        self._has_rest.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                log.exception("no thread can be started to write to a slow peer")
                self._fail()

    def _run(self) -> None:
        while self._has_rest.wait():
            self._has_rest.clear()
            with self._state:
                rest, self._rest = self._rest, memoryview(b"")
                if self._broken and not rest:
                    return
            self._write_on_thread(rest)

    def _write_on_thread(self, data: bytes | memoryview) -> None:
        try:
            while data:
                self._channel.write_all(data)
                data = self._next()
        except OSError:
            self._fail()

    def _next(self) -> bytes:
        """Return what to write next: control frames, then parts of streams. Nothing left ends the writing."""
        frames: list[bytes] = []
        size = 0
        with self._state:
            while size < _WRITE_BYTES and (self._control or self._ready):
                frame = self._next_control() if self._control else self._next_of_a_stream()
                frames.append(frame)
                size += len(frame)
            if not frames:
                self._end_writing()
        return b"".join(frames)

    def _next_control(self) -> bytes:
        frame = self._control.popleft()
        self._unsent -= len(frame)
        self._control_bytes -= len(frame)
        if self._control_bytes <= self._max_unsent < self._control_bytes + len(frame):
            self._state.notify_all()
        return self._wrap(frame)

    def _next_of_a_stream(self) -> bytes:
        stream = self._ready.popleft()
        stream.queued = False
        part, cost = stream.take(self.window)
        self._unsent -= cost
        frame = b""
        if part is not None:
            value = ProgressParams(token=stream.token, value=part)
            frame = self._wrap(jsonrpc.encode_notification("$/progress", value))
        if (response := stream.ended()) is not None:
            self._unsent -= len(response)
            if self._streams.get(stream.token) is stream:
                del self._streams[stream.token]
            return frame + self._wrap(response)
        self._queue(stream)
        return frame

    def _fail(self) -> None:
        """Whoever writes has found that it cannot."""
        self._break()
        with self._state:
            self._end_writing()

    def _break(self) -> None:
        with self._state:
            first, self._broken = not self._broken, True
            self._drop()
        self._has_rest.set()
        if first:
            self.on_broken()

    def _drop(self) -> None:
        self._control.clear()
        self._ready.clear()
        self._streams.clear()
        self._unsent = self._control_bytes = 0
        self._state.notify_all()

    def _end_writing(self) -> None:
        """Nothing is left to write. Needs the lock."""
        self._writing = False
        self._state.notify_all()
        callbacks, self._on_idle = self._on_idle, []
        for callback in callbacks:
            callback()
