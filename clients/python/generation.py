"""An answer as it is generated."""

from collections.abc import AsyncIterator, Iterator
from types import TracebackType

from msgspec import UNSET

from mlx_sidecar.protocol.messages import GenerateProgress, GenerateResult

from .connection import Connection, StreamedRequest
from .errors import SidecarError


class Generation:
    """An answer that is being generated: iterate over its parts, once, or await `text()`, or only `result()`.

    Leaving the loop early cancels the generation, and so does cancelling a task that waits for it; `async
    with` says so in the code. A failure comes after the parts that came before it. Parts that nobody takes
    are kept; while the answer grows the server holds back what is beyond the connection's window.
    """

    def __init__(
        self, connection: Connection, request: StreamedRequest[GenerateProgress], window_bytes: int
    ) -> None:
        self._connection = connection
        self._request = request
        self._window_bytes = window_bytes
        self._unconfirmed_bytes = 0
        self._parts_taken = 0

    async def __aenter__(self) -> "Generation":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __aiter__(self) -> AsyncIterator[GenerateProgress]:
        return _Parts(self)

    async def take(self) -> list[GenerateProgress]:
        """Return the parts that are here, waiting for one if there is none; an empty list at the end.

        Raises:
            SidecarRequestError: the server refused or failed the request.
            SidecarDisconnected: the connection, or the process, ended under it.
            SidecarError: a part was lost on the way.
        """
        taken = await self._request.take()
        if not taken:
            self._check_all_came(await self.result())
        self._parts_taken += sum(part.merged for part in taken)
        self._confirm(taken)
        return taken

    async def text(self) -> str:
        """Return the whole text, once it is complete. Raises what `take` does."""
        return "".join([part.text async for part in self])

    async def result(self) -> GenerateResult:
        """Return how it ended: finish reason, usage, timings. Raises what `take` does."""
        return await self._request.result(GenerateResult)

    def cancel(self) -> None:
        """End the generation on the server; `result` then says "cancelled". Nothing if it has ended."""
        self._request.cancel()

    def _confirm(self, parts: list[GenerateProgress]) -> None:
        self._unconfirmed_bytes += sum(len(part.text.encode()) for part in parts)
        if self._unconfirmed_bytes * 2 >= self._window_bytes and not self._request.ended:
            self._unconfirmed_bytes = 0
            self._connection.notify("$/streamAck", {"token": self._request.id, "seq": parts[-1].seq})

    def _check_all_came(self, result: GenerateResult) -> None:
        if result.last_seq not in (UNSET, self._parts_taken):
            raise SidecarError(
                f"Of the answer's {result.last_seq} parts {self._parts_taken} came: something else wrote "
                'into the connection. For a `command` that prints there is `transport="pipe"`.'
            )


class _Parts(AsyncIterator[GenerateProgress]):
    """One pass over the parts."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._taken: Iterator[GenerateProgress] = iter(())

    async def __anext__(self) -> GenerateProgress:
        while True:
            for part in self._taken:
                return part
            if not (taken := await self._generation.take()):
                raise StopAsyncIteration
            self._taken = iter(taken)

    def __del__(self) -> None:
        # A loop that is left early says so to nobody; all it does is to drop its iterator.
        self._generation.cancel()
