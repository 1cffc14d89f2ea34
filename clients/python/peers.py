"""Whom a client talks to: a process that it started, or a stream to a sidecar that somebody else runs."""

import subprocess
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
from anyio.abc import ByteReceiveStream, ByteStream, Process, SocketListener
from anyio.streams.stapled import StapledByteStream

from .connection import Connection
from .errors import SidecarExited, SidecarNotStarted

PATIENCE_SECONDS = 2.0
_LOG_TAIL_BYTES = 8 * 1024

Connect = Callable[[], Awaitable[ByteStream | None]]


class Peer(ABC):
    """The other side of a connection. `process_id` and `exit_code` are those of a process that is ours."""

    process_id: int | None = None
    exit_code: int | None = None

    def __init__(self) -> None:
        self.connection: Connection = Connection()

    @property
    def log_tail(self) -> str:
        """The last of what it logged, as far as we see that."""
        return ""

    @abstractmethod
    async def talk(self) -> None:
        """Carry the connection until it ends, and close it with the reason if that is known."""

    @abstractmethod
    async def end(self, patience: float) -> None:
        """Wait `patience` seconds for the other side to end the talk; then do it."""


class Remote(Peer):
    """A sidecar at the other end of a stream; ending it means hanging up."""

    def __init__(self, stream: ByteStream) -> None:
        super().__init__()
        self._stream = stream

    async def talk(self) -> None:
        """Carry the connection until it ends."""
        await self.connection.run(self._stream)
        await self._stream.aclose()

    async def end(self, patience: float) -> None:
        """Wait `patience` seconds for the server to hang up; then do it."""
        with anyio.move_on_after(patience):
            await self.connection.closed.wait()
        await self._stream.aclose()


class Child(Peer):
    """A process of ours: its log is always read, its end is told once."""

    def __init__(self, process: Process, log: ByteReceiveStream, connect: Connect) -> None:
        super().__init__()
        self.process_id: int | None = process.pid
        self._process = process
        self._log = log
        self._log_tail = bytearray()
        self._connect = connect

    @property
    def log_tail(self) -> str:
        """The last of what it logged."""
        return self._log_tail.decode(errors="replace").strip()

    async def talk(self) -> None:
        """Carry the connection until it or the process ends; end the other, and close with the exit code."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._keep_log)
            tasks.start_soon(self._let_go, tasks.cancel_scope)
            if (stream := await self._connect()) is not None:
                await self.connection.run(stream)
                await stream.aclose()
            # Who does not talk to us any more is of no use.
            await self.end(PATIENCE_SECONDS)
        await self._process.aclose()
        self.exit_code: int | None = await self._process.wait()
        self.connection.close(SidecarExited(self.exit_code, self.log_tail))

    async def end(self, patience: float) -> None:
        """Wait `patience` seconds for the process to end; then ask by SIGTERM, and wait; then kill it."""
        for hurry in (self._process.terminate, self._process.kill):
            with anyio.move_on_after(patience):
                await self._process.wait()
                return
            with suppress(ProcessLookupError):
                hurry()
            patience = PATIENCE_SECONDS
        await self._process.wait()

    async def _keep_log(self) -> None:
        async for chunk in self._log:
            self._log_tail += chunk
            del self._log_tail[:-_LOG_TAIL_BYTES]

    async def _let_go(self, reading: anyio.CancelScope) -> None:
        # A process that it started may have inherited its pipes and keep them open for ever.
        await self._process.wait()
        reading.deadline = anyio.current_time() + PATIENCE_SECONDS


async def start_on_stdio(command: Sequence[str], env: Mapping[str, str] | None) -> Child:
    """Start the program and talk over its stdin and stdout.

    Raises:
        SidecarNotStarted: the program is missing.
    """
    process = await _start(command, env, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    stream = StapledByteStream(process.stdin, process.stdout)

    async def connect() -> ByteStream:
        return stream

    return Child(process, process.stderr, connect)


async def start_on_pipe(command: Sequence[str], env: Mapping[str, str] | None) -> Child:
    """Start the program and talk over a socket that it is told to connect to; what it prints is log.

    Raises:
        SidecarNotStarted: the program is missing.
    """
    async with AsyncExitStack() as stack:
        path, listener = await stack.enter_async_context(_private_listener())
        arguments = [*command, "--pipe", path]
        process = await _start(arguments, env, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        listening = stack.pop_all()

    async def connect() -> ByteStream | None:
        async with listening, anyio.create_task_group() as race:
            race.start_soon(_cancel_after, process, race.cancel_scope)
            stream = await listener.accept()
            race.cancel_scope.cancel()
            return stream
        return None

    return Child(process, process.stdout, connect)


async def _start(
    command: Sequence[str], env: Mapping[str, str] | None, *, stdin: int, stderr: int
) -> Process:
    try:
        # A session of its own: Ctrl-C in a terminal is for us, and we may want to go on talking.
        return await anyio.open_process(
            list(command), env=env, stdin=stdin, stderr=stderr, start_new_session=True
        )
    except OSError as error:
        raise SidecarNotStarted(
            f"{command[0]} could not be started ({error.strerror}). Install it, or pass `command`."
        ) from error


@asynccontextmanager
async def _private_listener() -> AsyncGenerator[tuple[str, SocketListener]]:
    # mkdtemp makes the folder 0700, so nobody else can connect.
    with TemporaryDirectory(prefix="mlx-sidecar-") as folder:
        path = Path(folder) / "host.sock"
        async with await anyio.create_unix_listener(path) as listener:
            yield str(path), listener


async def _cancel_after(process: Process, scope: anyio.CancelScope) -> None:
    await process.wait()
    scope.cancel()
