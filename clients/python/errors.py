"""What can go wrong for a client.

    SidecarError
    |-- SidecarRequestError     the server refused or failed one request; switch on `kind`
    |-- SidecarNotStarted       there is no sidecar to talk to: no program, no socket, or no answer from it
    `-- SidecarDisconnected     there was one, and the connection to it has ended
        `-- SidecarExited       because its process, which was ours, has ended

Every one can be pickled, so it may cross to another process.
"""

import signal
from typing import Any

from mlx_sidecar.protocol.errors import ErrorObject


class SidecarError(Exception):
    """Base of everything that this package raises on its own account."""


class SidecarRequestError(SidecarError):
    """The server refused or failed a request. Switch on `kind`; the message is for people.

    `data` is everything that the server said, such as `path` for a wrong parameter.
    """

    def __init__(self, error: ErrorObject) -> None:
        super().__init__(error)
        self.code: int = error.code
        self.data: dict[str, Any] = error.data or {}
        self.kind: str = str(self.data.get("kind", "unknown"))
        self.retryable: bool = self.data.get("retryable") is True
        self._message = error.message

    def __str__(self) -> str:
        return self._message


class SidecarNotStarted(SidecarError):
    """There is no sidecar to talk to: its program or socket is missing, or what is there does not answer."""


class SidecarDisconnected(SidecarError):
    """The connection has ended. Requests in flight may or may not have been carried out."""


class SidecarExited(SidecarDisconnected):
    """The process has ended. Requests in flight may or may not have been carried out.

    `exit_code` is negative if a signal ended it; `signal` is then the signal's name. `stderr_tail` is the
    last of what it wrote to stderr.
    """

    def __init__(self, exit_code: int, stderr_tail: str) -> None:
        super().__init__(exit_code, stderr_tail)
        self.exit_code = exit_code
        self.stderr_tail = stderr_tail
        self.signal: str | None = _signal_name(-exit_code) if exit_code < 0 else None

    def __str__(self) -> str:
        how = f"with code {self.exit_code}" if self.signal is None else f"by {self.signal}"
        return f"The sidecar ended {how}.{last_words(self.stderr_tail)}"


def last_words(stderr_tail: str) -> str:
    """Return the end of a message that quotes what the process wrote to stderr."""
    return f" It last said:\n{stderr_tail}" if stderr_tail else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
