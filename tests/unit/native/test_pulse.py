import json
import os
import queue
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.channels import PATIENCE_SECONDS

from mlx_sidecar.native.pulse import SWITCH, IdsInFlight, Pulses
from mlx_sidecar.protocol import jsonrpc
from mlx_sidecar.protocol.framing import MAX_INBOUND_FRAME_BYTES, FrameReader, Framing
from mlx_sidecar.protocol.messages import PingResult

FIRST = b'{"jsonrpc":"2.0","method":"first"}'
LONG = b'{"jsonrpc":"2.0","method":"' + b"x" * 10_000 + b'"}'
NDJSON, LSP = Framing.NDJSON, Framing.LSP


def ping(request_id: int | str = 1, **members: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "method": "ping"} | members).encode()


class End:
    """A pulse over a socket or two pipes, and the peer at their other end."""

    def __init__(
        self,
        kind: str = "socket",
        framing: Framing = NDJSON,
        *,
        greeted: bytes | None = None,
        pulses: Pulses | None = None,
        pinned: bool = False,
    ) -> None:
        if kind == "socket":
            near, far = socket.socketpair()
            self._near = [near.detach()]
            self._far = [far.detach()]
            read = write = self._near[0]
            self._say = self._hear = self._far[0]
        else:
            (read, self._say), (self._hear, write) = os.pipe(), os.pipe()
            self._near, self._far = [read, write], [self._say, self._hear]
        self.framing = framing
        self.pulses = pulses or Pulses(time.monotonic())
        pulse = self.pulses.over(read, write, framing.value if pinned else "")
        assert pulse is not None
        self.pulse = pulse
        self._heard = os.fdopen(os.dup(self._hear), "rb")
        self.pulse.start(framing.wrap(FIRST) if greeted is None else greeted)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pulse.stop()
        self._heard.close()
        for descriptor in [*self._near, *self._far]:
            os.close(descriptor)

    def framed(self, *bodies: bytes) -> bytes:
        return b"".join(map(self.framing.wrap, bodies))

    def ask(self, *bodies: bytes) -> None:
        self.say(self.framed(*bodies))

    def say(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._say, data) :]

    def takes_more(self) -> bool:
        poll = select.poll()
        poll.register(self._say, select.POLLOUT)
        return bool(poll.poll(500))

    def say_what_fits(self, data: bytes) -> int:
        os.set_blocking(self._say, False)
        try:
            return os.write(self._say, data)
        except BlockingIOError:
            return 0
        finally:
            os.set_blocking(self._say, True)

    def say_no_more(self) -> None:
        if self._say == self._hear:
            with socket.socket(fileno=os.dup(self._say)) as far:
                far.shutdown(socket.SHUT_WR)
        else:
            os.close(self._say)
            self._far.remove(self._say)

    def hear(self) -> Any:
        line = self._heard.readline()
        if self.framing is LSP:
            assert line.startswith(b"Content-Length: ")
            assert self._heard.readline() == b"\r\n"
            line = self._heard.read(int(line[16:]))
            assert b"\n" not in line
        return json.loads(line)

    def rest(self) -> bytes:
        """All that comes out of the pulse up to the end."""
        parts = bytearray()
        while part := self.pulse.read():
            parts += part
        return bytes(parts)


@pytest.fixture(params=["socket", "pipes"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=Framing)
def framing(request: pytest.FixtureRequest) -> Framing:
    return request.param


@pytest.fixture
def end(kind: str, framing: Framing) -> Generator[End]:
    with End(kind, framing) as end:
        yield end


def read_in_the_background(end: End) -> "queue.Queue[bytes]":
    """Have a thread read all the time, as the server does."""
    taken: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        while part := end.pulse.read():
            taken.put(part)
        taken.put(b"")

    threading.Thread(target=read, daemon=True).start()
    return taken


def overtaken(pulses: Pulses) -> None:
    """Return when a ping that was sent just now has been answered because nobody came for it."""
    with End(pulses=pulses) as other:
        other.ask(FIRST, ping("time passes"))
        assert other.hear()["id"] == "time passes"


# What is answered


PLAIN = [
    ping(),
    ping(0),
    ping(-7),
    ping(2**53 - 1),
    ping(1 - 2**53),
    ping(""),
    ping("a b~/'"),
    ping(params={}),
    ping(params=[]),
    ping(params=[None]).replace(b" ", b""),
    ping(params=None),
    b'\t{ "params" : {} ,"method":"ping", "id" : 5\t, "jsonrpc":"2.0" } \r',
    ping() + b" " * (512 - len(ping())),
]
NEAR_MISSES = [
    ping("\u00e9"),
    ping('"'),
    ping(2**53),
    ping(-(2**53)),
    ping(params={"a": 1}),
    ping(params=[1]),
    ping(params=[None, None]),
    ping(params=[None]).replace(b"[", b"[ "),
    ping(params={}).replace(b"{}", b"{ }"),
    ping(extra=1),
    ping(method="pin"),
    ping(jsonrpc="2.1"),
    ping(jsonrpc=2.0),
    *(ping().replace(b"1", other) for other in (b"1.0", b"1e3", b"-0", b"01", b"null", b"-")),
    ping().replace(b'"id": 1, ', b""),
    ping().replace(b'"id"', b'"i\\u0064"'),
    ping().replace(b"ping", b"\\u0070ing"),
    ping().replace(b"}", b',"id":1}'),
    ping().replace(b"}", b',"method":"ping"}'),
    ping().replace(b"}", b',"params":{},"params":{}}'),
    ping().replace(b"}", b",}"),
    ping().replace(b"}", b""),
    ping().replace(b"}", b"} x"),
    ping().replace(b"{", b"\x0b{"),
    ping().replace(b"{", b"\xef\xbb\xbf{"),
    b"[" + ping() + b"]",
    ping() + b" " * (513 - len(ping())),
    b"",
]


@pytest.mark.parametrize("body", PLAIN)
def test_a_plain_ping_is_answered_whether_python_waits_for_it_or_does_not_come(end: End, body: bytes) -> None:
    end.ask(body)
    assert end.hear()["id"] == json.loads(body)["id"]
    read_in_the_background(end)
    end.ask(body)
    assert end.hear()["id"] == json.loads(body)["id"]


@pytest.mark.parametrize("body", NEAR_MISSES)
def test_whatever_is_not_quite_a_plain_ping_is_left_to_python(framing: Framing, body: bytes) -> None:
    with End(framing=framing) as end:
        taken = read_in_the_background(end)
        end.ask(body)
        assert taken.get(timeout=PATIENCE_SECONDS) == end.framed(body)
    with End(framing=framing) as end:
        end.ask(body, ping("behind"))
        assert end.hear()["id"] == "behind"
        assert end.pulse.read() == end.framed(body)


def test_the_answer_is_the_one_that_python_would_give(end: End) -> None:
    result = PingResult(state="ready", uptime_ms=1.5, in_flight=0, last_step_age_ms=None)
    for step in (None, time.monotonic()):
        end.pulses.note_state("ready")
        end.pulses.note_step(step)
        result.last_step_age_ms = None if step is None else 2.5
        python = json.loads(jsonrpc.encode_outcome("x", result))
        end.ask(ping("x"))
        native = end.hear()
        assert list(native) == list(python)
        assert [(name, type(value)) for name, value in native["result"].items()] == [
            (name, type(value)) for name, value in python["result"].items()
        ]
        assert native["result"]["uptimeMs"] >= 0


def test_times_count_from_where_python_says() -> None:
    with End(pulses=Pulses(time.monotonic() - 1000)) as end:
        end.pulses.note_step(time.monotonic() - 500)
        end.ask(ping())
        result = end.hear()["result"]
        assert 1_000_000 <= result["uptimeMs"] < 1_000_000 + 1000 * PATIENCE_SECONDS
        assert 500_000 <= result["lastStepAgeMs"] < 500_000 + 1000 * PATIENCE_SECONDS


def test_pings_are_counted_and_those_that_overtook_something_apart() -> None:
    with End() as end:
        end.ask(ping(1))
        end.hear()
        report = end.pulses.report()
        assert (report.active, report.reason, report.answered) == (True, None, 1)
    with End(pulses=end.pulses) as other:
        other.ask(FIRST, ping(2))
        other.hear()
        assert end.pulses.report()[2:] == (2, report.overtook + 1)


def test_a_ping_behind_what_python_deals_with_is_not_taken_with_it(end: End) -> None:
    """Python may lose the lock between two frames of what it has taken."""
    end.ask(FIRST, ping(1), FIRST, ping(2))
    assert end.pulse.read() == end.framed(FIRST)
    assert [end.hear()["id"], end.hear()["id"]] == [1, 2]
    assert end.pulse.read() == end.framed(FIRST)


def test_a_ping_is_answered_in_whatever_pieces_it_comes(end: End) -> None:
    taken = read_in_the_background(end)
    for piece in end.framed(ping(1)):
        end.say(bytes([piece]))
    assert end.hear()["id"] == 1
    end.ask(FIRST)
    assert taken.get(timeout=PATIENCE_SECONDS) == end.framed(FIRST)


# The first frame


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("greeted", [b"", b"\xef", b"\xef\xbb\xbf", b" \n", b"\xef\xbb\xbf\r\n"])
def test_the_first_frame_is_answered_and_tells_the_framing(
    framing: Framing, greeted: bytes, *, pinned: bool
) -> None:
    with End(framing=framing, greeted=greeted, pinned=pinned) as end:
        end.say(b"\xef\xbb\xbf"[len(greeted) :] * (greeted == b"\xef") + end.framed(ping(1), ping(2), FIRST))
        assert [end.hear()["id"], end.hear()["id"]] == [1, 2]
        assert end.pulse.framing == framing.value
        assert end.pulse.read().endswith(end.framed(FIRST))


def test_until_something_was_said_the_framing_is_unknown() -> None:
    with End(greeted=b"\xef\xbb\xbf\r\n") as end:
        assert end.pulse.framing == ""


@pytest.mark.parametrize("size", range(1, len(ping()) + 2))
def test_a_first_frame_that_python_has_begun_to_read_is_pythons(framing: Framing, size: int) -> None:
    said = framing.wrap(ping(1))
    with End(framing=framing, greeted=said[: size % len(said)]) as end:
        end.say(said[size % len(said) :] + end.framed(ping(2)))
        heard = end.hear()["id"]
        if heard == 1:
            assert size % len(said) == 0
        else:
            assert end.pulse.read() == said[size % len(said) :]


# What is not answered


def test_ids_in_flight_are_pythons_to_refuse_until_they_have_been_answered(end: End) -> None:
    ids = IdsInFlight(end.pulse)
    for request_id in (7, "x", "lone \ud800", 'with "quotes"'):
        ids.add(request_id)
    for request_id in (7, "x"):
        end.ask(ping(request_id))
        assert end.pulse.read() == end.framed(ping(request_id))
    end.ask(ping("7"))
    assert end.hear()["result"]["inFlight"] == 4
    ids.discard(7)
    ids.discard("lone \ud800")
    ids.discard("never was")
    end.ask(ping(7))
    assert end.hear()["result"]["inFlight"] == 2
    assert ids == {"x", 'with "quotes"'}


def test_after_shutdown_every_ping_is_pythons_to_refuse(end: End) -> None:
    end.pulse.shut_down()
    end.ask(ping(1), ping(2))
    overtaken(end.pulses)
    assert end.pulse.read() == end.framed(ping(1), ping(2))


def test_a_shutdown_that_waits_or_is_being_dealt_with_is_not_overtaken(end: End) -> None:
    shutdown = end.framed(b'{"jsonrpc":"2.0","id":1,"method":"shutdown","params":' + b" " * 2000 + b"{}}")
    end.say(shutdown[:-10])
    assert end.pulse.read() == shutdown[:-10]
    end.say(shutdown[-10:] + end.framed(ping(2)))
    overtaken(end.pulses)
    assert end.pulse.read() == shutdown[-10:]
    overtaken(end.pulses)
    end.pulse.shut_down()
    assert end.pulse.read() == end.framed(ping(2))


def test_a_shutdown_deep_in_a_frame_that_was_taken_in_part_is_not_overtaken(end: End) -> None:
    shutdown = end.framed(b" " * 900_000 + b'{"jsonrpc":"2.0","id":1,"method":"shutdown"}' + b" " * 900_000)
    taken = read_in_the_background(end)
    end.say(shutdown[:-10])
    got = b""
    while len(got) < len(shutdown) - 10:
        got += taken.get(timeout=PATIENCE_SECONDS)
    end.say(shutdown[-10:] + end.framed(ping(2)))
    assert taken.get(timeout=PATIENCE_SECONDS) == shutdown[-10:]
    # By then it has been dealt with: the reader has come again.
    assert end.hear()["id"] == 2
    with End(framing=end.framing) as slow:
        said = shutdown[:950_000]
        slow.say(said)
        while said:
            said = said[len(slow.pulse.read()) :]
        slow.say(shutdown[950_000:] + slow.framed(ping(2)))
        overtaken(slow.pulses)
        slow.pulse.shut_down()
        rest = b""
        while len(rest) < len(shutdown) - 950_000 + len(slow.framed(ping(2))):
            rest += slow.pulse.read()
        assert rest == shutdown[950_000:] + slow.framed(ping(2))


@pytest.mark.parametrize("taken", [0, 1070, 1090, 2000])
def test_a_request_with_the_same_id_is_not_overtaken(end: End, taken: int) -> None:
    said = end.framed(b" " * 1050 + b'{"jsonrpc": "2.0", "id" : "twice", "method": "models"}' + b" " * 2000)
    end.say(said[:taken])
    if taken:
        assert end.pulse.read() == said[:taken]
    end.say(said[taken:] + end.framed(ping("twice"), ping("other")))
    assert end.hear()["id"] == "other"
    assert end.pulse.read() == said[taken:] + end.framed(ping("twice"))


def test_a_frame_that_comes_in_pieces_is_looked_at_when_it_is_whole(end: End) -> None:
    said = end.framed(ping(1))
    end.say(end.framed(FIRST) + said[:10])
    overtaken(end.pulses)
    end.say(said[10:])
    assert end.hear()["id"] == 1
    assert end.pulse.read() == end.framed(FIRST)


@pytest.mark.parametrize(
    "header",
    [
        "Content-Length: -5\r\n\r\n",
        "Content-Length: #\n\n",
        "Content-Length: #\r\n\n",
        "Content-Length: #\n\r\n",
        "\r\nContent-Length: #\r\n\r\n",
        "Content-Length: #\r\nX-Other: 1\r\n\r\n",
        "Content-Length: #\r\nContent-Length: #\r\n\r\n",
        "Content-Length: #\r\nContent-Type: text; charset=latin1\r\n\r\n",
        "Content-Length: +#\r\n\r\n",
        "Content-Length: 0000000#\r\n\r\n",
        "Content-Length #\r\n\r\n",
        "Content-Length: \r\n\r\n",
        "Content-Length: #\r\r\n\r\n",
        "Content-Type: a\r\n\r\n",
        "Content-Length: " + " " * 300 + "#\r\n\r\n",
    ],
)
def test_behind_an_unusual_header_everything_is_pythons(header: str) -> None:
    said = header.replace("#", str(len(FIRST))).encode() + FIRST + LSP.wrap(ping()) * 20
    with End(framing=LSP) as end:
        end.say(said)
        overtaken(end.pulses)
        end.say_no_more()
        assert end.rest() == said


@pytest.mark.parametrize("frame", [b"Content-Length: -5\r\n\r\n", b"Content-Length: 1\n\n1"])
def test_python_is_told_at_once_of_a_header_that_only_it_can_judge(frame: bytes) -> None:
    with End(framing=LSP) as end:
        end.say(frame)
        assert end.pulse.read() == frame


@pytest.mark.parametrize("excess", [0, 1])
def test_behind_a_frame_beyond_the_limit_everything_is_pythons(excess: int) -> None:
    """Python ends the connection there."""
    size = MAX_INBOUND_FRAME_BYTES + excess
    with End(framing=LSP) as end:
        reading = threading.Thread(target=end.rest, daemon=True)
        reading.start()
        end.say(b"Content-Length: %d\r\n\r\n" % size)
        for _ in range(0, MAX_INBOUND_FRAME_BYTES, 1024 * 1024):
            end.say(b"x" * 1024 * 1024)
        end.say(b"x" * excess)
        end.ask(ping())
        end.say_no_more()
        reading.join(PATIENCE_SECONDS)
        end.pulse.write_all(end.framed(b'"end"'))
        assert (end.hear() == "end") == bool(excess)


# Bytes


BODIES = st.one_of(
    st.just("ping"), st.sampled_from(NEAR_MISSES), st.binary(max_size=40), st.just(LONG), st.just(FIRST)
)
HEADERS = st.one_of(
    st.just(b"Content-Length: %d\r\n\r\n"),
    st.sampled_from(
        [
            b"content-length:%d \r\n\r\n",
            b"Content-Type: application/vscode-jsonrpc; charset=utf-8\r\nContent-Length: %d\r\n\r\n",
            b"CONTENT-LENGTH: %d\r\nContent-Type: text; charset=UTF8\r\n\r\n",
            b"Content-Length: 00%d\r\n\r\n",
            b"Content-Length: %d\n\n",
            b"\r\nContent-Length: %d\r\n\r\n",
            b"Content-Length: %d1\r\n\r\n",
            b"x%d\r\n\r\n",
        ]
    ),
)


@example(
    framing=LSP,
    prefix=b" \xef\xbb\xbf",
    bodies=["ping", "ping"],
    header=b"\r\nContent-Length: %d\r\n\r\n",
    cuts=[],
    kind="socket",
    late=False,
)
@given(
    framing=st.sampled_from(Framing),
    prefix=st.sampled_from([b"", b"\xef\xbb\xbf", b" \n", b" \xef\xbb\xbf", b"\xef", b"\xef\xbb\n"]),
    bodies=st.lists(BODIES, max_size=30),
    header=HEADERS,
    cuts=st.lists(st.integers(1, 60)),
    kind=st.sampled_from(["socket", "pipes"]),
    late=st.booleans(),
)
def test_python_reads_every_frame_but_the_pings_that_were_answered_once(
    framing: Framing,
    prefix: bytes,
    bodies: list[Any],
    header: bytes,
    cuts: list[int],
    kind: str,
    *,
    late: bool,
) -> None:
    said = [ping(f"#{n}") if body == "ping" else body for n, body in enumerate(bodies)]
    if framing is LSP:
        stream = prefix + b"".join(
            (header if n % 3 else b"Content-Length: %d\r\n\r\n") % len(body) + body
            for n, body in enumerate(said)
        )
    else:
        stream = prefix + b"".join(body + b"\n" for body in said)
    whole = stream
    with End(kind, greeted=b"") as end:
        reading = None if late else read_in_the_background(end)
        for cut in cuts:
            end.say(stream[:cut])
            stream = stream[cut:]
        end.say(stream)
        end.say_no_more()
        if reading is None:
            overtaken(end.pulses)
            reading = read_in_the_background(end)
        read = b"".join(iter(lambda: reading.get(timeout=PATIENCE_SECONDS), b""))
        reader = FrameReader()
        if end.pulse.framing:
            end.framing = Framing(end.pulse.framing)
            reader.settle(end.framing, begun=end.pulse.took_beginning)
        end.pulse.write_all(end.framed(b'"end"'))
        answered = [answer["id"] for answer in iter(end.hear, "end")]
    frames = frames_in(whole, FrameReader())
    for request_id in answered:
        frames.remove(ping(request_id))
    assert frames_in(read, reader) == frames


def frames_in(stream: bytes, reader: FrameReader) -> list[bytes | str]:
    frames = [*reader.feed(stream), *reader.close()]
    # A line may end in a carriage return.
    return [frame.strip() if isinstance(frame, bytes) else type(frame).__name__ for frame in frames]


def test_what_nobody_takes_fills_the_pipe_and_not_the_memory(end: End) -> None:
    frame = end.framed(LONG)
    said = bytearray()
    while len(said) < 1000 * len(frame) and end.takes_more():
        begun = len(said) % len(frame)
        said += frame[begun : begun + end.say_what_fits(frame[begun:])]
    assert len(said) < 300 * len(frame)
    reading = read_in_the_background(end)
    end.say_no_more()
    assert b"".join(iter(lambda: reading.get(timeout=PATIENCE_SECONDS), b"")) == said


def test_the_last_frame_may_lack_its_end(end: End) -> None:
    end.say(end.framed(ping(1), ping(2))[:-1])
    end.say_no_more()
    assert end.hear()["id"] == 1
    assert end.rest() == end.framed(ping(2))[:-1]
    assert end.pulse.read() == b""


# Writing


def test_answers_never_come_into_the_middle_of_a_frame(kind: str) -> None:
    frames = [b'{"frame":%d,"filler":"%s"}\n' % (n, b"x" * (n * 9770 % 150_000)) for n in range(60)]
    pings = 300
    with End(kind) as end:
        taken = read_in_the_background(end)
        left: list[bytes] = []

        def write() -> None:
            for frame in frames:
                written = end.pulse.try_write(frame)
                if written < len(frame):
                    end.pulse.write_all(memoryview(frame)[written:])
            end.pulse.write_all(b'"end"\n')

        def ask() -> None:
            for n in range(pings):
                end.ask(ping(n))
            end.say_no_more()
            left.extend(iter(lambda: taken.get(timeout=PATIENCE_SECONDS), b""))

        threads = [threading.Thread(target=work, daemon=True) for work in (write, ask)]
        for thread in threads:
            thread.start()
        heard: list[Any] = []
        while (message := end.hear()) != "end":
            heard.append(message)
        threads[1].join(PATIENCE_SECONDS)
        end.pulse.write_all(b'"end"\n')
        heard += iter(end.hear, "end")
    answered = {message["id"] for message in heard if "id" in message}
    by_python = {json.loads(line)["id"] for line in b"".join(left).splitlines()}
    assert [message["frame"] for message in heard if "frame" in message] == list(range(len(frames)))
    assert len(heard) == len(frames) + len(answered)
    assert not answered & by_python
    assert answered | by_python == set(range(pings))


@pytest.mark.parametrize("finished", [True, False])
def test_a_frame_that_python_has_begun_is_finished_for_it_and_pings_come_behind(
    end: End, *, finished: bool
) -> None:
    """Between beginning and finishing it, Python may lose the lock."""
    frame = end.framed(b'"' + b"x" * 1_000_000 + b'"')
    written = end.pulse.try_write(frame)
    assert 0 < written < len(frame)
    end.ask(FIRST, ping(1))
    heard: list[Any] = []
    listening = threading.Thread(target=lambda: heard.extend(end.hear() for _ in range(3)), daemon=True)
    listening.start()
    if finished:
        end.pulse.write_all(memoryview(frame)[written:])
    end.ask(ping(2))
    listening.join(PATIENCE_SECONDS)
    assert [len(heard[0]), heard[1]["id"], heard[2]["id"]] == [1_000_000, 1, 2]
    if not finished:
        end.pulse.write_all(memoryview(frame)[written:])
    end.pulse.write_all(end.framed(b'"behind"'))
    assert end.hear() == "behind"


def test_who_does_not_read_costs_no_processor(end: End) -> None:
    """What waits behind is not searched for pings as long as none could be answered."""

    def cost() -> float:
        began = time.process_time()
        for _ in range(20):
            overtaken(end.pulses)
        return time.process_time() - began

    alone = cost()
    frame = end.framed(b'"' + b"x" * 1_000_000 + b'"')
    written = end.pulse.try_write(frame)
    writing = threading.Thread(target=lambda: end.pulse.write_all(memoryview(frame)[written:]), daemon=True)
    writing.start()
    end.ask(*[b'{"jsonrpc":"2.0","method":"models","id":%d}' % n for n in range(10_000)], ping("last"))
    assert cost() < 5 * alone + 0.05
    assert len(end.hear()) == 1_000_000
    assert end.hear()["id"] == "last"
    writing.join(PATIENCE_SECONDS)


def test_many_pings_that_cannot_be_answered_are_taken_at_once(end: End) -> None:
    frame = end.framed(b'"' + b"x" * 1_000_000 + b'"')
    assert 0 < end.pulse.try_write(frame) < len(frame)
    said = end.framed(*[ping(n) for n in range(200)])
    end.say(said)
    got: list[bytes] = []
    while sum(map(len, got)) < len(said):
        got.append(end.pulse.read())
    assert b"".join(got) == said
    assert len(got) < 20


def test_a_ping_that_cannot_be_answered_now_is_pythons(end: End) -> None:
    frame = end.framed(b'"' + b"x" * 1_000_000 + b'"')
    assert 0 < end.pulse.try_write(frame) < len(frame)
    end.ask(ping(1))
    assert end.pulse.read() == end.framed(ping(1))


def test_a_peer_that_has_gone_ends_the_input_and_fails_both_ways_of_writing(end: End) -> None:
    end.ask(FIRST, ping())
    end._heard.close()  # pyright: ignore[reportPrivateUsage]
    while end._far:  # pyright: ignore[reportPrivateUsage]
        os.close(end._far.pop())  # pyright: ignore[reportPrivateUsage]
    assert end.framed(FIRST) in end.rest()
    with pytest.raises(BrokenPipeError):
        end.pulse.write_all(b"x")
    with pytest.raises(BrokenPipeError):
        end.pulse.try_write(b"x")


# Beginning and end


def test_stopping_ends_a_read_that_waits_and_may_be_done_often(end: End) -> None:
    taken = read_in_the_background(end)
    end.pulse.stop()
    assert taken.get(timeout=PATIENCE_SECONDS) == b""
    end.pulse.stop()


def make_without_stopping(pulses: Pulses) -> None:
    near, far = socket.socketpair()
    with near, far:
        pulse = pulses.over(near.fileno(), near.fileno())
        assert pulse is not None
        pulse.start(b"")
        del pulse
        pulses.over(near.fileno(), near.fileno())


def test_descriptors_and_threads_are_given_back() -> None:
    def held() -> tuple[int, int]:
        tasks = Path("/proc/self/task")
        return len(list(Path("/dev/fd").iterdir())), len(list(tasks.iterdir())) if tasks.exists() else 0

    pulses = Pulses(0.0)
    with End(pulses=pulses):
        pass
    before = held()
    for kind in ("socket", "pipes") * 20:
        with End(kind, pulses=pulses) as end:
            end.ask(ping())
    for _ in range(20):
        make_without_stopping(pulses)
    descriptors, threads = held()
    assert descriptors == before[0]
    # Threads of other tests may come or go meanwhile, but not as many as there were pulses.
    assert threads < before[1] + 20


def test_a_file_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "said"
    file.write_bytes(said := NDJSON.wrap(FIRST) * 50_000)
    with file.open("rb") as source, (tmp_path / "heard").open("wb") as sink:
        pulse = Pulses(0.0).over(source.fileno(), sink.fileno())
        assert pulse is not None
        pulse.start(b"")
        assert b"".join(iter(pulse.read, b"")) == said
        assert pulse.try_write(b"x" * 100_000) == 100_000
        pulse.stop()


def test_switched_off_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    pulses = Pulses(0.0)
    assert pulses.over(0, 1) is None
    pulses.note_state("ready")
    pulses.note_step(1.0)
    assert pulses.report()[:2] == (False, "switched off by MLX_SIDECAR_PULSE=off")


def test_without_the_native_module_it_says_so() -> None:
    script = (
        "import sys\n"
        "sys.modules['mlx_sidecar.native._core'] = None\n"
        "from mlx_sidecar.native.pulse import Pulses\n"
        "pulses = Pulses(0.0)\n"
        "assert pulses.over(0, 1) is None\n"
        "print(pulses.report().active, pulses.report().reason)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60)
    assert done.stdout.strip() == b"False the native module was not built"


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_sanitizers_find_nothing(sanitizers: str, tmp_path: Path) -> None:
    native, program = Path(__file__).parents[3] / "native", tmp_path / "pulse_test"
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no compiler")
    command = [compiler, "-std=c++17", "-g", "-O1", "-pthread", f"-fsanitize={sanitizers}"]
    sources = [native / f"src/{name}.cpp" for name in ("frames", "ping", "pulse", "writer")]
    command += ["-fno-sanitize-recover=all", f"-I{native / 'include'}", f"-o{program}"]
    sources.append(Path(__file__).with_name("pulse_test.cpp"))
    compiled = subprocess.run([*command, *sources], capture_output=True, text=True, timeout=110)
    if compiled.returncode and "cannot find" in compiled.stderr:
        pytest.skip("the compiler came without sanitizers")
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
