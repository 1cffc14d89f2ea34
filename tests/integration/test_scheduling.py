"""Who shares work, who goes first, who is too late and who is turned away."""

from collections.abc import Generator
from typing import Any

import pytest
from support.tiny_model import END, make_tokenizer
from support.wire import Guest, Json, Listening, Wire, lines

NO_END = {str(make_tokenizer().token_to_id(END)): -1000}
FINITE: dict[str, Any] = {"tokens": [1], "maxTokens": 200, "logitBias": NO_END}
ENDLESS: dict[str, Any] = {"tokens": [1], "maxTokens": 10**6, "logitBias": NO_END}


@pytest.fixture
def guest(listening_server: Listening) -> Generator[Guest]:
    """A client of a server that nobody else uses, whose work has ended when the next one comes."""
    with listening_server.connect() as one:
        yield one
    with listening_server.connect() as after:
        after.stats_when(lambda stats: stats["engine"]["sequences"] == 0)


@pytest.fixture
def other(listening_server: Listening) -> Generator[Guest]:
    """Another client of that server."""
    with listening_server.connect() as one:
        yield one


def start(guest: Guest, name: str, model: str, **params: Any) -> None:
    """Ask for a stream whose id and token are its name, and wait for its first part."""
    guest.write(lines(generation(name, model, **params)))
    until_parts(guest, name, 1)


def generation(name: str, model: str, **params: Any) -> Json:
    return {
        "id": name,
        "method": "generate",
        "params": ENDLESS | {"model": model, "partialResultToken": name} | params,
    }


def until_parts(guest: Guest, name: str, count: int) -> list[Json]:
    while len(parts := guest.progress(name)) < count:
        guest.result("ping")
    return parts


def tokens_of(parts: list[Json]) -> list[int]:
    return [token for part in parts for token in part["tokens"]]


def is_whole(guest: Guest, name: str, whole: Json) -> bool:
    """Whether a stream brought just what the same request brings unstreamed."""
    result = guest.response(name)["result"]
    parts = guest.progress(name)
    assert result["finishReason"] == whole["finishReason"]
    assert result["usage"] == whole["usage"]
    return "".join(part["text"] for part in parts) == whole["text"] and tokens_of(parts) == whole["tokens"]


def requests(guest: Guest) -> Json:
    return guest.result("stats")["requests"]


# Identical work


def test_eight_identical_streams_are_one_sequence(guest: Guest, roomy: str) -> None:
    shared = requests(guest)["shared"]
    names = [f"s{n}" for n in range(8)]
    guest.write(lines(*(generation(name, roomy) for name in names)))
    for name in names:
        until_parts(guest, name, 10)
    stats = guest.result("stats")
    assert (stats["engine"]["sequences"], stats["models"][-1]["inUse"]) == (1, 8)
    assert stats["requests"]["shared"] == shared + 7
    first = tokens_of(guest.progress("s0"))[:10]
    assert all(tokens_of(guest.progress(name))[:10] == first for name in names)
    for ended, name in enumerate(names, start=1):
        guest.notify("$/cancelRequest", id=name)
        result = guest.response(name)["result"]
        assert (result["finishReason"], result.get("shared", False)) == ("cancelled", name != "s0")
        assert guest.result("stats")["engine"]["sequences"] == (1 if ended < 8 else 0)


def test_who_asks_for_it_has_its_work_to_itself(guest: Guest, roomy: str) -> None:
    shared = requests(guest)["shared"]
    start(guest, "ours", roomy)
    for name in ("a", "b"):
        start(guest, name, roomy, deduplicate=False)
    assert guest.result("stats")["engine"]["sequences"] == 3
    assert requests(guest)["shared"] == shared


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 7}], ids=str)
def test_identical_requests_get_what_one_alone_gets(
    guest: Guest, other: Guest, model: str, sampling: Json
) -> None:
    whole = guest.result("generate", model=model, **FINITE, **sampling)
    names = [f"s{n}" for n in range(4)]
    for one in (guest, other):
        one.write(lines(*(generation(name, model, **FINITE, **sampling) for name in names)))
    for one in (guest, other):
        assert all(is_whole(one, name, whole) for name in names)


def test_who_comes_late_gets_the_past_as_one_part_and_the_rest_as_it_comes(
    guest: Guest, other: Guest, roomy: str
) -> None:
    start(guest, "early", roomy)
    past = len(until_parts(guest, "early", 30))
    start(other, "late", roomy)
    until_parts(other, "late", 5)
    until_parts(guest, "early", past + 5)
    for one, name in ((other, "late"), (guest, "early")):
        one.notify("$/cancelRequest", id=name)
    late, early = other.response("late")["result"], guest.response("early")["result"]
    assert (late.get("shared"), early.get("shared")) == (True, None)
    parts = other.progress("late")
    assert len(parts[0]["tokens"]) >= 30
    assert (parts[0]["seq"], parts[0].get("merged", 1)) == (1, 1)
    assert late["lastSeq"] == sum(part.get("merged", 1) for part in parts)
    seen = min(early["usage"]["completionTokens"], late["usage"]["completionTokens"])
    assert tokens_of(parts)[:seen] == tokens_of(guest.progress("early"))[:seen]
    assert late["timings"]["prefillMs"] == 0


def test_each_has_stop_strings_of_its_own(guest: Guest, model: str) -> None:
    whole = guest.result("generate", model=model, **FINITE)
    stop = whole["text"][40:43]
    cut = guest.result("generate", model=model, **FINITE, stop=[stop])
    guest.write(lines(generation("whole", model, **FINITE), generation("cut", model, **FINITE, stop=stop)))
    assert is_whole(guest, "whole", whole)
    assert is_whole(guest, "cut", cut)
    assert cut["finishReason"] == "stop"
    assert len(cut["text"]) < len(whole["text"])


def test_who_leaves_takes_nothing_from_the_others(
    guest: Guest, listening_server: Listening, model: str
) -> None:
    whole = guest.result("generate", model=model, **FINITE)
    with listening_server.connect() as gone:
        start(gone, "gone", model, **FINITE)
        guest.write(lines(*(generation(name, model, **FINITE) for name in ("cancelled", "late", "stays"))))
        guest.write(lines({"method": "$/cancelRequest", "params": {"id": "cancelled"}}))
        assert guest.response("cancelled")["result"]["finishReason"] == "cancelled"
    assert is_whole(guest, "stays", whole)
    assert is_whole(guest, "late", whole)


def test_without_a_seed_nothing_that_is_sampled_is_shared(guest: Guest, roomy: str) -> None:
    shared = requests(guest)["shared"]
    for name in ("a", "b"):
        start(guest, name, roomy, temperature=1.5)
    assert guest.result("stats")["engine"]["sequences"] == 2
    assert requests(guest)["shared"] == shared


def test_unload_by_force_ends_everybody_who_shares(model: str) -> None:
    with Wire() as wire:
        wire.initialize()
        wire.result("load", model=model)
        names = ["a", "b", "c"]
        wire.write(lines(*(generation(name, model) for name in names)))
        while not wire.progress("c"):
            wire.result("ping")
        unloaded = wire.send("unload", model=model, force=True)
        for name in names:
            ended = wire.response(name)
            assert ended.get("result", {}).get("finishReason") == "length" or (
                ended["error"]["data"]["kind"] == "unloaded"
            )
        assert wire.response(unloaded)["result"]["state"] == "unloaded"
        assert wire.error("generate", model=model, **FINITE)["data"]["kind"] == "model_not_loaded"


# Priorities


@pytest.mark.parametrize("priority", ["critical", "high", "normal", "low"])
def test_a_priority_does_not_change_the_answer(guest: Guest, model: str, priority: str) -> None:
    whole = guest.result("generate", model=model, **FINITE)
    assert guest.result("generate", model=model, **FINITE, priority=priority)["tokens"] == whole["tokens"]


# Deadlines


def test_an_answer_that_takes_too_long_ends_behind_its_parts(guest: Guest, roomy: str) -> None:
    before = requests(guest)
    guest.write(lines(generation("slow", roomy, deadlineMs=300)))
    data = guest.response("slow")["error"]["data"]
    assert data == {
        "kind": "deadline_exceeded",
        "retryable": False,
        "deadlineMs": 300,
        "neverStarted": False,
    }
    assert guest.progress("slow")
    after = guest.stats_when(lambda stats: stats["engine"]["sequences"] == 0)["requests"]
    assert after["deadlineExceeded"] == before["deadlineExceeded"] + 1
    assert after["failed"] == before["failed"] + 1


def test_a_deadline_is_of_one_request_and_not_of_the_work(guest: Guest, roomy: str) -> None:
    start(guest, "patient", roomy)
    guest.write(lines(generation("hasty", roomy, deadlineMs=100)))
    assert guest.response("hasty")["error"]["data"]["kind"] == "deadline_exceeded"
    shown = len(guest.progress("patient"))
    until_parts(guest, "patient", shown + 5)


def test_an_answer_in_time_knows_of_no_deadline(guest: Guest, model: str) -> None:
    whole = guest.result("generate", model=model, **FINITE)
    assert guest.result("generate", model=model, **FINITE, deadlineMs=60_000)["tokens"] == whole["tokens"]


def test_a_deadline_counts_the_time_of_a_load_which_goes_on(model: str) -> None:
    with Wire() as wire:
        wire.initialize()
        loaded = wire.send("load", model=model)
        late = wire.error("generate", model=model, **FINITE, deadlineMs=1)["data"]
        assert (late["kind"], late["neverStarted"]) == ("deadline_exceeded", True)
        assert wire.response(loaded)["result"]["state"] == "ready"


def test_what_cannot_begin_in_time_is_refused_without_a_step(guest: Guest, roomy: str) -> None:
    # A chunk of prefill, from which the engine knows how long the next takes at least.
    guest.result("generate", model=roomy, tokens=[1] * 1000, maxTokens=1)
    steps = guest.result("stats")["engine"]["steps"]
    late = guest.error("generate", model=roomy, tokens=[1] * 500_000, maxTokens=1, deadlineMs=20)["data"]
    assert (late["kind"], late["neverStarted"]) == ("deadline_exceeded", True)
    assert guest.result("stats")["engine"]["steps"] == steps


# The line


def test_who_comes_when_the_line_is_full_is_told_when_to_come_again(
    guest: Guest, other: Guest, roomy: str
) -> None:
    for one in (guest, other):
        one.write(lines(*(generation(f"g{n}", roomy, deduplicate=False) for n in range(900))))
    stats = guest.stats_when(lambda stats: stats["requests"]["overloaded"] > 0)
    assert sum(stats["engine"]["waiting"].values()) >= 1024
    refusal = guest.error("generate", model=roomy, **ENDLESS, deduplicate=False)
    assert refusal["data"].items() >= {"kind": "overloaded", "retryable": True}.items()
    assert refusal["data"]["retryAfterMs"] >= 1
    assert guest.result("ping")["state"] == "ready"


def test_what_could_never_fit_is_refused_and_what_fits_goes_on(roomy: str) -> None:
    budget = 3_000_000
    with Wire("--memory-budget-bytes", str(budget)) as wire:
        wire.initialize()
        weights = wire.result("load", model=roomy)["bytes"]
        running = wire.send("generate", model=roomy, **FINITE, partialResultToken="t")
        data = wire.error("generate", model=roomy, **ENDLESS)["data"]
        assert (data["kind"], data["retryable"]) == ("out_of_memory", False)
        assert data["availableBytes"] == budget - weights < data["neededBytes"]
        assert wire.response(running)["result"]["finishReason"] == "length"


# What can be seen of it


def test_stats_say_what_runs_and_what_memory_is_promised(guest: Guest, roomy: str) -> None:
    for name in ("a", "b"):
        start(guest, name, roomy, deduplicate=False)
    stats = guest.result("stats")
    engine, memory = stats["engine"], stats["memory"]
    assert engine["waiting"] == {"critical": 0, "high": 0, "normal": 0, "low": 0}
    assert (engine["sequences"], engine["prefilling"], engine["running"]) == (2, 0, 2)
    assert engine["decodeGroups"] >= 1
    assert (
        0 < memory["weightsBytes"] < memory["weightsBytes"] + memory["reservedBytes"] <= memory["budgetBytes"]
    )
    assert stats["models"][-1]["batching"] == {"active": True}
    assert stats["models"][-1]["compiledSteps"]["active"] is False
    assert "CUDA" in stats["models"][-1]["compiledSteps"]["reason"]


# Bad input


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("priority", "urgent"),
        ("priority", 0),
        ("priority", None),
        ("deadlineMs", 0),
        ("deadlineMs", -5),
        ("deadlineMs", 1.5),
        ("deadlineMs", 2**31),
        ("deadlineMs", "1000"),
        ("deduplicate", "yes"),
        ("deduplicate", 1),
        ("deduplicate", None),
    ],
)
def test_a_wrong_parameter_is_named(guest: Guest, model: str, name: str, value: Any) -> None:
    error = guest.error("generate", model=model, **FINITE, **{name: value})
    assert (error["code"], error["data"]["path"]) == (-32602, name)
