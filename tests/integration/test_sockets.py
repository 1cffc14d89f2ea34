"""Unix sockets through the real process: many guests of one server, and a host that listens itself."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import END, make_tokenizer
from support.wire import COMMAND, PATIENCE_SECONDS, Guest, Listening, Sidecar, lines

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.protocol.framing import Framing

NO_END = {str(make_tokenizer().token_to_id(END)): -1000}
FINITE: dict[str, Any] = {"tokens": [1], "maxTokens": 100, "logitBias": NO_END}
ENDLESS: dict[str, Any] = {"tokens": [1], "maxTokens": 10**9, "logitBias": {"3": 1000}}


HANDED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def guests(listening_server: Listening) -> Generator[list[Guest]]:
    """Two clients of the server that many tests share."""
    guests = [listening_server.connect() for _ in range(2)]
    yield guests
    for guest in guests:
        guest.close()


def refused(*arguments: str | Path) -> tuple[int, str, bytes]:
    done = subprocess.run(
        [COMMAND, "serve", *arguments], capture_output=True, check=False, timeout=PATIENCE_SECONDS
    )
    return done.returncode, done.stderr.decode(), done.stdout


def forced(token: int) -> dict[str, Any]:
    return FINITE | {"logitBias": {str(token): 1000}}


# Many guests


def test_the_server_says_where_it_listens_in_one_line_and_nothing_else_ever(
    listening_server: Listening,
) -> None:
    (line,) = listening_server.announcement.splitlines(keepends=True)
    assert json.loads(line) == {"event": "listening", "path": str(listening_server.path)}
    assert line.endswith(b"\n")


def test_guests_share_the_models_and_the_process(guests: list[Guest], model: str) -> None:
    infos = [guest.result("server/info") for guest in guests]
    assert infos[0]["instanceId"] == infos[1]["instanceId"]
    for guest in guests:
        assert model in {entry["model"] for entry in guest.result("models")["models"]}


def test_every_guest_has_to_initialize(listening_server: Listening, guests: list[Guest]) -> None:
    assert "models" in guests[0].result("models")
    with Guest.at(listening_server.path) as stranger:
        assert stranger.error("models")["data"]["kind"] == "not_initialized"
        assert stranger.result("ping")["state"] == "ready"


def test_the_same_ids_and_tokens_of_two_guests_are_not_confused(guests: list[Guest], model: str) -> None:
    sent = [
        guest.send("generate", model=model, **forced(token), partialResultToken="same")
        for guest, token in zip(guests, (5, 6), strict=True)
    ]
    assert sent[0] == sent[1]
    for guest, request_id, token in zip(guests, sent, (5, 6), strict=True):
        result = guest.response(request_id)["result"]
        pieces = guest.progress("same")
        assert [t for piece in pieces for t in piece["tokens"]] == [token] * 100
        assert sum(piece.get("merged", 1) for piece in pieces) == result["lastSeq"] == 100


def test_a_cancel_reaches_only_the_guest_who_said_it(guests: list[Guest], roomy: str) -> None:
    first, second = guests
    sent = [guest.send("generate", model=roomy, **ENDLESS, partialResultToken=1) for guest in (first, second)]
    while not second.progress(1):
        second.result("ping")
    first.notify("$/cancelRequest", id=sent[0])
    assert first.response(sent[0])["result"]["finishReason"] == "cancelled"
    assert second.result("ping")["inFlight"] == 1
    second.notify("$/cancelRequest", id=sent[1])
    assert second.response(sent[1])["result"]["finishReason"] == "cancelled"


@pytest.mark.parametrize("politely", [True, False], ids=["closed", "reset"])
def test_a_guest_who_is_lost_mid_stream_has_its_generation_cancelled_and_costs_the_others_nothing(
    listening_server: Listening, guests: list[Guest], model: str, roomy: str, politely: bool
) -> None:
    stays = guests[0]
    alone = stays.result("generate", model=model, **FINITE)["tokens"]
    requests = stays.result("stats")["requests"]
    before, failed = requests["cancelled"], requests["failed"]
    lost = listening_server.connect()
    lost.send("generate", model=roomy, **ENDLESS, partialResultToken="t")
    while not lost.progress("t"):
        lost.result("ping")
    running = stays.send("generate", model=model, **FINITE)
    if not politely:
        # Closing while something is unread makes the server's next write fail.
        lost.send("rpc.discover")
    lost.close()
    stats = stays.stats_when(lambda stats: stats["requests"]["cancelled"] == before + 1)
    assert stats["requests"]["failed"] == failed
    assert stays.response(running)["result"]["tokens"] == alone
    stays.stats_when(lambda stats: stats["engine"]["sequences"] == 0)


def test_who_has_said_all_still_gets_every_answer_and_then_the_end(
    listening_server: Listening, model: str
) -> None:
    with listening_server.connect() as guest:
        streamed = guest.send("generate", model=model, **FINITE, partialResultToken="t")
        whole = guest.send("generate", model=model, **FINITE)
        guest.end_input()
        results = {message["id"]: message["result"] for message in guest.rest() if "id" in message}
        assert results[streamed]["usage"] == results[whole]["usage"]
        assert results.keys() == {streamed, whole}


def test_garbage_from_one_guest_costs_another_nothing(
    listening_server: Listening, guests: list[Guest], model: str
) -> None:
    with Guest.at(listening_server.path) as bad, Guest.at(listening_server.path) as worse:
        bad.write(b"\x00\xff garbage\n" * 1000 + b"x" * 100_000)
        worse.write(b"Content-Length: -5\r\n\r\n")
        assert guests[0].result("generate", model=model, **FINITE)["usage"]["completionTokens"] == 100
        for _ in range(1000):
            assert bad.read()["error"]["data"]["kind"] == "parse_error"
        assert b"-32600" in worse.socket.recv(10_000)
        assert worse.socket.recv(10_000) == b""
        bad.write(b"\n")
        assert bad.read()["error"]["data"]["kind"] == "parse_error"
        assert bad.result("ping")["state"] == "ready"


def test_each_connection_has_its_own_framing(listening_server: Listening, guests: list[Guest]) -> None:
    with Guest.at(listening_server.path) as other:
        other.write(Framing.LSP.wrap(b'{"jsonrpc":"2.0","id":1,"method":"ping"}'))
        assert other.socket.recv(10_000).startswith(b"Content-Length: ")
        assert guests[0].result("ping")["state"] == "ready"


def test_shutdown_and_exit_end_one_connection_only(
    listening_server: Listening, guests: list[Guest], roomy: str
) -> None:
    leaves, stays = listening_server.connect(), guests[0]
    generate = leaves.send("generate", model=roomy, **ENDLESS)
    assert leaves.result("shutdown") is None
    assert leaves.response(generate)["result"]["finishReason"] == "cancelled"
    assert leaves.error("ping")["data"]["kind"] == "shutting_down"
    assert stays.result("ping")["inFlight"] == 0
    leaves.notify("exit")
    assert leaves.rest() == []
    leaves.close()
    assert stays.result("ping")["state"] == "ready"


def test_one_guest_too_many_is_turned_away_and_nobody_else(
    listening_server: Listening, guests: list[Guest], tmp_path: Path
) -> None:
    most = Settings(home=tmp_path).max_connections
    crowd: list[Guest] = []
    try:
        while len(crowd) < 2 * most:
            crowd.append(Guest.at(listening_server.path))
            try:
                crowd[-1].write(lines({"id": 1, "method": "ping"}))
            except BrokenPipeError:
                break
            if crowd[-1].line() is None:
                break
        assert most / 2 < len(crowd) <= most + 1
        for guest in (*guests, *crowd[:-1]):
            assert guest.result("ping")["state"] == "ready"
    finally:
        for guest in crowd:
            guest.close()


# One server


def test_a_signal_ends_all_in_order(socket_path: Path, roomy: str) -> None:
    with Listening(socket_path) as server:
        guests = [server.connect() for _ in range(3)]
        guests[0].result("load", model=roomy)
        sent = [guest.send("generate", model=roomy, **ENDLESS, partialResultToken="t") for guest in guests]
        for guest in guests:
            while not guest.progress("t"):
                guest.result("ping")
        server.process.terminate()
        for guest, request_id in zip(guests, sent, strict=True):
            *_, last = guest.rest()
            assert (last["id"], last["result"]["finishReason"]) == (request_id, "cancelled")
            assert last["result"]["lastSeq"] > 0
            guest.close()
        assert server.wait() == 128 + signal.SIGTERM
        assert not socket_path.exists()
        assert b"Traceback" not in server.stderr


def test_a_signal_right_after_the_announcement_ends_in_order_too(socket_path: Path) -> None:
    # A manager whose queue is full holds the server up where it has said that clients may come.
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler,
    ):
        manager.bind(str(socket_path.parent / "n"))
        filler.setblocking(False)
        try:
            while True:
                filler.sendto(b"x", manager.getsockname())
        except BlockingIOError:
            pass
        with Listening(socket_path, env={"NOTIFY_SOCKET": manager.getsockname()}) as server:
            server.process.terminate()
            assert server.wait() == 128 + signal.SIGTERM
            assert not socket_path.exists()


def test_a_second_server_leaves_the_first_alone(listening_server: Listening, guests: list[Guest]) -> None:
    code, said, announced = refused("--listen", listening_server.path)
    assert (code, announced) == (75, b"")
    assert "already" in said
    assert "Traceback" not in said
    assert guests[0].result("ping")["state"] == "ready"
    with listening_server.connect() as late:
        assert late.result("ping")["state"] == "ready"


def test_the_socket_of_a_server_that_was_killed_is_taken_over(socket_path: Path) -> None:
    with Listening(socket_path) as killed:
        killed.process.kill()
        assert killed.wait() == -signal.SIGKILL
    assert socket_path.exists()
    with Listening(socket_path) as server, server.connect() as guest:
        assert guest.result("ping")["state"] in ("starting", "ready")


def test_a_folder_that_others_may_enter_is_refused(socket_path: Path) -> None:
    socket_path.parent.chmod(0o755)
    code, said, announced = refused("--listen", socket_path)
    assert (code, announced) == (2, b"")
    assert "0755" in said
    assert len(said.splitlines()) == 1
    assert not socket_path.exists()


def test_a_path_that_is_too_long_is_refused(socket_path: Path) -> None:
    code, said, _ = refused("--listen", socket_path.parent / ("x" * 200))
    assert (code, len(said.splitlines())) == (2, 1)


def test_a_server_that_is_handed_its_socket_serves_it_and_leaves_it_there(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(socket_path))
        listening.listen()
        handed = [sys.executable, "-c", HANDED, str(listening.fileno()), COMMAND, "serve", "--listen-fds"]
        with subprocess.Popen(
            handed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[listening.fileno()]
        ) as server:
            assert server.stdout is not None
            assert json.loads(server.stdout.read()) == {"event": "listening", "path": str(socket_path)}
            with Guest.at(socket_path) as guest:
                guest.initialize()
                assert guest.result("models") == {"models": []}
            server.terminate()
            server.communicate(timeout=PATIENCE_SECONDS)
            assert server.returncode == 128 + signal.SIGTERM
        assert socket_path.exists()


def test_without_a_socket_that_was_passed_there_is_nothing_to_serve() -> None:
    code, said, announced = refused("--listen-fds")
    assert (code, len(said.splitlines()), announced) == (2, 1, b"")


# A host that listens


def test_a_host_that_listens_is_connected_to_and_decides_when_it_ends(socket_path: Path, model: str) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(socket_path))
        listening.listen()
        with Sidecar("--pipe", socket_path) as sidecar, Guest(listening.accept()[0]) as host:
            host.initialize(processId=os.getpid())
            host.result("load", model=model)
            generate = host.send("generate", model=model, **FINITE, partialResultToken="t")
            assert host.response(generate)["result"]["lastSeq"] == host.progress("t")[-1]["seq"]
            assert host.result("shutdown") is None
            host.notify("exit")
            assert sidecar.wait() == 0
            assert host.rest()[-1]["params"]["token"] == "t"
    assert b"Traceback" not in sidecar.stderr


@pytest.mark.parametrize("how", ["hangs up", "has said all"])
def test_the_end_of_the_connection_is_the_end_of_a_server_that_has_one_host(
    socket_path: Path, model: str, how: str
) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(socket_path))
        listening.listen()
        with Sidecar("--pipe", socket_path) as sidecar, Guest(listening.accept()[0]) as host:
            host.initialize()
            host.result("load", model=model)
            generate = host.send("generate", model=model, **FINITE)
            if how == "hangs up":
                host.close()
            else:
                host.end_input()
                assert host.response(generate)["result"]["finishReason"] == "length"
            assert sidecar.wait() == 0


def test_a_host_that_does_not_listen_is_an_error_of_one_line(socket_path: Path) -> None:
    code, said, _ = refused("--pipe", socket_path)
    assert (code, len(said.splitlines())) == (2, 1)
