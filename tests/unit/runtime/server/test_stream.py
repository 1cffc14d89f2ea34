from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sidecar.protocol import jsonrpc
from mlx_sidecar.protocol.messages import Candidate, GenerateProgress, LoadProgress, TokenLogProbs
from mlx_sidecar.runtime.server.stream import Stream

RESPONSE = b"{}"


def new_stream() -> Stream:
    return Stream("t", lambda: None)


def part(seq: int, text: str = "x", top: int | None = None) -> GenerateProgress:
    made = GenerateProgress(seq=seq, text=text, tokens=[seq])
    if top is not None:
        candidates = [Candidate(token=token, log_prob=-1 / 3) for token in range(top)]
        made.log_probs = [TokenLogProbs(log_prob=-float(seq), top=candidates)]
    return made


def taken(stream: Stream, window: int | None = None) -> GenerateProgress:
    found, _ = stream.take(window)
    assert isinstance(found, GenerateProgress)
    return found


def test_one_part_is_taken_as_it_is() -> None:
    stream = new_stream()
    only = part(1, "one")
    stream.add(only)
    assert taken(stream) is only


def test_parts_that_gathered_are_taken_as_one() -> None:
    stream = new_stream()
    for seq, text in enumerate(("one ", "", "two"), 1):
        stream.add(part(seq, text))
    assert taken(stream) == GenerateProgress(seq=3, text="one two", tokens=[1, 2, 3], merged=3)
    assert not stream.ready(None)


def test_of_a_load_only_the_newest_progress_is_taken_and_no_window_holds_it_up() -> None:
    stream = new_stream()
    parts = [
        LoadProgress(seq=n, phase="weights", done_bytes=n, total_bytes=9, tensors=n, total_tensors=9)
        for n in range(1, 4)
    ]
    for part in parts:
        stream.add(part)
    assert stream.take(1)[0] is parts[-1]
    stream.add(parts[0])
    assert stream.ready(1)


def test_the_response_comes_when_every_part_has_been_taken() -> None:
    stream = new_stream()
    stream.add(part(1))
    stream.response = RESPONSE
    assert stream.ready(None)
    assert stream.ended() is None
    stream.take(None)
    assert stream.ended() == RESPONSE


def test_a_stream_without_parts_is_nothing_but_its_response() -> None:
    stream = new_stream()
    assert not stream.ready(None)
    stream.response = RESPONSE
    assert stream.ready(1)
    assert stream.take(1) == (None, 0)
    assert stream.ended() == RESPONSE


@pytest.mark.parametrize("text", ["", "ascii", "é" * 1000])
def test_what_a_part_costs_is_given_back_when_it_is_taken(text: str) -> None:
    stream = new_stream()
    costs = [stream.add(part(seq, text)) for seq in range(1, 4)]
    assert min(costs) > len(text.encode())
    assert stream.take(None)[1] == sum(costs)


def test_a_backlog_is_taken_in_frames_far_below_the_limit() -> None:
    stream = new_stream()
    letters = 100_000
    for seq in range(1, 41):
        stream.add(part(seq, "\x01" * letters))
    stream.response = RESPONSE
    sizes: list[int] = []
    while stream.ended() is None:
        sizes.append(len(taken(stream).text))
    assert sum(sizes) == 40 * letters
    # Each of these characters takes six bytes as JSON.
    assert len(sizes) > 1
    assert max(sizes) * 6 < 16 * 1024 * 1024 / 2


def test_a_backlog_of_log_probabilities_is_taken_in_frames_far_below_the_limit() -> None:
    stream = new_stream()
    owed = sum(stream.add(part(seq, "", 20)) for seq in range(1, 10_001))
    stream.response = RESPONSE
    frames: list[GenerateProgress] = []
    while stream.ended() is None:
        frames.append(taken(stream))
    told = [one.log_prob for frame in frames for one in frame.log_probs or []]
    assert told == [-float(seq) for seq in range(1, 10_001)]
    assert len(frames) > 1
    sizes = [len(jsonrpc.encode_notification("$/progress", frame)) for frame in frames]
    assert max(sizes) < 16 * 1024 * 1024 / 4
    assert owed > sum(sizes)


def test_beyond_the_window_nothing_is_taken_until_an_ack() -> None:
    stream = new_stream()
    for seq in range(1, 11):
        stream.add(part(seq, "12345"))
    first = taken(stream, 10)
    assert (first.seq, first.merged) == (2, 2)
    assert not stream.ready(10)
    stream.ack(1)
    assert not stream.ready(10), "a part of a frame is no frame"
    stream.ack(2)
    assert stream.ready(10)
    assert taken(stream, 10).seq == 4


def test_an_ack_is_absolute_so_a_lost_one_is_healed_by_the_next() -> None:
    stream = new_stream()
    for seq in range(1, 4):
        stream.add(part(seq, "12345"))
        taken(stream, 100)
    stream.ack(3)
    stream.ack(1)
    for seq in range(4, 100):
        stream.add(part(seq, "12345"))
    assert taken(stream, 100).merged == 20


def test_an_ack_of_what_was_never_sent_opens_no_more_than_the_window() -> None:
    stream = new_stream()
    stream.add(part(1, "12345"))
    taken(stream, 10)
    stream.ack(2**53 - 1)
    for seq in range(2, 50):
        stream.add(part(seq, "12345"))
    assert taken(stream, 10).merged == 2
    assert not stream.ready(10)


def test_a_window_smaller_than_any_part_lets_one_through_at_a_time() -> None:
    stream = new_stream()
    for seq in range(1, 4):
        stream.add(part(seq, "12345"))
    for seq in range(1, 4):
        assert taken(stream, 1).seq == seq
        assert not stream.ready(1)
        stream.ack(seq)


def test_parts_without_text_do_not_use_up_the_window() -> None:
    stream = new_stream()
    stream.add(part(1, "12345"))
    taken(stream, 10)
    for seq in range(2, 100):
        stream.add(part(seq, ""))
    assert taken(stream, 10).merged == 98
    assert not stream.ready(10)


def test_the_end_does_not_wait_for_the_window() -> None:
    stream = new_stream()
    for seq in range(1, 11):
        stream.add(part(seq, "12345"))
    taken(stream, 1)
    stream.response = RESPONSE
    assert stream.ready(1)
    assert taken(stream, 1).seq == 10
    assert stream.ended() == RESPONSE


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
steps = st.lists(st.one_of(texts, st.just("take"), st.integers(0, 3)), max_size=60)


@given(steps=steps, window=st.none() | st.integers(1, 30), top=st.none() | st.integers(0, 2))
def test_nothing_is_lost_repeated_or_reordered_whatever_the_reader_does(
    steps: list[str | int], window: int | None, top: int | None
) -> None:
    stream, said, seqs = new_stream(), "", count(1)
    heard: list[GenerateProgress] = []
    owed = 0

    def take() -> None:
        nonlocal owed
        if stream.ready(window):
            found, cost = stream.take(window)
            owed -= cost
            if isinstance(found, GenerateProgress):
                heard.append(found)

    for step in steps:
        if step == "take":
            take()
        elif isinstance(step, str):
            owed += stream.add(part(next(seqs), step, top))
            said += step
        elif heard:
            # Acks lag behind what was heard.
            stream.ack(heard[max(len(heard) - 1 - step, 0)].seq)
    stream.response = RESPONSE
    finish(stream, take)

    last = next(seqs) - 1
    assert "".join(piece.text for piece in heard) == said
    assert [token for piece in heard for token in piece.tokens] == list(range(1, last + 1))
    told = [one.log_prob for piece in heard for one in piece.log_probs or []]
    assert told == ([] if top is None else [-float(seq) for seq in range(1, last + 1)])
    assert sum(piece.merged for piece in heard) == (heard[-1].seq if heard else 0) == last
    assert [piece.seq for piece in heard] == sorted({piece.seq for piece in heard})
    assert owed == 0


def finish(stream: Stream, take: Callable[[], None]) -> None:
    for _ in range(1000):
        if stream.ended() is not None:
            return
        take()
    raise AssertionError("the stream does not end")
