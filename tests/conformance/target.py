"""What is tested: a command that is started afresh for every connection, or a Unix socket that takes many.

Nothing here waits without a bound. A target that neither reads nor answers, floods, or dies is met with a
TargetError or the end of its output, never with a hang of ours.
"""

import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

_READ_BYTES = 256 * 1024
_MAX_UNREAD_BYTES = 256 * 1024 * 1024
_LOG_TAIL_BYTES = 2000
_END_SECONDS = 5.0


class TargetError(Exception):
    """The target did not do what any target must: start, read, answer in time."""


class Channel:
    """Bytes to and from one target. Both descriptors are ours alone, so they may be non-blocking."""

    def __init__(self, read: int, write: int) -> None:
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        self._read_from, self._write_to = read, write
        self._unread = bytearray()
        self._ended = False

    def write(self, data: bytes, patience: float) -> None:
        """Write everything, and read what comes meanwhile; that a target is gone is found out by reading.

        Raises:
            TargetError: for `patience` seconds the target took nothing.
        """
        view = memoryview(data)
        deadline = time.monotonic() + patience
        while view:
            try:
                view = view[os.write(self._write_to, view) :]
                deadline = time.monotonic() + patience
            except BlockingIOError:
                if not self._wait(deadline, writing=True):
                    raise TargetError(f"the target read nothing for {patience:g} s") from None
            except OSError:
                return

    def read(self, patience: float) -> bytes:
        """Return what has come, or b"" at the end of the target's output.

        Raises:
            TargetError: nothing has come for `patience` seconds.
        """
        if not self._unread and not self._ended and not self._wait(time.monotonic() + patience):
            raise TargetError(f"nothing came for {patience:g} s")
        said, self._unread = bytes(self._unread), bytearray()
        return said

    def end_input(self) -> None:
        """Say that nothing more will be written."""
        raise NotImplementedError

    def exit_code(self, patience: float) -> int | None:
        """Return the exit code of a process that has ended its output; None if there is no process."""
        raise NotImplementedError

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the process."""
        raise NotImplementedError

    def close(self) -> None:
        """Give everything back, whatever state the target is in."""
        raise NotImplementedError

    def log_tail(self) -> str:
        """Return the end of what the process wrote to stderr."""
        return ""

    def _wait(self, deadline: float, *, writing: bool = False) -> bool:
        """Wait until something has been read or, if `writing`, can be written; False after the deadline."""
        poll = select.poll()
        if not self._ended:
            poll.register(self._read_from, select.POLLIN)
        if writing:
            poll.register(self._write_to, select.POLLOUT)
        ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if self._read_from in ready and ready[self._read_from] & ~select.POLLOUT:
            self._take()
        return bool(ready)

    def _take(self) -> None:
        try:
            chunk = os.read(self._read_from, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        self._ended = not chunk
        self._unread += chunk
        if len(self._unread) > _MAX_UNREAD_BYTES:
            raise TargetError("the target floods")


class Target(Protocol):
    """Something that connections can be made to. `offers` are the needs of transcripts that it meets."""

    @property
    def offers(self) -> frozenset[str]: ...

    def open(self) -> Channel:
        """Return a new connection; raise TargetError if there cannot be one."""
        ...


class ProcessTarget:
    """Starts `command` for every connection and speaks to its stdin and stdout."""

    offers = frozenset({"process"})

    def __init__(self, command: list[str]) -> None:
        self._command = command

    def open(self) -> Channel:
        """Start the process; raise TargetError if it cannot be started."""
        return _ProcessChannel(self._command)


class SocketTarget:
    """Connects to a server that listens on the Unix socket at `path`."""

    offers = frozenset({"socket"})

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> Channel:
        """Connect; raise TargetError if nobody listens."""
        return _SocketChannel(self._path)


class _ProcessChannel(Channel):
    def __init__(self, command: list[str]) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            # A process group of its own: what a wrapper has started ends with the wrapper.
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                process_group=0,
            )
        except OSError as error:
            self._log.close()
            raise TargetError(f"the command cannot be started: {error}") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipes = (self._process.stdin, self._process.stdout)
        super().__init__(self._process.stdout.fileno(), self._process.stdin.fileno())

    def end_input(self) -> None:
        self._pipes[0].close()

    def exit_code(self, patience: float) -> int | None:
        try:
            code = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            raise TargetError(f"the process was still there {patience:g} s after its last word") from None
        return code if code >= 0 else 128 - code

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in self._pipes:
            pipe.close()
        self._process.wait(_END_SECONDS)
        self._log.close()

    def log_tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LOG_TAIL_BYTES))
        return self._log.read().decode(errors="replace")


class _SocketChannel(Channel):
    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(_END_SECONDS)
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise TargetError(f"nobody answers at {path}: {error}") from None
        super().__init__(self._socket.fileno(), self._socket.fileno())

    def end_input(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def exit_code(self, patience: float) -> int | None:  # noqa: ARG002
        return None

    def send_signal(self, number: signal.Signals) -> None:
        raise TargetError(f"a socket takes no {number.name}")

    def close(self) -> None:
        self._socket.close()
