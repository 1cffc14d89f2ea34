"""What a pull says while it runs, and how it says that it failed."""

from typing import Protocol

from mlx_sidecar.protocol.messages import PullPhase


class PullError(Exception):
    """The model could not be brought. The message is for the person at the terminal.

    `problem` is fit for a client: no paths, and no words of a library.
    """

    def __init__(self, message: str, problem: str | None = None) -> None:
        super().__init__(message)
        self.problem = problem or message


class PullReport(Protocol):
    """Who is told how far a pull is."""

    def say(self, line: str) -> None:
        """Take a line for people."""
        ...

    def progress(self, phase: PullPhase, done_bytes: int, total_bytes: int) -> None:
        """Take how far a phase is. Called often, from any thread."""
        ...


def check_room(needed_bytes: int, free_bytes: int) -> None:
    """Compare what a pull will write with what the disk has.

    Raises:
        PullError: it would not fit.
    """
    if needed_bytes > free_bytes:
        needed, free = f"{needed_bytes / 1e6:.1f} MB are needed", f"{free_bytes / 1e6:.1f} MB are free"
        raise PullError(f"the disk has too little room: {needed}, {free}")
