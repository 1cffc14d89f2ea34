"""Unix sockets: `connect` to a host that listens, or be a `Listener` for many clients.

Both sides admit only our own user and root, whatever the permissions of files say. Sockets given out are
blocking and closed in child processes. See `socket_lock` for who may listen where.
"""

import errno
import logging
import os
import select
import socket
import stat
import struct
import sys
import threading
from collections.abc import Mapping, MutableMapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from .socket_lock import AlreadyServed, SocketError, check_length, claim_path, explained, identity, unlink_own

__all__ = ["AlreadyServed", "Listener", "SocketError", "connect", "notify_ready", "peer_uid"]

log = logging.getLogger("server")

_FIRST_PASSED_DESCRIPTOR = 3
_SCARCE = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_SCARCE_PAUSE_SECONDS = 0.5
_PASSING = {errno.EAGAIN, errno.ECONNABORTED, errno.EINTR, errno.EPROTO}
_NOTIFY_TIMEOUT_SECONDS = 1.0


def connect(path: Path) -> socket.socket:
    """Return a connection to the host that listens at `path`; waits while the host's queue is full.

    Raises SocketError if nobody listens there, or somebody who is neither us nor root.
    """
    check_length(path)
    with ExitStack() as undo:
        try:
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise SocketError(f"{path} is not a socket. Give the path at which the host listens.")
            connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            connection.connect(str(path))
            uid = peer_uid(connection)
        except (FileNotFoundError, NotADirectoryError):
            raise SocketError(
                f"There is no socket at {path}. The host must listen there before it starts the sidecar."
            ) from None
        except ConnectionRefusedError:
            raise SocketError(
                f"Nobody listens at {path} any more. The host must listen until the sidecar has connected."
            ) from None
        except OSError as error:
            raise SocketError(f"Cannot connect to {path}: {error.strerror or error}.") from error
        if not _is_trusted(uid):
            raise SocketError(
                f"The process that listens at {path} belongs to another user (uid {uid}), so it was told "
                "nothing. Host and sidecar must run as the same user."
            )
        undo.pop_all()
        return connection


class Listener:
    """A listening socket: `accept` on a thread of its own, `close` from any other."""

    def __init__(self, listening: socket.socket, undo: ExitStack) -> None:
        """Take over `listening` and what `undo` undoes; use `bind` or `adopt`."""
        self.address = os.fsdecode(listening.getsockname()).replace("\0", "@", 1)
        """Where clients connect: an absolute path, or `@name` of an adopted abstract socket."""
        listening.setblocking(False)  # The client that poll has seen may be gone before we accept it.
        wake_read, self._wake = os.pipe()
        undo.callback(os.close, wake_read)
        undo.callback(os.close, self._wake)
        self._socket = listening
        self._events = select.poll()
        self._events.register(listening, select.POLLIN)
        self._events.register(wake_read, select.POLLIN)
        self._closing = threading.Event()
        self._accepting = threading.Lock()
        self._strangers: set[int] = set()
        self._undo = undo.pop_all()

    @classmethod
    def bind(cls, path: Path) -> Self:
        """Listen at `path` until `close`. Its folder must be private (0700) and ours; it is made if need be.

        Raises AlreadyServed if a live server is there, SocketError if this cannot be done.
        """
        path = path.absolute()
        with ExitStack() as undo, explained(f"Cannot listen at {path}"):
            undo.callback(os.close, claim_path(path))
            listening = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listening.bind(str(path))
            # Undone while `listening` is open: that keeps its inode number from being given to another file.
            undo.callback(unlink_own, path, identity(path))
            # Connecting is refused until `listen`, so nobody slips in before the chmod. A umask would do as
            # well but belongs to the whole process.
            path.chmod(0o600)
            listening.listen(socket.SOMAXCONN)
            return cls(listening, undo)

    @classmethod
    def adopt(cls, environ: MutableMapping[str, str]) -> Self:
        """Listen on descriptor 3, which systemd or its like opened for us, and remove its variables.

        The socket's file and its lock are the business of whoever made it. Raises SocketError if no listening
        Unix stream socket was passed to this process.
        """
        process_id, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
        environ.pop("LISTEN_FDNAMES", None)
        if process_id != str(os.getpid()) or not count.isdecimal() or int(count) < 1:
            raise SocketError(
                "No socket was passed to this process (LISTEN_PID, LISTEN_FDS). "
                "Let systemd or a tool like it start it, or listen at a path."
            )
        if int(count) > 1:
            log.warning("%s sockets were passed; only the first is served", count)
        with ExitStack() as undo, explained("Descriptor 3 is not a socket that can be served"):
            listening = undo.enter_context(socket.socket(fileno=_FIRST_PASSED_DESCRIPTOR))
            if (
                listening.family != socket.AF_UNIX
                or listening.type != socket.SOCK_STREAM
                or not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            ):
                raise SocketError("Descriptor 3 is not a listening Unix stream socket. Pass one of these.")
            listening.set_inheritable(False)
            return cls(listening, undo)

    def accept(self) -> socket.socket | None:
        """Wait for a client of our user or root and return the connection to it; None after `close`.

        Raises OSError if listening itself has failed.
        """
        with self._accepting:
            while not self._closing.is_set():
                self._events.poll()
                if connection := self._take():
                    return connection
            return None

    def close(self) -> None:
        """Stop listening and remove our socket file. Connections go on. A second call does nothing."""
        if not self._closing.is_set():
            self._closing.set()
            os.write(self._wake, b"\0")
        with self._accepting:
            self._undo.close()

    def _take(self) -> socket.socket | None:
        """Return the waiting connection, unless there is none after all or its peer is a stranger."""
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            if error.errno in _SCARCE:
                log.warning("a client has to wait: %s", error.strerror)
                self._closing.wait(_SCARCE_PAUSE_SECONDS)
            elif error.errno not in _PASSING:
                raise
            return None
        connection.setblocking(True)  # macOS hands down the listener's mode.
        if self._admits(connection):
            return connection
        connection.close()
        return None

    def _admits(self, connection: socket.socket) -> bool:
        try:
            uid = peer_uid(connection)
        except OSError:
            return False  # macOS has forgotten a peer that is already gone.
        if not _is_trusted(uid) and uid not in self._strangers:
            self._strangers.add(uid)
            log.info("refused a client of another user (uid %d); further ones are refused silently", uid)
        return _is_trusted(uid)


def peer_uid(connection: socket.socket) -> int:
    """Return the effective user id that the peer had when it connected or, as a server, began to listen."""
    if sys.platform == "darwin":
        # SOL_LOCAL, LOCAL_PEERCRED; struct xucred begins with its version and the uid.
        return struct.unpack_from("=II", connection.getsockopt(0, 1, 76))[1]
    return struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]


def notify_ready(environ: Mapping[str, str]) -> None:
    """Tell systemd, if it asked for it, that clients will be served. Never raises."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
        notifier.settimeout(_NOTIFY_TIMEOUT_SECONDS)
        notifier.sendto(b"READY=1\n", f"\0{address[1:]}" if address[0] == "@" else address)


def _is_trusted(uid: int) -> bool:
    # Root can read our memory anyway; ssh-agent admits it for the same reason.
    return uid in (0, os.geteuid())
