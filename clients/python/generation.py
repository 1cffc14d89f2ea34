"""An answer as it is generated."""

from collections import deque
from types import TracebackType

import anyio
import msgspec

from mlx_sidecar.protocol.messages import GenerateProgress, GenerateResult

from .connection import Connection, Pending


class Generation:
    """Iterate over its parts, once, or await `text()` or `result()`; the request is sent when you first do.

    Use it as `async with` to have it cancelled when the block is left early.
    """

    def __init__(self, connection: Connection, token: str, params: dict[str, object]) -> None:
        self._connection = connection
        self._token = token
        self._params = params
        self._pending: Pending | None = None
        self._parts: deque[GenerateProgress] = deque()
        self._news = anyio.Event()

    async def __aenter__(self) -> "Generation":
        await self._sent()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.cancel()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> GenerateProgress:
        pending = await self._sent()
        while not self._parts:
            if pending.answered.is_set():
                await self.result()
                raise StopAsyncIteration
            await self._something_new(pending)
        return self._parts.popleft()

    async def text(self) -> str:
        """Return the whole text, once it is complete."""
        return "".join([part.text async for part in self])

    async def result(self) -> GenerateResult:
        """Return how it ended: finish reason, usage, timings.

        Raises:
            SidecarRequestError: the server refused or failed the request.
            SidecarExited: the process ended under it.
        """
        pending = await self._sent()
        try:
            return msgspec.json.decode(await pending.result(), type=GenerateResult)
        finally:
            self._connection.listen(self._token, None)

    async def cancel(self) -> None:
        """End the generation on the server; `result` then says "cancelled". Nothing if it has ended."""
        pending = await self._sent()
        if not pending.answered.is_set():
            await self._connection.notify("$/cancelRequest", {"id": pending.id})

    async def _sent(self) -> Pending:
        if self._pending is None:
            self._connection.listen(self._token, self._on_progress)
            params = self._params | {"partialResultToken": self._token}
            self._pending = await self._connection.send("generate", params)
        return self._pending

    def _on_progress(self, part: GenerateProgress) -> None:
        self._parts.append(part)
        self._news.set()

    async def _something_new(self, pending: Pending) -> None:
        self._news = anyio.Event()
        async with anyio.create_task_group() as race:

            async def wait_for_end() -> None:
                await pending.answered.wait()
                self._news.set()

            race.start_soon(wait_for_end)
            await self._news.wait()
            race.cancel_scope.cancel()
