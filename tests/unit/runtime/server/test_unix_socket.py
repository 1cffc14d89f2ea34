import errno
import logging
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import closing, contextmanager
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue

import pytest

from mlx_sidecar.runtime.server.unix_socket import (
    AlreadyServed,
    Listener,
    SocketError,
    connect,
    notify_ready,
    peer_uid,
)

PATIENCE_SECONDS = 30
STRANGER = 65534
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
NOT_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root is trusted whoever we are")


def background_accept(listener: Listener) -> SimpleQueue[socket.socket | None]:
    """Accept on a thread, as the server does, until the listener is closed; None comes last."""
    accepted: SimpleQueue[socket.socket | None] = SimpleQueue()

    def run() -> None:
        while (connection := listener.accept()) is not None:
            accepted.put(connection)
        accepted.put(None)

    threading.Thread(target=run, daemon=True).start()
    return accepted


def open_descriptors() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


@contextmanager
def started(command: list[str], pass_fds: tuple[int, ...] = ()) -> Generator[subprocess.Popen[bytes]]:
    """Start a process with pipes for its output; it is gone at the end, whatever a test found."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=pass_fds
    ) as process:
        try:
            yield process
        finally:
            process.kill()


# Serving


def test_client_and_server_talk_over_blocking_sockets_that_children_do_not_inherit(socket_path: Path) -> None:
    with closing(Listener.bind(socket_path)) as listener:
        accepted = background_accept(listener)
        with connect(socket_path) as client:
            server = accepted.get(timeout=PATIENCE_SECONDS)
            assert server is not None
            with server:
                client.sendall(b"to the server")
                assert server.recv(100) == b"to the server"
                server.sendall(b"to the client")
                assert client.recv(100) == b"to the client"
                for end in (client, server):
                    assert end.getblocking()
                    assert not end.get_inheritable()
                    assert peer_uid(end) == os.geteuid()


def test_the_folder_is_made_private_and_the_socket_is_ours_alone(socket_path: Path) -> None:
    folder = socket_path.parent
    path = folder / "new" / "s"
    before = os.umask(0)
    try:
        with closing(Listener.bind(path)) as listener:
            assert listener.address == str(path)
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.with_name("s.lock").stat().st_mode) == 0o600
            assert os.umask(0) == 0, "the umask belongs to the whole process"
    finally:
        os.umask(before)


def test_a_relative_path_is_where_clients_find_it_after_a_change_of_folder(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = socket_path.parent
    monkeypatch.chdir(folder)
    listener = Listener.bind(Path("s"))
    monkeypatch.chdir("/")
    assert listener.address == str(folder / "s")
    listener.close()
    assert not (folder / "s").exists()


def test_closing_wakes_the_thread_that_accepts_and_later_calls_return_at_once(socket_path: Path) -> None:
    listener = Listener.bind(socket_path)
    accepted = background_accept(listener)
    with connect(socket_path):
        server = accepted.get(timeout=PATIENCE_SECONDS)
        assert server is not None
        listener.close()
        assert accepted.get(timeout=PATIENCE_SECONDS) is None
        assert listener.accept() is None
        listener.close()
        server.sendall(b"still here")
        server.close()


def test_closing_and_being_refused_give_every_descriptor_back(socket_path: Path) -> None:
    Listener.bind(socket_path).close()
    before = open_descriptors()
    with closing(Listener.bind(socket_path)), pytest.raises(AlreadyServed):
        Listener.bind(socket_path)
    socket_path.touch()
    for use in (Listener.bind, connect):
        with pytest.raises(SocketError):
            use(socket_path)
    assert open_descriptors() == before


def test_closing_removes_the_socket_and_lets_the_next_server_in(socket_path: Path) -> None:
    Listener.bind(socket_path).close()
    assert not socket_path.exists()
    Listener.bind(socket_path).close()


def test_closing_leaves_a_file_alone_that_took_the_place_of_our_socket(socket_path: Path) -> None:
    listener = Listener.bind(socket_path)
    socket_path.unlink()
    with socket.socket(socket.AF_UNIX) as successor:
        successor.bind(str(socket_path))
        theirs = socket_path.lstat().st_ino
        listener.close()
        assert socket_path.lstat().st_ino == theirs


def test_running_out_of_descriptors_delays_a_client_and_loses_nobody(
    socket_path: Path,
) -> None:
    script = """
import logging, os, resource, sys
from pathlib import Path
from mlx_sidecar.runtime.server.unix_socket import Listener, connect

soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
warnings = 0

class Relief(logging.Handler):
    def emit(self, record):
        global warnings
        warnings += 1
        print(record.getMessage(), file=sys.stderr)
        if warnings == 2:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

logging.getLogger("server").addHandler(Relief())
listener = Listener.bind(Path(sys.argv[1]))
client = connect(Path(sys.argv[1]))
free = os.dup(0)
os.close(free)
resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
server = listener.accept()
server.sendall(b"welcome")
assert client.recv(100) == b"welcome"
assert warnings == 2
listener.close()
"""
    done = python(script, socket_path)
    assert done.returncode == 0, done.stderr
    assert os.strerror(errno.EMFILE) in done.stderr
    assert str(socket_path) not in done.stderr


def test_closing_ends_the_wait_for_descriptors(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A pause that only the closing can end.
    monkeypatch.setattr("mlx_sidecar.runtime.server.unix_socket._SCARCE_PAUSE_SECONDS", 1e6)
    records: SimpleQueue[logging.LogRecord] = SimpleQueue()
    handler = QueueHandler(records)
    logging.getLogger("server").addHandler(handler)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    listener = Listener.bind(socket_path)
    try:
        with connect(socket_path):
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            accepted = background_accept(listener)
            records.get(timeout=PATIENCE_SECONDS)
            listener.close()
            assert accepted.get(timeout=PATIENCE_SECONDS) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        logging.getLogger("server").removeHandler(handler)
        listener.close()


# Strangers


@ROOT_ONLY
def test_clients_of_another_user_are_dropped_unheard_and_ours_are_served(
    socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server")
    with closing(Listener.bind(socket_path)) as listener:
        socket_path.parent.chmod(0o711)
        socket_path.chmod(0o666)
        accepted = background_accept(listener)
        script = (
            "import os, socket, sys\n"
            "os.setgroups([])\n"
            "os.setgid(int(sys.argv[2]))\n"
            "os.setuid(int(sys.argv[2]))\n"
            "for _ in range(3):\n"
            "    client = socket.socket(socket.AF_UNIX)\n"
            "    client.connect(sys.argv[1])\n"
            "    assert client.recv(1) == b'', 'the server must close'\n"
        )
        done = python(script, socket_path, STRANGER)
        assert done.returncode == 0, done.stderr
        with connect(socket_path):
            server = accepted.get(timeout=PATIENCE_SECONDS)
            assert server is not None
            assert peer_uid(server) == os.geteuid()
            server.close()
        assert accepted.empty()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert str(STRANGER) in lines[0]
    assert str(socket_path) not in lines[0]


@NOT_ROOT
def test_a_client_who_is_not_our_user_is_dropped(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Listener.bind(socket_path)) as listener:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(socket_path))
            me = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: me + 1)
            accepted = background_accept(listener)
            assert client.recv(1) == b""
        monkeypatch.undo()
        assert accepted.empty()


@ROOT_ONLY
def test_a_host_of_another_user_is_not_talked_to(socket_path: Path) -> None:
    script = (
        "import os, socket, sys\n"
        "host = socket.socket(socket.AF_UNIX)\n"
        "host.bind(sys.argv[1])\n"
        "os.setuid(int(sys.argv[2]))\n"
        "host.listen()\n"
        "print('listening', flush=True)\n"
        "client, _ = host.accept()\n"
        "assert client.recv(1) == b'', 'nothing may be said'\n"
    )
    with started([sys.executable, "-c", script, str(socket_path), str(STRANGER)]) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"listening\n"
        with pytest.raises(SocketError, match=f"another user.*{STRANGER}"):
            connect(socket_path)
        assert host.wait(PATIENCE_SECONDS) == 0


# Connecting to a host


def test_a_host_that_never_listened_is_explained(socket_path: Path) -> None:
    with pytest.raises(SocketError, match="There is no socket at"):
        connect(socket_path)
    socket_path.touch()
    with pytest.raises(SocketError, match="There is no socket at"):
        connect(socket_path / "below")


def test_a_host_that_listens_no_more_is_explained(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as host:
        host.bind(str(socket_path))
        host.listen()
    with pytest.raises(SocketError, match="Nobody listens at"):
        connect(socket_path)


def test_a_file_in_the_place_of_the_hosts_socket_is_explained(socket_path: Path) -> None:
    socket_path.touch()
    with pytest.raises(SocketError, match="is not a socket"):
        connect(socket_path)


def test_a_datagram_socket_of_the_host_is_explained(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as host:
        host.bind(str(socket_path))
        with pytest.raises(SocketError, match="Cannot connect to"):
            connect(socket_path)


# Started by systemd

ADOPT = """
import os, sys
from mlx_sidecar.runtime.server.unix_socket import Listener
listener = Listener.adopt(os.environ)
print(listener.address, [name for name in os.environ if name.startswith("LISTEN_")], os.get_inheritable(3))
sys.stdout.flush()
connection = listener.accept()
connection.sendall(b"adopted" if connection.getblocking() else b"not blocking")
listener.close()
"""


def activate(passed: socket.socket | None, **environ: str) -> list[str]:
    """Return a command that hands `passed` on as descriptor 3, the way systemd does."""
    settings = {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "mlx", **environ}
    activator = (
        "import os, sys\n"
        f"os.environ |= {{'LISTEN_PID': str(os.getpid())}} | {settings!r}\n"
        + (f"os.dup2({passed.fileno()}, 3)\n" if passed else "os.closerange(3, 4)\n")
        + f"os.execv(sys.executable, [sys.executable, '-c', {ADOPT!r}])\n"
    )
    return [sys.executable, "-c", activator]


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_socket_from_systemd_is_served_and_its_file_stays(socket_path: Path, count: int) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(socket_path))
        made.listen()
        with started(activate(made, LISTEN_FDS=str(count)), (made.fileno(),)) as server:
            assert server.stdout is not None
            assert server.stdout.readline().decode().split(" ", 1) == [str(socket_path), "[] False\n"]
            with connect(socket_path) as client:
                assert client.recv(100) == b"adopted"
            _, log = server.communicate(timeout=PATIENCE_SECONDS)
            assert (b"only the first is served" in log) == (count > 1)
            assert server.returncode == 0
    assert socket_path.is_socket()


@pytest.mark.parametrize(
    ("kind", "environ", "explanation"),
    [
        ("listening", {"LISTEN_PID": "1"}, "No socket was passed"),
        ("listening", {"LISTEN_FDS": "0"}, "No socket was passed"),
        ("listening", {"LISTEN_FDS": "-1"}, "No socket was passed"),
        ("listening", {"LISTEN_FDS": "many"}, "No socket was passed"),
        ("none", {}, "Descriptor 3 is not a socket"),
        ("bound", {}, "not a listening Unix stream socket"),
        ("datagram", {}, "not a listening Unix stream socket"),
        ("packets", {}, "not a listening Unix stream socket"),
        ("tcp", {}, "not a listening Unix stream socket"),
    ],
)
def test_anything_else_that_was_passed_is_refused(
    socket_path: Path, kind: str, environ: dict[str, str], explanation: str
) -> None:
    if kind == "packets" and sys.platform == "darwin":
        pytest.skip("macOS has no Unix sockets of this type")
    family = socket.AF_INET if kind == "tcp" else socket.AF_UNIX
    types = {"datagram": socket.SOCK_DGRAM, "packets": socket.SOCK_SEQPACKET}
    with socket.socket(family, types.get(kind, socket.SOCK_STREAM)) as made:
        made.bind(("127.0.0.1", 0) if kind == "tcp" else str(socket_path))
        if kind in ("listening", "packets", "tcp"):
            made.listen()
        command = activate(None if kind == "none" else made, **environ)
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            pass_fds=[made.fileno()],
            timeout=PATIENCE_SECONDS,
        )
    assert "SocketError: " in done.stderr
    assert explanation in done.stderr
    assert done.stdout == ""


def test_the_variables_are_removed_even_when_they_are_not_for_us() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "HOME": "/"}
    with pytest.raises(SocketError):
        Listener.adopt(environ)
    assert environ == {"HOME": "/"}


def notify_addresses() -> list[str]:
    return ["path", "@abstract"] if sys.platform == "linux" else ["path"]


@pytest.mark.parametrize("kind", notify_addresses())
def test_systemd_is_told_that_we_are_ready(socket_path: Path, kind: str) -> None:
    address = str(socket_path) if kind == "path" else f"@{socket_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0"))
        manager.settimeout(PATIENCE_SECONDS)
        notify_ready({"NOTIFY_SOCKET": address})
        assert manager.recv(100).split(b"\n") == [b"READY=1", b""]


@pytest.mark.parametrize("address", [None, "", "vsock:2:1", "/nowhere/notify", "@" + "x" * 200, "@nobody"])
def test_nobody_to_tell_is_no_reason_to_fail(address: str | None) -> None:
    notify_ready({} if address is None else {"NOTIFY_SOCKET": address})


def test_importing_the_transport_brings_nothing_that_is_slow_to_import() -> None:
    script = (
        "import sys\n"
        "import mlx_sidecar.runtime.server.unix_socket\n"
        "slow = {'anyio', 'asyncio', 'msgspec', 'mlx', 'numpy', 'ctypes', 'subprocess'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    done = python(script)
    assert done.returncode == 0, done.stderr
