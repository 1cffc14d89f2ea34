"""What can go wrong for a client: the server refused, or there is no server."""

from typing import Any

from mlx_sidecar.protocol.errors import ErrorObject


class SidecarRequestError(Exception):
    """The server refused or failed a request. Switch on `kind`; the message is for people."""

    def __init__(self, error: ErrorObject) -> None:
        super().__init__(error.message)
        self.code = error.code
        self.data: dict[str, Any] = error.data or {}
        self.kind = str(self.data.get("kind", "unknown"))
        self.retryable = self.data.get("retryable") is True


class SidecarNotStarted(Exception):
    """The program could not be started."""


class SidecarExited(Exception):
    """The process has ended. Requests in flight may or may not have been carried out."""

    def __init__(self, exit_code: int | None, stderr_tail: str) -> None:
        said = f" It last said:\n{stderr_tail}" if stderr_tail else ""
        super().__init__(f"The sidecar ended with code {exit_code}.{said}")
        self.exit_code = exit_code
        self.stderr_tail = stderr_tail
