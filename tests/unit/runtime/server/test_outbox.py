import json
import os
import threading
from collections.abc import Callable, Generator
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.channels import PATIENCE_SECONDS, FarEnd, NarrowChannel

from mlx_sidecar.protocol.framing import Framing
from mlx_sidecar.protocol.messages import GenerateProgress
from mlx_sidecar.runtime.server.channel import Channel
from mlx_sidecar.runtime.server.outbox import Outbox
from mlx_sidecar.runtime.server.stream import Stream

EVERYTHING = 10**9


def outbox_over(channel: Channel, **options: int) -> Outbox:
    return Outbox(channel, Framing.NDJSON.wrap, **options)


def stream(token: str, on_overflow: Callable[[], None] = lambda: None) -> Stream:
    return Stream(token, on_overflow)


def part(seq: int, text: str = "x") -> GenerateProgress:
    return GenerateProgress(seq=seq, text=text, tokens=[seq])


def frame(name: str) -> bytes:
    return json.dumps(name).encode()


def told(messages: list[Any]) -> list[Any]:
    """Return frames by their names, and progress as token, seq, text."""
    return [
        (found["params"]["token"], found["params"]["value"]["seq"], found["params"]["value"]["text"])
        if not isinstance(found, str)
        else found
        for found in messages
    ]


def ends(work: Callable[[], object]) -> bool:
    """Return whether `work` ends, instead of hanging the test if it does not."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS / 3)
    return not thread.is_alive()


def writers() -> int:
    return sum(thread.name == "writer" for thread in threading.enumerate())


@pytest.fixture
def far() -> Generator[FarEnd]:
    with FarEnd() as far:
        yield far


# While the peer reads


def test_a_frame_has_been_written_when_send_returns(far: FarEnd) -> None:
    outbox_over(far.channel).send(frame("one"))
    far.socket.setblocking(False)
    assert far.socket.recv(100) == b'"one"\n'


def test_what_is_put_together_goes_out_in_one_write() -> None:
    channel = NarrowChannel(EVERYTHING)
    streams = [stream(token) for token in "abc"]
    outbox_over(channel).put([(None, frame("first")), *((one, part(1)) for one in streams)])
    assert len(channel.writes) == 1
    assert told(channel.messages()) == ["first", ("a", 1, "x"), ("b", 1, "x"), ("c", 1, "x")]


def test_progress_comes_before_the_response_of_its_stream() -> None:
    channel = NarrowChannel(EVERYTHING)
    one = stream("a")
    outbox_over(channel).put([(one, part(1)), (one, frame("end"))])
    assert told(channel.messages()) == [("a", 1, "x"), "end"]


def test_frames_go_out_in_the_framing_of_the_peer() -> None:
    channel = NarrowChannel(EVERYTHING)
    Outbox(channel, Framing.LSP.wrap).send(b"{}")
    assert channel.written == b"Content-Length: 2\r\n\r\n{}"


def test_a_frame_larger_than_any_buffer_arrives_whole(far: FarEnd) -> None:
    outbox = outbox_over(far.channel)
    outbox.send(b'"%b"' % (b"x" * 1_000_000))
    outbox.send(frame("more"))
    assert [len(far.hear()) for _ in range(2)] == [1_000_000, 4]
    outbox.wait_until_idle(PATIENCE_SECONDS)
    outbox.send(frame("and more"))
    assert far.hear() == "and more"
    outbox.stop()


def test_a_pipe_is_no_worse_than_a_socket() -> None:
    read_end, write_end = os.pipe()
    outbox = outbox_over(Channel(read_end, write_end))
    with os.fdopen(read_end, "rb") as file:
        outbox.send(b'"%b"' % (b"x" * 1_000_000))
        outbox.send(frame("more"))
        assert [len(json.loads(file.readline())) for _ in range(2)] == [1_000_000, 4]
        outbox.wait_until_idle(PATIENCE_SECONDS)
    os.close(write_end)
    outbox.stop()


def test_many_senders_do_not_tear_or_reorder_their_frames(far: FarEnd) -> None:
    outbox = outbox_over(far.channel)

    def send_all(sender: int) -> None:
        for number in range(300):
            outbox.send(json.dumps([sender, number, "x" * (number * 7 % 1000)]).encode())

    senders = [threading.Thread(target=send_all, args=(sender,)) for sender in range(8)]
    for sender in senders:
        sender.start()
    heard = [far.hear() for _ in range(8 * 300)]
    for sender in range(8):
        assert [number for who, number, _ in heard if who == sender] == list(range(300))
    for sender in senders:
        sender.join()
    outbox.stop()


# While it does not


def test_whoever_sends_never_waits_for_a_peer_that_does_not_read(far: FarEnd) -> None:
    outbox = outbox_over(far.channel)
    assert ends(lambda: [outbox.send(b"x" * 100_000) for _ in range(50)])
    far.close()
    outbox.stop()


def test_control_frames_overtake_progress_and_the_parts_of_a_stream_become_one() -> None:
    channel = NarrowChannel()
    outbox = outbox_over(channel)
    a, b = stream("a"), stream("b")
    outbox.send(frame("stuck"))
    for seq in range(1, 4):
        outbox.put([(a, part(seq, f"a{seq} ")), (b, part(seq, f"b{seq} "))])
    outbox.put([(a, frame("end of a"))])
    outbox.send(frame("urgent"))
    channel.open()
    outbox.wait_until_idle(PATIENCE_SECONDS)
    assert told(channel.messages()) == [
        "stuck",
        "urgent",
        ("a", 3, "a1 a2 a3 "),
        "end of a",
        ("b", 3, "b1 b2 b3 "),
    ]
    assert channel.messages()[2]["params"]["value"]["merged"] == 3
    outbox.stop()


def test_a_backlog_of_one_stream_holds_up_the_others_by_a_frame_at_most() -> None:
    channel = NarrowChannel()
    outbox = outbox_over(channel)
    long, short = stream("long"), stream("short")
    outbox.send(frame("stuck"))
    outbox.put([(long, part(seq, "x" * 100_000)) for seq in range(1, 51)])
    outbox.put([(short, part(1, "y"))])
    channel.open()
    outbox.wait_until_idle(PATIENCE_SECONDS)
    order = [token for token, *_ in told(channel.messages())[1:]]
    assert order.index("short") == 1
    assert len(order) > 3
    outbox.stop()


def test_a_control_frame_waits_for_little_of_a_backlog_that_is_being_written() -> None:
    channel = NarrowChannel()
    outbox = outbox_over(channel)
    long = stream("long")
    outbox.put([(long, part(seq, "x" * 300_000)) for seq in range(1, 21)])
    outbox.send(frame("urgent"))
    channel.open()
    outbox.wait_until_idle(PATIENCE_SECONDS)
    assert told(channel.messages()).index("urgent") == 1
    outbox.stop()


def test_a_stream_that_overflows_is_told_so_and_loses_nothing() -> None:
    channel = NarrowChannel()
    outbox = outbox_over(channel, max_unsent_bytes=2000)
    overflowed: list[str] = []
    loud = stream("loud", lambda: overflowed.append("loud"))
    quiet = stream("quiet", lambda: overflowed.append("quiet"))
    outbox.send(frame("stuck"))
    outbox.put([(quiet, part(1, "psst"))])
    seqs = iter(range(1, 100))
    while not overflowed:
        outbox.put([(loud, part(next(seqs), "0123456789"))])
    outbox.put([(loud, frame("slow_consumer"))])
    channel.open()
    outbox.wait_until_idle(PATIENCE_SECONDS)
    last = next(seqs) - 1
    assert 2000 / 500 < last < 2000 / 300
    assert overflowed == ["loud"]
    assert told(channel.messages()) == [
        "stuck",
        ("quiet", 1, "psst"),
        ("loud", last, "0123456789" * last),
        "slow_consumer",
    ]
    outbox.stop()


def test_room_comes_back_when_the_peer_reads_again() -> None:
    channel = NarrowChannel()
    overflowed: list[str] = []
    one = stream("a", lambda: overflowed.append("a"))
    outbox = outbox_over(channel, max_unsent_bytes=1000)
    outbox.put([(one, part(1, "x" * 600))])
    channel.open()
    for seq in range(2, 10):
        outbox.wait_until_idle(PATIENCE_SECONDS)
        outbox.put([(one, part(seq, "x" * 600))])
    assert overflowed == []
    outbox.stop()


def test_beyond_twice_the_bound_the_peer_is_given_up_once() -> None:
    channel = NarrowChannel()
    outbox = outbox_over(channel, max_unsent_bytes=1000)
    broken: list[str] = []
    outbox.on_broken = lambda: broken.append("broken")
    for _ in range(30):
        outbox.send(b'"%b"' % (b"x" * 100))
    assert broken == ["broken"]
    channel.close()
    outbox.stop()
    assert channel.written == b""
    assert broken == ["broken"]


def test_text_held_back_by_the_window_can_flood_too_and_the_outbox_still_stops() -> None:
    channel = NarrowChannel(EVERYTHING, EVERYTHING)
    outbox = outbox_over(channel, max_unsent_bytes=1000)
    outbox.window = 1
    one = stream("a")
    outbox.put([(one, part(1))])
    outbox.put([(one, part(seq, "x" * 100)) for seq in range(2, 50)])
    outbox.send(frame("one too many"))
    channel.close()
    assert ends(outbox.stop)


# Ends


def test_nothing_of_a_stream_goes_out_behind_its_response() -> None:
    channel = NarrowChannel(*[EVERYTHING] * 10)
    outbox = outbox_over(channel)
    one = stream("a")
    outbox.put([(one, part(1)), (one, frame("end"))])
    outbox.put([(one, part(2))])
    outbox.send(frame("next"))
    assert told(channel.messages()) == [("a", 1, "x"), "end", "next"]


def test_a_peer_that_has_gone_is_reported_once_and_what_follows_is_dropped(far: FarEnd) -> None:
    outbox = outbox_over(far.channel)
    broken = threading.Semaphore(0)
    outbox.on_broken = broken.release
    far.close()
    outbox.send(frame("one"))
    assert broken.acquire(timeout=PATIENCE_SECONDS)
    one = stream("a")
    outbox.put([(None, frame("two")), (one, part(1)), (one, frame("end"))])
    outbox.ack("a", 1)
    outbox.stop()
    assert not broken.acquire(blocking=False)


def test_a_peer_that_goes_while_it_is_written_to_is_reported_once(far: FarEnd) -> None:
    outbox = outbox_over(far.channel)
    broken = threading.Semaphore(0)
    outbox.on_broken = broken.release
    outbox.send(b"x" * 10_000_000)
    far.close()
    assert broken.acquire(timeout=PATIENCE_SECONDS)
    outbox.send(frame("more"))
    outbox.stop()
    assert not broken.acquire(blocking=False)


def test_stopping_ends_the_thread_even_if_the_peer_never_read(far: FarEnd) -> None:
    before = writers()
    outbox = outbox_over(far.channel)
    outbox.send(b"x" * 10_000_000)
    assert writers() == before + 1
    far.channel.close()
    assert ends(outbox.stop)
    assert ends(lambda: wait_for(lambda: writers() == before))


def test_stopping_while_somebody_is_about_to_leave_the_rest_to_the_thread_does_not_hang() -> None:
    about_to_leave, stopping = threading.Event(), threading.Event()

    class Channel(NarrowChannel):
        def try_write(self, data: bytes) -> int:
            if b"second" in data:
                about_to_leave.set()
                assert stopping.wait(PATIENCE_SECONDS)
                return 1
            return super().try_write(data)

    before = writers()
    channel = Channel()
    outbox = outbox_over(channel)
    outbox.send(frame("first, which starts the thread"))
    channel.open()
    outbox.wait_until_idle(PATIENCE_SECONDS)
    sender = threading.Thread(target=outbox.send, args=(frame("second"),), daemon=True)
    sender.start()
    assert about_to_leave.wait(PATIENCE_SECONDS)
    channel.close()
    stopper = threading.Thread(target=outbox.stop, daemon=True)
    stopper.start()
    # The thread has nothing to write, so it ends now; and then the sender has a rest for it.
    wait_for(lambda: writers() == before)
    stopping.set()
    stopper.join(PATIENCE_SECONDS / 3)
    assert not stopper.is_alive()


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1_000_000):
        if condition():
            return
        os.sched_yield()
    raise AssertionError("it never happened")


def test_idle_is_reported_at_once_when_there_is_nothing_to_write() -> None:
    called: list[str] = []
    outbox_over(NarrowChannel()).when_idle(lambda: called.append("idle"))
    assert called == ["idle"]


def test_idle_is_reported_when_all_has_been_written() -> None:
    channel = NarrowChannel()
    outbox = outbox_over(channel)
    outbox.send(frame("one"))
    written: list[bytes] = []
    idle = threading.Event()

    def note() -> None:
        written.append(channel.written)
        idle.set()

    outbox.when_idle(note)
    outbox.wait_until_idle(0)
    assert not idle.is_set()
    outbox.send(frame("two"))
    channel.open()
    assert idle.wait(PATIENCE_SECONDS)
    assert written == [b'"one"\n"two"\n']
    outbox.stop()


def test_idle_is_reported_when_nothing_will_ever_be_written() -> None:
    channel = NarrowChannel()
    outbox = outbox_over(channel)
    outbox.send(frame("one"))
    idle = threading.Event()
    outbox.when_idle(idle.set)
    channel.close()
    assert idle.wait(PATIENCE_SECONDS)


# Flow control


def test_a_stream_goes_on_when_its_window_is_confirmed_and_others_have_windows_of_their_own() -> None:
    channel = NarrowChannel(*[EVERYTHING] * 10)
    outbox = outbox_over(channel)
    outbox.window = 2
    a, b = stream("a"), stream("b")
    for seq in range(1, 5):
        outbox.put([(a, part(seq))])
    outbox.put([(b, part(1, "b"))])
    outbox.ack("nobody", 5)
    outbox.ack("b", 1)
    assert told(channel.messages()) == [("a", 1, "x"), ("a", 2, "x"), ("b", 1, "b")]
    outbox.ack("a", 2)
    assert told(channel.messages())[3:] == [("a", 4, "xx")]


def test_the_end_of_a_stream_does_not_wait_for_acks() -> None:
    channel = NarrowChannel(*[EVERYTHING] * 10)
    outbox = outbox_over(channel)
    outbox.window = 1
    one = stream("a")
    for seq in range(1, 5):
        outbox.put([(one, part(seq))])
    outbox.put([(one, frame("end"))])
    assert told(channel.messages()) == [("a", 1, "x"), ("a", 4, "xxx"), "end"]


def test_a_token_can_name_a_new_stream_whose_acks_count() -> None:
    channel = NarrowChannel(*[EVERYTHING] * 10)
    outbox = outbox_over(channel)
    outbox.window = 1
    for name in ("first", "second"):
        one = stream("a")
        outbox.put([(one, part(1, name))])
        outbox.put([(one, part(2, "held back"))])
        outbox.ack("a", 1)
        outbox.put([(one, frame("end"))])
    expected = [[("a", 1, name), ("a", 2, "held back"), "end"] for name in ("first", "second")]
    assert told(channel.messages()) == expected[0] + expected[1]


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.sampled_from("abc"), st.text(st.characters(codec="utf-8"), max_size=5)),
            st.tuples(st.sampled_from("abc"), st.integers(0, 20)),
            st.just("control"),
            st.just("open"),
        ),
        max_size=60,
    ),
    takes=st.lists(st.integers(0, 300), max_size=30),
    window=st.none() | st.integers(1, 10),
)
def test_every_stream_arrives_whole_and_in_order_whatever_the_pipe_takes(
    steps: list[Any], takes: list[int], window: int | None
) -> None:
    channel = NarrowChannel(*takes)
    outbox = outbox_over(channel)
    outbox.window = window
    streams = {token: stream(token) for token in "abc"}
    said = dict.fromkeys("abc", "")
    seqs = {token: count(1) for token in "abc"}
    controls = 0
    for step in steps:
        match step:
            case "control":
                outbox.send(frame(f"control {controls}"))
                controls += 1
            case "open":
                channel.open()
            case (token, int(seq)):
                outbox.ack(token, seq)
            case (token, text):
                said[token] += text
                outbox.put([(streams[token], part(next(seqs[token]), text))])
            case _:
                raise AssertionError(step)
    outbox.put([(streams[token], frame(f"end of {token}")) for token in "abc"])
    channel.open()
    outbox.wait_until_idle(PATIENCE_SECONDS)
    outbox.stop()

    messages = channel.messages()
    names: list[str] = [message for message in messages if isinstance(message, str)]
    assert [name for name in names if name.startswith("control")] == [f"control {n}" for n in range(controls)]
    for token in "abc":
        mine: list[Any] = [found for found in messages if is_progress(found, token)]
        parts: list[Any] = [found["params"]["value"] for found in mine]
        last = next(seqs[token]) - 1
        assert "".join(value["text"] for value in parts) == said[token]
        assert sum(value.get("merged", 1) for value in parts) == last
        assert [n for value in parts for n in value["tokens"]] == list(range(1, last + 1))
        end = messages.index(f"end of {token}")
        assert all(messages.index(found) < end for found in mine)
        assert names.count(f"end of {token}") == 1


def is_progress(message: Any, token: str) -> bool:
    return not isinstance(message, str) and message["params"]["token"] == token
