"""One peer as the event loop sees it: its requests in flight, each answered exactly once."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from anyio.abc import TaskGroup

from mlx_sidecar.protocol import errors, jsonrpc
from mlx_sidecar.protocol import messages as m

from .intake import Incoming, as_sidecar_error
from .outbox import MAX_UNSENT_BYTES, Item
from .peer import Peer, PeerEvent
from .stream import Part, Stream

Handler = Callable[[Any, "Call"], Any]
"""Takes decoded params and the call; returns the result, or an awaitable of it."""


OnEvent = Callable[["Connection", PeerEvent], None]


class Call:
    """A request in flight, as its handler sees it.

    A cancel stops the handler where it waits, and the answer is the error `cancelled`. A handler that can do
    better sets `on_cancel` to what should happen instead. `on_overflow` is given the error to fail with if
    the client does not read the stream.
    """

    def __init__(self, connection: "Connection", incoming: Incoming) -> None:
        assert incoming.id is not None
        self.connection = connection
        self.id = incoming.id
        self.method = incoming.method
        self.batch = incoming.batch
        self.stream: Stream | None = None
        self._scope = anyio.CancelScope()
        self.on_cancel: Callable[[], None] = self._scope.cancel
        self.on_overflow: Callable[[errors.SidecarError], None] = lambda _: None

    def open_stream(self, token: int | str) -> None:
        """Let `progress` go out under `token`, and the response behind it.

        Raises:
            InvalidParams: another request in flight has the same token.
        """
        tokens = self.connection.tokens
        if token in tokens:
            raise errors.InvalidParams("partialResultToken", "belongs to another request in flight")
        tokens.add(token)
        self.stream = Stream(token, lambda: self.on_overflow(errors.SlowConsumer(MAX_UNSENT_BYTES)))

    def progress(self, part: Part) -> None:
        """Send a part through the stream that was opened."""
        self.connection.send(self.stream, part)

    async def run(self, work: Awaitable[Any]) -> Any:
        """Return the handler's result.

        Raises:
            RequestCancelled: the call was cancelled and the handler left that to us.
        """
        with self._scope:
            return await work
        raise errors.RequestCancelled()


class Connection:
    """Runs a handler for each request of a peer; lives on the event loop.

    Handlers that return an awaitable run as tasks; the others answer before the next request is looked at.
    `on_event` is told what becomes of the peer; `on_open`, with its parameters, of an accepted `initialize`.
    """

    def __init__(
        self,
        peer: Peer,
        tasks: TaskGroup,
        handlers: dict[str, Handler],
        on_open: Callable[[m.InitializeParams], None],
        on_event: OnEvent,
    ) -> None:
        self.peer = peer
        self.tokens: set[int | str] = set()
        self._tasks = tasks
        self._handlers = handlers
        self._on_open = on_open
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._calls: dict[jsonrpc.RequestId, Call] = {}
        self._idle = anyio.Event()
        self._turn: list[Item] = []

    @property
    def shut_down(self) -> bool:
        """Whether the peer has said `shutdown`."""
        return self.peer.intake.shut_down

    def take(self, incoming: list[Incoming]) -> None:
        """Deal with what the peer has said."""
        for item in incoming:
            if item.id is not None:
                self._call(Call(self, item), item.params)
            elif item.method == "$/cancelRequest":
                self.cancel(item.params.id)
            elif item.method == "initialize":
                self._on_open(item.params)
            elif item.method == "exit":
                self._on_event(self, PeerEvent.EXIT)

    def happened(self, event: PeerEvent) -> None:
        """Take note of what became of the peer."""
        self._on_event(self, event)

    def send(self, stream: Stream | None, content: Part | bytes) -> None:
        """Send a part or the response of a stream, or a control frame. One turn's go out together."""
        if not self._turn:
            self._loop.call_soon(self.flush)
        self._turn.append((stream, content))

    def flush(self) -> None:
        """Hand over to the outbox what this turn of the event loop has sent."""
        turn, self._turn = self._turn, []
        if turn:
            self.peer.outbox.put(turn)

    def cancel(self, request_id: jsonrpc.RequestId) -> None:
        """Cancel a request in flight; an id that is not in flight is ignored."""
        if (call := self._calls.get(request_id)) is not None:
            call.on_cancel()

    def cancel_all(self, *, but: Call | None = None) -> None:
        """Cancel every request in flight."""
        for call in list(self._calls.values()):
            if call is not but:
                call.on_cancel()

    async def settled(self, *, but: Call | None = None) -> None:
        """Wait until every request in flight has been answered."""
        while self._calls.keys() - ({but.id} if but else set[jsonrpc.RequestId]()):
            if self._idle.is_set():
                self._idle = anyio.Event()
            await self._idle.wait()

    def _call(self, call: Call, params: Any) -> None:
        self._calls[call.id] = call
        try:
            result = self._handlers[call.method](params, call)
        except Exception as error:
            self._finish(call, as_sidecar_error(call.method, error))
            return
        if inspect.isawaitable(result):
            self._tasks.start_soon(self._run, call, result)
        else:
            self._finish(call, result)

    async def _run(self, call: Call, work: Awaitable[Any]) -> None:
        outcome: Any = errors.RequestCancelled()
        try:
            outcome = await call.run(work)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # A panic in Rust is no Exception.
            outcome = as_sidecar_error(call.method, error)
        finally:
            # Also when the whole process is being torn down: every request is answered.
            self._finish(call, outcome)

    def _finish(self, call: Call, outcome: Any) -> None:
        try:
            frame = jsonrpc.encode_outcome(call.id, outcome)
        except Exception as error:
            frame = jsonrpc.encode_outcome(call.id, as_sidecar_error(call.method, error))
        del self._calls[call.id]
        # Before the response can be read: its id may come again at once.
        self.peer.intake.in_flight.discard(call.id)
        if call.stream is not None:
            self.tokens.discard(call.stream.token)
        if call.batch is not None:
            call.batch.put(call.id, frame)
        else:
            self.send(call.stream, frame)
        self._idle.set()
