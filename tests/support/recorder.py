"""Stands between a sidecar and its client, passes on every byte as it came, and keeps a copy.

    python recorder.py FOLDER COMMAND [ARGUMENTS]

This process becomes COMMAND, so its id, its signals and its exit code are the server's; a child of it does
the copying. What was said on a connection is left in FOLDER as NAME.said and NAME.heard. FOLDER/lock is held,
shared, until all of that is complete.
"""

import fcntl
import json
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple


class Recorder:
    """Copies connections into `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count()
        self._hearing: list[threading.Thread] = []

    def connect(self, client: tuple[int, int], server: tuple[int, int]) -> None:
        """Join a client and a server, each given by where to read from it and where to write to it."""
        name = f"{os.getpid()}-{next(self._numbers)}"
        said, heard = (self._folder / f"{name}.{what}" for what in ("said", "heard"))
        threading.Thread(target=pump, args=[client[0], server[1], said], daemon=True).start()
        self._hearing.append(threading.Thread(target=pump, args=[server[0], client[1], heard], daemon=True))
        self._hearing[-1].start()

    def finish(self) -> None:
        """Wait until all that the server said has been passed on. Call when it has ended."""
        for thread in self._hearing:
            thread.join()


class Plan(NamedTuple):
    """How to get between: descriptors that the server has as its own, and what is done meanwhile."""

    of_server: dict[int, int]
    record: Callable[[Recorder], None]


def main() -> None:
    folder, command = Path(sys.argv[1]), sys.argv[2:]
    lock = (folder / "lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_SH)
    # Only the server holds its other end, so it ends when the server does.
    lifeline, held_by_server = os.pipe()
    plan = plan_for(command)
    if os.fork() == 0:
        # Who kills all that belongs to the client means the server.
        os.setsid()
        os.close(held_by_server)
        for descriptor in plan.of_server.values():
            os.close(descriptor)
        recorder = Recorder(folder)
        plan.record(recorder)
        os.read(lifeline, 1)
        recorder.finish()
        os._exit(0)
    for standard, descriptor in plan.of_server.items():
        os.dup2(descriptor, standard)
    os.set_inheritable(held_by_server, True)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and what is ignored stays so.
    os.execvp(command[0], command)


def plan_for(command: list[str]) -> Plan:
    if "--pipe" in command:
        return over_pipe(Path(command[command.index("--pipe") + 1]))
    return over_sockets() if "--listen" in command else over_stdio()


def over_stdio() -> Plan:
    stdin, to_server = pair_like(0)
    from_server, stdout = pair_like(1)

    def record(recorder: Recorder) -> None:
        recorder.connect((0, 1), (from_server, to_server))

    return Plan({0: stdin, 1: stdout}, record)


def over_pipe(path: Path) -> Plan:
    listener, behind = stand_in(path)

    def accept_server(recorder: Recorder) -> None:
        server, _ = listener.accept()
        recorder.connect(both(connected(behind)), both(server))
        for file in (path, behind):
            file.unlink(missing_ok=True)

    def record(recorder: Recorder) -> None:
        threading.Thread(target=accept_server, args=[recorder], daemon=True).start()

    return Plan({}, record)


def over_sockets() -> Plan:
    from_server, stdout = os.pipe()

    def accept_clients(recorder: Recorder, listener: socket.socket, behind: Path) -> None:
        while True:
            client, _ = listener.accept()
            recorder.connect(both(client), both(connected(behind)))

    def record(recorder: Recorder) -> None:
        announcement = b"".join(iter(lambda: os.read(from_server, 65536), b""))
        if announcement:
            listener, behind = stand_in(Path(json.loads(announcement)["path"]))
            threading.Thread(target=accept_clients, args=[recorder, listener, behind], daemon=True).start()
        os.write(1, announcement)
        os.close(1)

    return Plan({1: stdout}, record)


def stand_in(path: Path) -> tuple[socket.socket, Path]:
    """Listen in the place of the socket at `path`; return our socket and where the other one is now."""
    behind = path.rename(f"{path}~")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(socket.SOMAXCONN)
    return listener, behind


def connected(path: Path) -> socket.socket:
    other = socket.socket(socket.AF_UNIX)
    other.connect(str(path))
    return other


def both(connection: socket.socket) -> tuple[int, int]:
    """Return a socket as what to read from and what to write to."""
    descriptor = connection.detach()
    return descriptor, descriptor


def pair_like(descriptor: int) -> tuple[int, int]:
    """Return a reading and a writing end of the kind that `descriptor` is: sockets from Node, or a pipe."""
    if not is_socket(descriptor):
        return os.pipe()
    one, other = socket.socketpair()
    return one.detach(), other.detach()


def pump(source: int, sink: int, copy: Path) -> None:
    """Pass everything on until one end is gone, and let the other one know."""
    with copy.open("wb", buffering=0) as file, suppress(BrokenPipeError, ConnectionResetError):
        while data := os.read(source, 65536):
            file.write(data)
            while data:
                data = data[os.write(sink, data) :]
    end(source, socket.SHUT_RD)
    end(sink, socket.SHUT_WR)


def end(descriptor: int, direction: int) -> None:
    if not is_socket(descriptor):
        os.close(descriptor)
        return
    connection = socket.socket(fileno=descriptor)
    with suppress(OSError):  # It is not connected any more.
        connection.shutdown(direction)
    connection.detach()


def is_socket(descriptor: int) -> bool:
    return stat.S_ISSOCK(os.fstat(descriptor).st_mode)


if __name__ == "__main__":
    main()
