"""The right to listen at a path: a private folder, a held lock, and nobody alive behind an old socket.

Whoever may write the folder could swap the socket, so the folder is the real boundary; chmod on a socket
has no effect on some systems. Unlinking could steal the socket of a live server, so it needs the lock.
"""

import fcntl
import os
import socket
import stat
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

# sizeof(sockaddr_un.sun_path), less the closing NUL.
_MAX_PATH_BYTES = 103 if sys.platform == "darwin" else 107


class SocketError(Exception):
    """A socket cannot be used. The text is for the person at the command line and may name paths."""


class AlreadyServed(SocketError):
    """A live server is at this path; it was left alone."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"A live server already listens at {path}. Connect to it, or choose another path.")


@contextmanager
def explained(what: str) -> Generator[None]:
    """Turn an OSError into a SocketError that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise SocketError(f"{what}: {error.strerror or error}.") from error


def check_length(path: Path) -> None:
    """Raise SocketError if the system cannot hold `path` in a socket's address."""
    length = len(os.fsencode(path))
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise SocketError(f"The path of a socket must be UTF-8, to be said in JSON; {path} is not.") from None
    if length > _MAX_PATH_BYTES:
        raise SocketError(
            f"The path of a socket may have {_MAX_PATH_BYTES} bytes on this system; this one has {length}. "
            f"Choose a shorter one than {path}."
        )


def claim_path(path: Path) -> int:
    """Return the descriptor of the lock on an absolute `path`, at which nothing is left: bind there at once.

    Closing the descriptor, or dying, gives the path up. The empty lock file `PATH.lock` is never deleted:
    one process could still lock the deleted file while another locks its successor, and both would serve.
    Raises AlreadyServed, or SocketError if the folder is not private or something else is at `path`.
    """
    check_length(path)
    _require_private_folder(path.parent)
    lock = _lock(path)
    try:
        with explained(f"The old socket at {path} cannot be replaced"):
            _reclaim(path)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _require_private_folder(folder: Path) -> None:
    """Make the folder if there is none. One that others may even read (0755) is refused, as is a link."""
    with explained(f"The socket's folder {folder} cannot be used"):
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
        found = folder.lstat()
    if stat.S_ISLNK(found.st_mode):
        problem = "is a symbolic link"
    elif not stat.S_ISDIR(found.st_mode):
        problem = "is not a folder"
    elif found.st_uid != os.geteuid():
        problem = f"belongs to another user (uid {found.st_uid})"
    elif found.st_mode & 0o077:
        problem = f"is open to other users (mode {stat.S_IMODE(found.st_mode):04o})"
    else:
        return
    raise SocketError(
        f"The socket's folder {folder} {problem}. Choose a folder that only you can enter (mode 0700); "
        "one that does not exist yet is made that way."
    )


def _lock(path: Path) -> int:
    name = path.with_name(f"{path.name}.lock")
    with explained(f"The lock file {name} cannot be used"):
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            os.close(lock)
            if isinstance(error, BlockingIOError):
                raise AlreadyServed(path) from None
            raise
    return lock


def _reclaim(path: Path) -> None:
    """Remove the socket of a dead server. The caller holds the lock."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise SocketError(
            f"{path} is in the way: it is not a socket of yours, so it was left alone. "
            "Remove it or choose another path."
        )
    if _is_served(path):
        raise AlreadyServed(path)
    path.unlink(missing_ok=True)


def _is_served(path: Path) -> bool:
    """Say whether anybody listens at `path`: a server without our lock, or one whose lock file is lost.

    Only a refusal proves that nobody does. On Linux a server whose queue is full gives EAGAIN instead, so no
    message need be exchanged; macOS refuses then too, and there only the lock tells it from a dead one.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def identity(path: Path) -> tuple[int, int]:
    """Return what tells the file at `path` from any other that exists."""
    found = path.lstat()
    return found.st_dev, found.st_ino


def unlink_own(path: Path, own: tuple[int, int]) -> None:
    """Remove `path` if it is still the file with the identity `own`. Never raises OSError."""
    with suppress(OSError):
        if identity(path) == own:
            path.unlink()
