import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from mlx_sidecar.runtime.server.unix_socket import AlreadyServed, Listener, SocketError, connect

PATIENCE_SECONDS = 30
STRANGER = 65534
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

SERVE = """
import sys
from pathlib import Path
from mlx_sidecar.runtime.server.unix_socket import Listener
listener = Listener.bind(Path(sys.argv[1]))
print("listening", flush=True)
listener.accept()
"""


def leave_stale_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()


def accept(listener: Listener) -> socket.socket:
    connection = listener.accept()
    assert connection is not None
    return connection


def inode(path: Path) -> int:
    return path.lstat().st_ino


def fill_backlog(path: Path) -> list[socket.socket]:
    """Connect until the queue of the server at `path` is full."""
    waiting: list[socket.socket] = []
    while True:
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        waiting.append(client)
        try:
            client.connect(str(path))
        except OSError:
            return waiting


# The place


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o770, 0o701, 0o1777])
def test_a_folder_that_others_may_enter_is_refused(socket_path: Path, mode: int) -> None:
    folder = socket_path.parent
    folder.chmod(mode)
    with pytest.raises(SocketError, match=f"open to other users \\(mode {mode:04o}\\)"):
        Listener.bind(folder / "s")
    assert list(folder.iterdir()) == []


def test_a_symbolic_link_to_a_folder_is_refused(socket_path: Path) -> None:
    folder = socket_path.parent
    real, link = folder / "real", folder / "link"
    real.mkdir(mode=0o700)
    link.symlink_to(real)
    with pytest.raises(SocketError, match="symbolic link"):
        Listener.bind(link / "s")
    assert list(real.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_refused(socket_path: Path) -> None:
    folder = socket_path.parent
    (folder / "file").touch()
    with pytest.raises(SocketError, match="is not a folder"):
        Listener.bind(folder / "file" / "s")
    with pytest.raises(SocketError, match="cannot be used"):
        Listener.bind(folder / "file" / "deeper" / "s")


@ROOT_ONLY
def test_a_folder_of_another_user_is_refused(socket_path: Path) -> None:
    folder = socket_path.parent
    os.chown(folder, STRANGER, STRANGER)
    with pytest.raises(SocketError, match=f"another user \\(uid {STRANGER}\\)"):
        Listener.bind(folder / "s")


@pytest.mark.parametrize("use", [Listener.bind, connect])
def test_a_path_too_long_for_a_socket_is_explained(
    socket_path: Path, use: Callable[[Path], Listener | socket.socket]
) -> None:
    folder = socket_path.parent
    longest = 103 if sys.platform == "darwin" else 107
    path = folder / "new" / ("x" * (longest - len(str(folder)) - len("/new/") + 1))
    with pytest.raises(SocketError, match=f"{longest} bytes on this system; this one has {longest + 1}"):
        use(path)
    assert list(folder.iterdir()) == []


def test_the_longest_path_works(socket_path: Path) -> None:
    folder = socket_path.parent
    longest = 103 if sys.platform == "darwin" else 107
    path = folder / ("x" * (longest - len(str(folder)) - len("/")))
    with closing(Listener.bind(path)), connect(path):
        pass


def test_a_lock_file_that_is_a_link_is_refused(socket_path: Path) -> None:
    target = socket_path.with_name("target")
    socket_path.with_name("s.lock").symlink_to(target)
    with pytest.raises(SocketError, match="lock file"):
        Listener.bind(socket_path)
    assert not target.exists()


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, os.mkfifo, a_dangling_link])
def test_what_is_not_a_socket_is_left_alone(socket_path: Path, make: Callable[[Path], None]) -> None:
    make(socket_path)
    before = socket_path.lstat()
    with pytest.raises(SocketError, match="not a socket of yours"):
        Listener.bind(socket_path)
    assert socket_path.lstat() == before


@ROOT_ONLY
def test_a_socket_of_another_user_is_left_alone(socket_path: Path) -> None:
    leave_stale_socket(socket_path)
    os.chown(socket_path, STRANGER, STRANGER)
    with pytest.raises(SocketError, match="not a socket of yours"):
        Listener.bind(socket_path)
    assert socket_path.is_socket()


# Dead and live servers


def test_the_socket_of_a_dead_server_is_replaced(socket_path: Path) -> None:
    leave_stale_socket(socket_path)
    with closing(Listener.bind(socket_path)), connect(socket_path):
        pass


def test_the_socket_of_a_killed_server_is_replaced(socket_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVE, str(socket_path)], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"listening\n"
        server.send_signal(signal.SIGKILL)
        server.wait(PATIENCE_SECONDS)
    assert socket_path.is_socket()
    with closing(Listener.bind(socket_path)), connect(socket_path):
        pass


def test_a_second_server_leaves_the_first_alone(socket_path: Path) -> None:
    with closing(Listener.bind(socket_path)) as listener:
        before = inode(socket_path)
        second = subprocess.run(
            [sys.executable, "-c", SERVE, str(socket_path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        assert "AlreadyServed" in second.stderr
        assert second.stdout == ""
        assert inode(socket_path) == before
        with connect(socket_path) as client, accept(listener) as server:
            server.sendall(b"still here")
            assert client.recv(100) == b"still here"


def test_the_lock_alone_keeps_a_second_server_out(socket_path: Path) -> None:
    with closing(Listener.bind(socket_path)):
        socket_path.unlink()
        with pytest.raises(AlreadyServed):
            Listener.bind(socket_path)
        assert not socket_path.exists()


def test_the_lock_is_not_inherited_by_child_processes(socket_path: Path) -> None:
    listener = Listener.bind(socket_path)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False):
        listener.close()
        Listener.bind(socket_path).close()


@pytest.mark.parametrize("full", [False, True])
def test_a_live_server_without_our_lock_is_left_alone(socket_path: Path, full: bool) -> None:
    if full and sys.platform == "darwin":
        pytest.skip("macOS refuses a connection to a full queue as it does to a dead socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(socket_path))
        server.listen(0)
        before = inode(socket_path)
        waiting = fill_backlog(socket_path) if full else []
        with pytest.raises(AlreadyServed, match="live server"):
            Listener.bind(socket_path)
        assert inode(socket_path) == before
        for client in waiting:
            client.close()


def test_a_datagram_socket_in_use_is_left_alone(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(socket_path))
        with pytest.raises(AlreadyServed):
            Listener.bind(socket_path)
        assert socket_path.is_socket()


def test_a_refused_start_leaves_nothing_locked(socket_path: Path) -> None:
    socket_path.touch()
    with pytest.raises(SocketError):
        Listener.bind(socket_path)
    socket_path.unlink()
    Listener.bind(socket_path).close()


def test_of_racing_servers_exactly_one_wins(socket_path: Path) -> None:
    """One write releases all of them; in every other round the socket of a dead server is in the way."""
    racer = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from mlx_sidecar.runtime.server.unix_socket import AlreadyServed, Listener\n"
        "print('ready', flush=True)\n"
        "while os.read(int(sys.argv[2]), 1):\n"
        "    try:\n"
        "        listener = Listener.bind(Path(sys.argv[1]))\n"
        "    except AlreadyServed:\n"
        "        listener = None\n"
        "    print('lost' if listener is None else 'won', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    if listener is not None:\n"
        "        listener.close()\n"
        "    print('ready', flush=True)\n"
    )
    await_start, start = os.pipe()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", racer, str(socket_path), str(await_start)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[await_start],
        )
        for _ in range(8)
    ]

    def answers() -> list[str]:
        return [racer.stdout.readline().strip() for racer in racers if racer.stdout]

    try:
        for number in range(100):
            assert answers() == ["ready"] * 8
            if number % 2:
                leave_stale_socket(socket_path)
            os.write(start, b"x" * 8)
            assert sorted(answers()) == ["lost"] * 7 + ["won"]
            connect(socket_path).close()
            for process in racers:
                assert process.stdin is not None
                process.stdin.write("next\n")
                process.stdin.flush()
    finally:
        for process in racers:
            process.kill()
            process.communicate()
        os.close(await_start)
        os.close(start)
