"""What flows when: slow readers, windows, cancels, and what a step sends."""

import json
import threading
from collections.abc import Generator
from typing import Any

import pytest
from support.tiny_model import END, make_tokenizer
from support.wire import Guest, Json, Listening, Wire, lines

NO_END = {str(make_tokenizer().token_to_id(END)): -1000}
FINITE: dict[str, Any] = {"tokens": [1], "maxTokens": 200, "logitBias": NO_END}
ENDLESS: dict[str, Any] = {"maxTokens": 10**9, "logitBias": {"3": 1000}}
"""One byte of text a token."""

MORE_THAN_A_SOCKET_HOLDS = [{"id": f"stuffing {n}", "method": "rpc.discover"} for n in range(20)]


@pytest.fixture
def reader(listening_server: Listening) -> Generator[Guest]:
    """A client that reads what it asks for."""
    with listening_server.connect() as guest:
        yield guest


@pytest.fixture
def deaf(listening_server: Listening) -> Generator[Guest]:
    """A client that a test leaves unread for a while."""
    with listening_server.connect() as guest:
        yield guest


def generation(request_id: str, model: str, **params: Any) -> Json:
    return {"id": request_id, "method": "generate", "params": FINITE | {"model": model} | params}


def text_of(pieces: list[Json]) -> str:
    return "".join(piece["text"] for piece in pieces)


def is_whole(pieces: list[Json], result: Json, expected: Json) -> bool:
    assert text_of(pieces) == expected["text"]
    assert [token for piece in pieces for token in piece["tokens"]] == expected["tokens"]
    assert len(text_of(pieces).encode()) == result["textBytes"]
    assert pieces[-1]["seq"] == result["lastSeq"] == sum(piece.get("merged", 1) for piece in pieces)
    return [piece["seq"] for piece in pieces] == sorted({piece["seq"] for piece in pieces})


# Slow readers


def test_who_does_not_read_holds_up_nobody_and_finds_everything_later(
    reader: Guest, deaf: Guest, model: str
) -> None:
    whole = reader.result("generate", model=model, **FINITE)
    finished = reader.result("stats")["requests"]["finished"]
    # In one write, so that all of it has been taken when the last of it has.
    deaf.write(
        lines(
            *MORE_THAN_A_SOCKET_HOLDS,
            *(generation(token, model, partialResultToken=token) for token in ("a", "b")),
            {"id": "late", "method": "ping"},
        )
    )
    streamed = reader.send("generate", model=model, **FINITE, partialResultToken="t")
    assert is_whole(*answered(reader, streamed, "t"), whole)
    reader.stats_when(lambda stats: stats["requests"]["finished"] == finished + 3)

    ping = deaf.response("late")
    assert "result" in ping
    assert not deaf.progress("a"), "a ping overtakes the backlog"
    assert not deaf.progress("b"), "a ping overtakes the backlog"
    for token in ("a", "b"):
        pieces, result = answered(deaf, token, token)
        assert is_whole(pieces, result, whole)
        assert len(pieces) < 100, "what had to wait goes out merged"


def answered(guest: Guest, request_id: int | str, token: str) -> tuple[list[Json], Json]:
    result = guest.response(request_id)["result"]
    return guest.progress(token), result


def test_who_never_reads_again_can_leave_without_a_trace(
    listening_server: Listening, reader: Guest, roomy: str
) -> None:
    requests = reader.result("stats")["requests"]
    before, failed = requests["cancelled"], requests["failed"]
    streaming = generation("x", roomy, **ENDLESS, partialResultToken=1)
    with listening_server.connect() as gone:
        gone.write(lines(*MORE_THAN_A_SOCKET_HOLDS, streaming))
        reader.stats_when(lambda stats: stats["engine"]["sequences"] == 1)
    stats = reader.stats_when(lambda stats: stats["requests"]["cancelled"] == before + 1)
    assert stats["requests"]["failed"] == failed


def test_who_asks_without_reading_is_not_read_from_and_loses_nothing(
    listening_server: Listening, reader: Guest
) -> None:
    limit = reader.result("server/info")["limits"]["maxUnsentBytes"]
    answer = len(json.dumps(reader.result("rpc.discover")))
    count = 4 * limit // answer
    flood = lines(*({"id": n, "method": "rpc.discover"} for n in range(count)), {"method": "padding" * 10**6})
    before = reader.result("stats")["memory"]["residentBytes"]
    with listening_server.connect() as greedy:
        writing = threading.Thread(target=greedy.write, args=[flood])
        writing.start()
        held = reader.stats_when(lambda stats: stats["memory"]["residentBytes"] > before + limit // 2)
        assert held["memory"]["residentBytes"] < before + 3 * limit
        assert writing.is_alive()
        answers = [greedy.line() or b"" for _ in range(count)]
        writing.join(60)
        assert [int(line[:40].split(b'"id":')[1].split(b",")[0]) for line in answers] == list(range(count))
        assert greedy.result("ping")["state"] == "ready"


def test_streams_that_nobody_reads_end_with_slow_consumer_behind_parts_that_are_complete(
    reader: Guest, deaf: Guest, roomy: str
) -> None:
    limit = reader.result("server/info")["limits"]["maxUnsentBytes"]
    failed = reader.result("stats")["requests"]["failed"]
    asked = FINITE | {"maxTokens": 10**6}
    # They share one sequence, so with every step a hundred parts more are waiting.
    names = [f"s{n}" for n in range(200)]
    deaf.write(lines(*(generation(name, roomy, **asked, partialResultToken=name) for name in names)))
    reader.stats_when(lambda stats: stats["requests"]["failed"] == failed + len(names))

    told = {"kind": "slow_consumer", "retryable": True, "maxUnsentBytes": limit}
    assert all(deaf.response(name)["error"]["data"] == told for name in names)
    streams = [deaf.progress(name) for name in names]
    tokens = [[token for part in parts for token in part["tokens"]] for parts in streams]
    assert sum(map(len, tokens)) * 1000 > limit, "what had waited has come"
    whole = reader.result("generate", model=roomy, **asked | {"maxTokens": max(map(len, tokens))})
    for parts, said in zip(streams, tokens, strict=True):
        assert said == whole["tokens"][: len(said)]
        assert whole["text"].startswith(text_of(parts))
        assert parts[-1]["seq"] == sum(part.get("merged", 1) for part in parts)
    assert deaf.result("generate", model=roomy, **FINITE)["finishReason"] == "length"


def test_more_requests_than_may_be_in_flight_are_overloaded_and_the_others_go_on(
    listening_server: Listening, reader: Guest, roomy: str
) -> None:
    limit = reader.result("server/info")["limits"]["maxInFlight"]
    with listening_server.connect() as greedy:
        asked = [generation(f"g{n}", roomy, **ENDLESS) for n in range(limit)]
        greedy.write(lines(*asked))
        refusal = greedy.error("stats")
        assert refusal["data"] == {"kind": "overloaded", "retryable": True, "maxInFlight": limit}
        assert greedy.result("ping")["inFlight"] == limit
        reader.stats_when(lambda stats: stats["models"][-1]["inUse"] >= limit)
        for request in asked:
            greedy.notify("$/cancelRequest", id=request["id"])
        for request in asked:
            assert greedy.response(request["id"])["result"]["finishReason"] == "cancelled"


# Windows


def test_text_beyond_the_window_is_held_back_until_it_is_confirmed_or_ends(
    listening_server: Listening, reader: Guest, roomy: str
) -> None:
    window = 10
    with listening_server.connect(flowControl={"windowBytes": window}) as paced:
        sent = paced.send("generate", model=roomy, tokens=[1], **ENDLESS, partialResultToken="t")
        steps = reader.result("stats")["engine"]["steps"]
        reader.stats_when(lambda stats: stats["engine"]["steps"] > steps + 60)
        paced.result("ping")
        assert len(text_of(paced.progress("t"))) == window
        paced.notify("$/streamAck", token="t", seq=paced.progress("t")[-1]["seq"])
        paced.result("ping")
        assert len(text_of(paced.progress("t"))) == 2 * window
        paced.notify("$/cancelRequest", id=sent)
        pieces, result = answered(paced, sent, "t")
        assert len(text_of(pieces)) == result["textBytes"] > 50
        assert sum(piece.get("merged", 1) for piece in pieces) == result["lastSeq"]


def test_a_stream_that_is_confirmed_as_it_comes_flows(listening_server: Listening, model: str) -> None:
    with listening_server.connect(flowControl={"windowBytes": 1}) as paced:
        whole = paced.result("generate", model=model, **FINITE)
        paced.write(lines(generation("x", model, partialResultToken="t")))
        pieces: list[Json] = []
        while "method" in (message := paced.read()):
            pieces.append(message["params"]["value"])
            paced.notify("$/streamAck", token="t", seq=pieces[-1]["seq"])
        assert is_whole(pieces, message["result"], whole)


def test_who_never_confirms_still_gets_everything_in_the_end(listening_server: Listening, model: str) -> None:
    with listening_server.connect(flowControl={"windowBytes": 1}) as paced:
        whole = paced.result("generate", model=model, **FINITE)
        sent = paced.send("generate", model=model, **FINITE, partialResultToken="t")
        pieces, result = answered(paced, sent, "t")
        assert is_whole(pieces, result, whole)
        assert len(pieces) < 10


# Cancels


def test_a_cancel_in_the_queue_ends_what_has_never_begun(roomy: str) -> None:
    with Wire("--max-sequences", "1") as wire:
        wire.initialize()
        wire.result("load", model=roomy)
        running = wire.send(
            "generate",
            model=roomy,
            tokens=[1],
            maxTokens=10**6,
            logitBias=NO_END,
            partialResultToken="running",
        )
        while not wire.progress("running"):
            wire.result("ping")
        queued = wire.send("generate", model=roomy, tokens=[2], maxTokens=10**6, logitBias=NO_END)
        wire.stats_when(lambda stats: stats["engine"]["waiting"]["normal"] == 1)
        for request, has_begun in ((queued, False), (running, True)):
            wire.notify("$/cancelRequest", id=request)
            result = wire.response(request)["result"]
            assert result["finishReason"] == "cancelled"
            assert (result["usage"]["completionTokens"] > 0) == has_begun


def test_a_cancel_during_prefill_and_during_decode_frees_everything(reader: Guest, roomy: str) -> None:
    reader.result("generate", model=roomy, tokens=[1], maxTokens=2, logitBias=NO_END)
    before = reader.stats_when(lambda stats: stats["engine"]["sequences"] == 0)

    def start(name: str, **params: Any) -> None:
        reader.write(lines(generation(name, roomy, partialResultToken=name, **params)))

    def cancelled(name: str) -> Json:
        reader.notify("$/cancelRequest", id=name)
        reader.notify("$/cancelRequest", id=name)
        result = reader.response(name)["result"]
        assert result["finishReason"] == "cancelled"
        assert result["lastSeq"] == sum(piece.get("merged", 1) for piece in reader.progress(name))
        return result

    start("decode", maxTokens=10**9)
    while not reader.progress("decode"):
        reader.result("ping")
    start("prefill", tokens=[1] * 20_000, maxTokens=10**9)
    shown = len(reader.progress("decode"))
    while len(reader.progress("decode")) < shown + 5:
        reader.result("ping")

    assert reader.progress("prefill") == []
    assert cancelled("prefill")["usage"]["completionTokens"] == 0
    assert cancelled("decode")["usage"]["completionTokens"] > 5
    after = reader.stats_when(
        lambda stats: (
            stats["engine"]["sequences"] == 0
            and stats["memory"]["mlxActiveBytes"] <= before["memory"]["mlxActiveBytes"] + 50_000
        )
    )
    assert after["requests"]["cancelled"] == before["requests"]["cancelled"] + 2
    # Nothing comes after the answers.
    request_id = reader.send("ping")
    assert reader.read()["id"] == request_id


# Steps


def test_the_tokens_of_one_step_arrive_together(reader: Guest, roomy: str) -> None:
    tokens = [f"stream {n}" for n in range(4)]
    alone: dict[str, Any] = ENDLESS | {"deduplicate": False}
    reader.write(lines(*(generation(t, roomy, **alone, partialResultToken=t) for t in tokens)))
    reads: list[bytes] = []
    while len(reads) < 30:
        reads.append(reader.socket.recv(1 << 20))
    counts = [[read.count(f'"{token}"'.encode()) for token in tokens] for read in reads]
    together = [count for count in counts if all(count)]
    # They join one after the other; from then on every read has as much of each.
    assert len(together) > 20
    assert all(len(set(count)) == 1 for count in together)
    assert counts.index(together[0]) + len(together) == len(counts)
    for token in tokens:
        reader.notify("$/cancelRequest", id=token)
    while sum(b"finishReason" in read for read in b"".join(reads).splitlines()) < len(tokens):
        reads.append(reader.socket.recv(1 << 20))


def test_a_pipe_is_no_worse_than_a_socket(tiny_server: Wire, model: str) -> None:
    whole = tiny_server.result("generate", model=model, **FINITE)
    sent = [tiny_server.send("generate", model=model, **FINITE, partialResultToken=f"p{n}") for n in range(4)]
    for n, request_id in enumerate(sent):
        result = tiny_server.response(request_id)["result"]
        assert is_whole(tiny_server.progress(f"p{n}"), result, whole)
