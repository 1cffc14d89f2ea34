import json
import queue
import socket
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import pytest
from support.channels import PATIENCE_SECONDS, FarEnd

from mlx_sidecar.protocol.framing import Framing
from mlx_sidecar.runtime.api.presence import PresenceApi
from mlx_sidecar.runtime.server.connection import Connection
from mlx_sidecar.runtime.server.intake import Incoming
from mlx_sidecar.runtime.server.peer import Peer, PeerEvent
from mlx_sidecar.runtime.telemetry.vitals import Vitals

AHEAD = 16


class Loop:
    """Stands for the event loop: calls what was posted to it, when the test says so, and notes what came."""

    def __init__(self, peer: Peer) -> None:
        self.seen: list[Any] = []
        self._posted: queue.Queue[Callable[[], None]] = queue.Queue()
        peer.attach(cast(Connection, self), self._posted.put)

    @property
    def waiting(self) -> int:
        return self._posted.qsize()

    def turn(self) -> None:
        self._posted.get(timeout=PATIENCE_SECONDS)()

    def until(self, *expected: Any) -> None:
        while len(self.seen) < len(expected):
            self.turn()
        assert self.seen == list(expected)

    def take(self, incoming: list[Incoming]) -> None:
        self.seen += [item.id for item in incoming]

    def happened(self, event: PeerEvent) -> None:
        self.seen.append(event)


@pytest.fixture
def far() -> Generator[FarEnd]:
    far = FarEnd()
    yield far
    far.close()
    for thread in threading.enumerate():
        if thread.name in ("reader", "writer"):
            thread.join(PATIENCE_SECONDS)
    far.channel.release()


def new_peer(far: FarEnd, framing: Framing | None = None) -> Peer:
    peer = Peer(far.channel, PresenceApi(Vitals()).methods(), framing)
    peer.intake.initialized = True
    return peer


def request(request_id: int, method: str = "models", **params: Any) -> dict[str, Any]:
    return {"id": request_id, "method": method, "params": params}


def threads(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def test_a_host_that_has_spoken_is_greeted_with_its_answers_on_our_own_thread(far: FarEnd) -> None:
    far.say(request(1, "ping"))
    before = threading.active_count()
    new_peer(far).greet()
    assert far.hear()["result"]["state"] == "starting"
    assert threading.active_count() == before


def test_a_host_that_is_silent_is_not_waited_for(far: FarEnd) -> None:
    new_peer(far).greet()


def test_what_came_before_there_was_a_loop_is_handed_on_in_order_when_there_is_one(far: FarEnd) -> None:
    peer = new_peer(far)
    far.say(request(1))
    peer.greet()
    peer.start()
    far.say(request(2), request(3, "ping"))
    assert far.hear()["id"] == 3
    loop = Loop(peer)
    loop.until(1, 2)
    far.close()
    loop.until(1, 2, PeerEvent.INPUT_ENDED, PeerEvent.GONE, PeerEvent.BROKEN)


def test_ping_is_answered_while_the_loop_is_busy(far: FarEnd) -> None:
    peer = new_peer(far)
    loop = Loop(peer)
    peer.start()
    far.say(request(1), request(2, "ping"))
    assert far.hear()["result"]["inFlight"] == 1
    assert loop.seen == []


def test_the_end_of_the_input_comes_after_the_last_request_and_answers_still_go_out(far: FarEnd) -> None:
    peer = new_peer(far)
    loop = Loop(peer)
    peer.start()
    far.socket.sendall(json.dumps({"jsonrpc": "2.0"} | request(1)).encode())
    far.socket.shutdown(socket.SHUT_WR)
    loop.until(1, PeerEvent.INPUT_ENDED)
    peer.outbox.send(b'"answer"')
    assert far.hear() == "answer"
    far.close()
    loop.until(1, PeerEvent.INPUT_ENDED, PeerEvent.GONE, PeerEvent.BROKEN)


def test_lost_framing_is_reported_and_nothing_more_is_read(far: FarEnd) -> None:
    peer = new_peer(far)
    loop = Loop(peer)
    peer.start()
    far.socket.sendall(b"Content-Length: x\r\n\r\n")
    loop.until(PeerEvent.FRAMING_LOST)
    far.socket.sendall(Framing.LSP.wrap(b'{"jsonrpc":"2.0","id":1,"method":"models"}'))
    peer.channel.close()
    loop.until(PeerEvent.FRAMING_LOST, PeerEvent.GONE, PeerEvent.BROKEN)


def test_framing_lost_in_the_first_words_is_noticed_too(far: FarEnd) -> None:
    peer = new_peer(far)
    far.socket.sendall(b"Content-Length: x\r\n\r\n")
    peer.greet()
    peer.start()
    Loop(peer).until(PeerEvent.FRAMING_LOST)
    peer.channel.close()


def test_pinned_framing_is_not_guessed(far: FarEnd) -> None:
    peer = new_peer(far, Framing.NDJSON)
    peer.start()
    far.socket.sendall(b"Content-Length: 2\n")
    assert far.hear()["error"]["data"]["kind"] == "parse_error"
    peer.channel.close()


def test_a_peer_that_stops_reading_is_reported_once(far: FarEnd) -> None:
    peer = new_peer(far)
    loop = Loop(peer)
    peer.start()
    peer.outbox.send(b"x" * 10_000_000)
    far.socket.shutdown(socket.SHUT_RD)
    loop.until(PeerEvent.BROKEN)
    peer.outbox.send(b"more")
    far.close()
    loop.until(PeerEvent.BROKEN, PeerEvent.INPUT_ENDED, PeerEvent.GONE)


def test_a_peer_that_floods_us_is_read_no_further_than_the_loop_follows(far: FarEnd) -> None:
    peer = new_peer(far)
    loop = Loop(peer)
    peer.start()
    requests = [request(n, "tokenize", model="m", text="x" * 300_000) for n in range(60)]
    talking = threading.Thread(target=far.say, args=requests, daemon=True)
    talking.start()
    most = 0
    while len(loop.seen) < len(requests):
        # Each of these has filled a chunk or more.
        most = max(most, loop.waiting)
        loop.turn()
    talking.join(PATIENCE_SECONDS)
    assert loop.seen == list(range(60))
    assert most <= AHEAD
    peer.channel.close()


def test_what_the_loop_cannot_take_does_not_stop_the_reading(far: FarEnd) -> None:
    peer = new_peer(far)
    loop = Loop(peer)
    take = loop.take

    def fail(incoming: list[Incoming]) -> None:
        raise RuntimeError(incoming)

    loop.take = fail
    peer.start()
    for n in range(2 * AHEAD):
        far.say(request(n))
        with pytest.raises(RuntimeError):
            loop.turn()
    loop.take = take
    far.say(request(99))
    loop.until(99)
    peer.channel.close()


def test_peers_that_come_and_go_leave_no_thread_and_no_descriptor() -> None:
    def held() -> tuple[int, int, int]:
        return threads("reader"), threads("writer"), len(list(Path("/dev/fd").iterdir()))

    before = held()
    for round_number in range(8):
        far = FarEnd()
        peer = new_peer(far)
        loop = Loop(peer)
        peer.start()
        if round_number % 2:
            peer.outbox.send(b"x" * 10_000_000)
        if round_number % 4 < 2:
            far.close()
        else:
            peer.channel.close()
        while PeerEvent.GONE not in loop.seen:
            loop.turn()
        peer._thread.join(PATIENCE_SECONDS)  # pyright: ignore[reportPrivateUsage]
        if (writer := peer.outbox._thread) is not None:  # pyright: ignore[reportPrivateUsage]
            writer.join(PATIENCE_SECONDS)
        far.close()
    assert held() == before
