"""Answers to requests that follow the same work, each in its own way."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_model import make_tokenizer

from mlx_sidecar.protocol.errors import GenerationFailed, InternalError, SlowConsumer
from mlx_sidecar.protocol.messages import GenerateProgress
from mlx_sidecar.runtime.api.generation import Generation
from mlx_sidecar.runtime.engine.sequence import Emission, FinishReason, Sampling, Sequence
from mlx_sidecar.runtime.scheduling.duplicates import Work
from mlx_sidecar.runtime.text.answer import Answer
from mlx_sidecar.runtime.text.detokenizer import Detokenizer, byte_tokens

TOKENIZER = make_tokenizer()
BYTE_TOKENS = byte_tokens(TOKENIZER)
WORDS = TOKENIZER.encode("hello world, hello").ids
ANY_TOKENS = st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=30)
LONG_AGO = 10.0


class Engine:
    """Work that is produced by hand."""

    def __init__(self) -> None:
        self.cancelled: list[Sequence] = []
        self.sequence = Sequence("m", [1, 2], 99, Sampling(), frozenset(), lambda _: None)
        self.work = Work(self.sequence, self.cancelled.append, lambda _: None)

    def produce(self, tokens: list[int]) -> None:
        for token in tokens:
            self.sequence.on_emission(Emission(self.sequence, token, None))

    def end(self, finish: FinishReason = "length") -> None:
        self.sequence.on_emission(Emission(self.sequence, None, finish))

    def follow(self, generation: Generation, *, shared: bool = False) -> Generation:
        generation.follow(self.work, shared=shared)
        return generation


class Broken(Answer):
    """An answer that cannot be turned into text."""

    def feed(self, token: int) -> None:
        raise ValueError(token)


def generation(*stops: str, give: Any = None, kind: type[Answer] = Answer) -> Generation:
    answer = kind(Detokenizer(TOKENIZER, BYTE_TOKENS), list(stops))
    return Generation(answer, time.monotonic(), give)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@given(ANY_TOKENS, st.integers(0, 30), st.lists(st.text("helowrd,� ", min_size=1, max_size=3), max_size=3))
def test_whenever_a_request_joins_its_answer_is_the_one_it_would_get_alone(
    tokens: list[int], join_after: int, stops: list[str]
) -> None:
    engine = Engine()
    alone = engine.follow(generation(*stops))
    engine.follow(generation())  # Somebody else may want more of it than we do.
    engine.produce(tokens[:join_after])
    streamed: list[GenerateProgress] = []
    whole, parts = generation(*stops), generation(*stops, give=streamed.append)
    for late in (whole, parts):
        engine.follow(late, shared=True)
    engine.produce(tokens[join_after:])
    engine.end()
    expected, got, end = alone.result(), whole.result(), parts.result()
    assert (got.text, got.tokens) == (expected.text, expected.tokens)
    assert "".join(part.text for part in streamed) == expected.text
    assert [token for part in streamed for token in part.tokens] == expected.tokens
    assert {result.finish_reason for result in (got, end)} == {expected.finish_reason}
    assert [part.seq for part in streamed] == list(range(1, len(streamed) + 1))
    assert (end.last_seq, end.text_bytes) == (len(streamed), len(str(expected.text).encode()))


def test_what_was_there_comes_as_one_part_and_then_each_token_as_one(engine: Engine) -> None:
    engine.follow(generation())
    engine.produce(WORDS[:3])
    streamed: list[GenerateProgress] = []
    engine.follow(generation(give=streamed.append), shared=True)
    assert [part.tokens for part in streamed] == [WORDS[:3]]
    engine.produce(WORDS[3:])
    assert [part.tokens for part in streamed[1:]] == [[token] for token in WORDS[3:]]


def test_only_those_who_joined_say_that_they_shared(engine: Engine) -> None:
    first, second = engine.follow(generation()), engine.follow(generation(), shared=True)
    engine.end()
    assert (first.result().shared, second.result().shared) == (False, True)


def test_a_stop_string_in_the_past_ends_an_answer_as_it_joins(engine: Engine) -> None:
    going_on = engine.follow(generation())
    engine.produce(WORDS)
    late = engine.follow(generation(" wor"), shared=True)
    assert (late.result().text, late.result().finish_reason) == ("hello", "stop")
    engine.end()
    assert going_on.result().text == "hello world, hello"
    assert engine.cancelled == []


def test_each_ends_at_its_own_stop_string_and_the_last_ends_the_work(engine: Engine) -> None:
    first, second = engine.follow(generation("llo w")), engine.follow(generation(","))
    engine.produce(WORDS[:2])
    assert first.result().text == "he"
    assert engine.cancelled == []
    engine.produce(WORDS[2:])
    assert second.result().text == "hello world"
    assert engine.cancelled == [engine.sequence]


def test_a_cancel_ends_one_answer_where_it_is_and_no_other(engine: Engine) -> None:
    first, second = engine.follow(generation()), engine.follow(generation())
    engine.produce(WORDS[:1])
    first.cancel()
    engine.produce(WORDS[1:])
    engine.end()
    assert (first.result().tokens, first.result().finish_reason) == (WORDS[:1], "cancelled")
    assert (second.result().tokens, second.result().finish_reason) == (WORDS, "length")
    assert engine.cancelled == []


def test_a_cancel_of_the_last_has_all_that_was_produced_until_the_engine_ended_it(engine: Engine) -> None:
    only = engine.follow(generation())
    engine.produce(WORDS[:1])
    only.cancel()
    assert engine.cancelled == [engine.sequence]
    engine.produce(WORDS[1:2])
    engine.end("cancelled")
    assert (only.result().tokens, only.result().finish_reason) == (WORDS[:2], "cancelled")


def test_a_failure_of_one_is_its_own(engine: Engine) -> None:
    slow, other = engine.follow(generation()), engine.follow(generation())
    slow.fail(SlowConsumer(1))
    slow.fail(InternalError())
    engine.produce(WORDS)
    engine.end()
    with pytest.raises(SlowConsumer):
        slow.result()
    assert other.result().tokens == WORDS


def test_an_answer_that_cannot_be_turned_into_text_fails_alone(engine: Engine) -> None:
    broken, other = engine.follow(generation(kind=Broken)), engine.follow(generation())
    engine.produce(WORDS)
    engine.end()
    with pytest.raises(InternalError):
        broken.result()
    assert other.result().tokens == WORDS


def test_a_past_that_cannot_be_turned_into_text_fails_who_joins_and_nobody_else(engine: Engine) -> None:
    other = engine.follow(generation())
    engine.produce(WORDS)
    broken = engine.follow(generation(kind=Broken))
    with pytest.raises(InternalError):
        broken.result()
    engine.end()
    assert other.result().tokens == WORDS


def test_a_failure_of_the_work_is_everybodys_and_says_what_the_engine_says(engine: Engine) -> None:
    both = [engine.follow(generation()), engine.follow(generation(), shared=True)]
    engine.sequence.failure = GenerationFailed("it is a test", "Do not worry")
    engine.end("failed")
    for one in both:
        with pytest.raises(GenerationFailed, match="it is a test"):
            one.result()


def test_a_failure_of_which_nothing_is_said_is_our_fault(engine: Engine) -> None:
    one = engine.follow(generation())
    engine.end("failed")
    with pytest.raises(InternalError):
        one.result()


def test_times_of_who_came_late_do_not_count_what_had_been_done(engine: Engine) -> None:
    engine.follow(generation())
    engine.produce(WORDS[:3])
    now = time.monotonic()
    engine.sequence.submitted_at = now - LONG_AGO
    engine.sequence.started_at = now - LONG_AGO + 1
    engine.sequence.first_token_at = now - LONG_AGO + 2
    late = engine.follow(generation(), shared=True)
    engine.produce(WORDS[3:])
    engine.sequence.finished_at = now + 2 * LONG_AGO
    engine.end()
    timings = late.result().timings
    assert (timings.queue_ms, timings.prefill_ms) == (0, 0)
    assert timings.ttft_ms < (LONG_AGO - 2) * 1000, "its first token was there when it came"
    assert 0 < timings.decode_ms <= 2 * LONG_AGO * 1000
    assert timings.tokens_per_second == round(2000 / timings.decode_ms, 3)


def test_times_of_who_was_first_are_those_of_the_work(engine: Engine) -> None:
    first = engine.follow(generation())
    now = time.monotonic()
    engine.sequence.started_at = now + 1
    engine.sequence.first_token_at = now + 3
    engine.sequence.finished_at = now + 3 + len(WORDS) - 1
    engine.produce(WORDS)
    engine.end()
    timings = first.result().timings
    assert timings.prefill_ms == pytest.approx(2000)
    assert timings.tokens_per_second == pytest.approx(1)
