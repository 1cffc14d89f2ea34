"""Many models in one budget: who is in memory, who leaves it, and that nobody's request notices."""

import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from support.tiny_folders import clear_answer, float32_network, make_folder, silence_the_end
from support.wire import PATIENCE_SECONDS, Guest, Listening, Talk, Wire

PROMPT, SHORT, LONG = 21, 12, 200
LARGE = 3_000_000
SIZES = (LARGE, LARGE, LARGE, LARGE, 2_000_000, 1_000_000)
"""Of the weights of the models on the shelf, in bytes: about."""

# Small chunks have small peaks: what a budget of three models leaves beside them is enough for requests.
CHUNKS = ("--prefill-chunk-tokens-cpu", "8")
CYCLES = 150
ROUNDING_BYTES = 4096
PHASES = ["queued", "checking", "queued", "weights", "warmup"]


class Model(NamedTuple):
    """A folder, the bytes of its weights, and what mlx-lm answers to a prompt."""

    folder: str
    bytes: int
    prompt: list[int]
    answer: list[int]

    def asking(self, tokens: int = SHORT, **more: Any) -> dict[str, Any]:
        """Return the parameters of a request for so much of the answer."""
        return {"model": self.folder, "tokens": self.prompt, "maxTokens": tokens} | more


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    """Six models of three sizes."""
    home = tmp_path_factory.mktemp("shelf")
    return [make_model(home / f"model-{seed}", seed, size) for seed, size in enumerate(SIZES)]


def make_model(folder: Path, seed: int, size: int) -> Model:
    make_folder(folder, "llama", seed=seed, bytes_target=size)
    silence_the_end(folder)
    module = float32_network(folder)
    prompt, answer = clear_answer(module, PROMPT, LONG)
    return Model(str(folder), sum_of_weights(folder), prompt, answer)


def sum_of_weights(folder: Path) -> int:
    """Return the bytes of all tensors of a folder in float32."""
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")


def budget_of(models: int, shelf: list[Model]) -> tuple[str, ...]:
    """Return the arguments for a budget in which so many large models fit, and not one more."""
    return (*CHUNKS, "--memory-budget-bytes", str((models + 1) * shelf[0].bytes - 1))


@pytest.fixture(scope="module")
def room_for_three(shelf: list[Model]) -> Iterator[Wire]:
    with Wire(*budget_of(3, shelf)) as wire:
        wire.initialize()
        yield wire


@pytest.fixture
def three(room_for_three: Wire) -> Iterator[Wire]:
    """A server with room for three large models, and none in it."""
    assert room_for_three.result("models")["models"] == []
    yield room_for_three
    for info in room_for_three.result("models")["models"]:
        room_for_three.call("unload", model=info["model"], force=True)


def states(talk: Talk) -> dict[str, str]:
    return {info["model"]: info["state"] for info in talk.result("models")["models"]}


def info_of(talk: Talk, model: Model) -> dict[str, Any]:
    return next(info for info in talk.result("models")["models"] if info["model"] == model.folder)


def state_when(talk: Talk, model: Model, state: str) -> None:
    """Wait until a model is in a state."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (now := states(talk)).get(model.folder) != state:
        assert time.monotonic() < deadline, now


def load(talk: Talk, *models: Model, **more: Any) -> None:
    for model in models:
        assert talk.result("load", model=model.folder, **more)["state"] == "ready"


class Stream(NamedTuple):
    """A long answer that is on its way."""

    model: Model
    talk: Talk
    request: int
    token: str

    @property
    def tokens(self) -> list[int]:
        """What has come so far."""
        return [token for part in self.talk.progress(self.token) for token in part["tokens"]]

    def assert_ends_whole(self) -> None:
        """Wait for the end, which comes after all of the answer."""
        assert self.talk.response(self.request)["result"]["finishReason"] == "length"
        assert self.tokens == self.model.answer


def begin(talk: Talk, answering: Model, **more: Any) -> Stream:
    """Begin to stream a long answer; it has begun when this returns."""
    token = str(uuid4())
    request = talk.send("generate", **answering.asking(LONG, partialResultToken=token) | more)
    while not talk.progress(token):
        talk.result("ping")
    return Stream(answering, talk, request, token)


def assert_answers(talk: Talk, answering: Model, **more: Any) -> None:
    """Ask for a short answer, which must be that of a model."""
    assert talk.result("generate", **answering.asking() | more)["tokens"] == answering.answer[:SHORT]


def assert_within_budget(stats: dict[str, Any]) -> None:
    memory = stats["memory"]
    # A load that waits for room counts as well; what is being read is in the second figure.
    assert memory["weightsBytes"] + memory["reservedBytes"] <= memory["budgetBytes"], memory
    assert memory["mlxActiveBytes"] <= memory["budgetBytes"], memory


# Who leaves


def test_the_least_recently_used_leaves_and_comes_back_when_it_is_asked_for(
    three: Wire, shelf: list[Model]
) -> None:
    first, second, third, fourth, *_ = shelf
    load(three, first, second, third)
    assert_answers(three, first)
    before = three.result("stats")["residency"]
    load(three, fourth)
    assert states(three) == {
        first.folder: "ready",
        second.folder: "evicted",
        third.folder: "ready",
        fourth.folder: "ready",
    }
    assert_answers(three, second)
    assert states(three)[third.folder] == "evicted"
    after = three.result("stats")["residency"]
    assert after["evicted"] - before["evicted"] == 2
    assert after["broughtBack"] - before["broughtBack"] == 1
    assert info_of(three, second)["loads"] == 2
    assert info_of(three, second)["uses"] == 1


def test_no_more_leaves_than_has_to(three: Wire, shelf: list[Model]) -> None:
    *_, large, middle, small = shelf
    load(three, shelf[0], shelf[1], small, large)
    assert states(three)[shelf[0].folder] == "ready"
    load(three, middle)
    gone = [folder for folder, state in states(three).items() if state == "evicted"]
    assert gone == [shelf[0].folder]
    assert_within_budget(three.result("stats"))


def test_what_is_pinned_stays_and_another_leaves(three: Wire, shelf: list[Model]) -> None:
    first, second, third, fourth, *_ = shelf
    load(three, first, pin=True)
    load(three, second, third, fourth)
    assert states(three)[first.folder] == "ready"
    assert states(three)[second.folder] == "evicted"
    assert info_of(three, first)["pinned"]
    load(three, first, pin=False)
    load(three, second)
    assert states(three)[first.folder] == "evicted"


def test_where_all_is_pinned_there_is_no_room_and_the_numbers_say_so(three: Wire, shelf: list[Model]) -> None:
    first, second, third, fourth, *_ = shelf
    load(three, first, second, third, pin=True)
    failure = three.error("load", model=fourth.folder)
    assert failure["data"]["kind"] == "out_of_memory"
    assert failure["data"]["model"] == fourth.folder
    assert failure["data"]["neededBytes"] == fourth.bytes
    budget = three.result("stats")["memory"]["budgetBytes"]
    assert failure["data"]["availableBytes"] == budget - 3 * first.bytes
    assert info_of(three, fourth)["state"] == "failed"
    assert info_of(three, fourth)["failure"]["kind"] == "out_of_memory"
    for model in (first, second, third):
        assert_answers(three, model)
    load(three, second, pin=False)
    load(three, fourth)
    assert states(three)[second.folder] == "evicted"


def test_a_budget_smaller_than_one_model_refuses_it_and_takes_a_smaller_one(shelf: list[Model]) -> None:
    large, small = shelf[0], shelf[-1]
    with Wire(*CHUNKS, "--memory-budget-bytes", str(large.bytes - 1)) as wire:
        wire.initialize()
        before = wire.stats_when(lambda stats: "budgetBytes" in stats["memory"])["memory"]
        failure = wire.error("load", model=large.folder)
        assert failure["data"] == {
            "kind": "out_of_memory",
            "retryable": False,
            "model": large.folder,
            "neededBytes": large.bytes,
            "availableBytes": large.bytes - 1,
        }
        after = wire.result("stats")["memory"]
        assert after["weightsBytes"] == after["loadingBytes"] == after["reservedBytes"] == 0
        assert after["mlxActiveBytes"] - before["mlxActiveBytes"] <= ROUNDING_BYTES
        load(wire, small)
        assert_answers(wire, small)


def test_what_is_unused_for_its_time_to_live_leaves_and_comes_back(three: Wire, shelf: list[Model]) -> None:
    brief, lasting, *_ = shelf
    expired = three.result("stats")["residency"]["expired"]
    load(three, brief, ttlMs=1)
    load(three, lasting)
    assert info_of(three, brief)["ttlMs"] == 1
    state_when(three, brief, "evicted")
    stats = three.result("stats")
    assert stats["residency"]["expired"] > expired
    assert stats["memory"]["weightsBytes"] == lasting.bytes
    assert_answers(three, brief)
    load(three, brief, ttlMs=None)
    assert info_of(three, brief)["ttlMs"] is None
    assert states(three)[lasting.folder] == "ready"


def test_what_is_in_use_is_drained_and_not_cut(three: Wire, shelf: list[Model]) -> None:
    *resident, newcomer = shelf[:4]
    load(three, *resident)
    streams = [begin(three, model) for model in resident]
    loading = three.send("load", model=newcomer.folder)
    late = [three.send("generate", **model.asking()) for model in shelf[:4]]
    for stream in streams:
        stream.assert_ends_whole()
    assert three.response(loading)["result"]["state"] == "ready"
    for model, request in zip(shelf, late, strict=False):
        assert three.response(request)["result"]["tokens"] == model.answer[:SHORT]
    assert_within_budget(three.result("stats"))


def test_two_models_that_do_not_fit_together_take_turns(shelf: list[Model]) -> None:
    with Wire(*budget_of(1, shelf)) as wire:
        wire.initialize()
        first, second, *_ = shelf
        load(wire, first, second)
        sent = [(model, wire.send("generate", **model.asking())) for model in (first, second) * 6]
        for model, request in sent:
            assert wire.response(request)["result"]["tokens"] == model.answer[:SHORT]
            assert_within_budget(wire.result("stats"))
        assert wire.result("stats")["residency"]["broughtBack"] >= 1


def test_models_that_leave_no_room_for_each_others_requests_take_turns(shelf: list[Model]) -> None:
    two = shelf[:2]
    budget = sum(model.bytes for model in two) + two[0].bytes // 8
    with Wire(*CHUNKS, "--memory-budget-bytes", str(budget)) as wire:
        wire.initialize()
        load(wire, *two)
        # Both are in memory, and neither can answer as long as the other is.
        assert set(states(wire).values()) == {"ready"}
        assert info_of(wire, two[0])["prefillPeakBytes"] > two[0].bytes // 8
        sent = [
            (model, wire.send("generate", **model.asking(1 + turn))) for turn in range(4) for model in two
        ]
        for number, (model, request) in enumerate(sent):
            assert wire.response(request)["result"]["tokens"] == model.answer[: 1 + number // 2]
        assert_within_budget(wire.result("stats"))


def test_a_request_too_large_beside_the_others_has_them_leave(three: Wire, shelf: list[Model]) -> None:
    first, second, third, *_ = shelf
    load(three, first, second, third)
    info = info_of(three, first)
    free = three.result("stats")["memory"]["budgetBytes"] - 3 * first.bytes - info["prefillPeakBytes"]
    tokens = free // info["kvBytesPerToken"] + 1
    assert tokens < info["contextLength"]
    large = begin(three, first, maxTokens=tokens)
    while len(large.tokens) < LONG:
        three.result("ping")
    assert large.tokens[:LONG] == first.answer
    assert "evicted" in states(three).values()
    assert states(three)[first.folder] == "ready"
    assert_within_budget(three.result("stats"))
    three.notify("$/cancelRequest", id=large.request)
    assert three.response(large.request)["result"]["finishReason"] == "cancelled"


# Coming into memory


def test_requests_wait_in_order_for_a_model_that_is_loading(shelf: list[Model]) -> None:
    model = shelf[0]
    with Wire(*CHUNKS, "--max-sequences", "1") as wire:
        wire.initialize()
        order = [wire.send("load", model=model.folder)]
        # No two alike, or they would be worked out together.
        order += [wire.send("generate", **model.asking(number + 1)) for number in range(6)]
        answers = [wire.read() for _ in order]
        assert [answer["id"] for answer in answers] == order
        for number, answer in enumerate(answers[1:]):
            assert answer["result"]["tokens"] == model.answer[: number + 1]


def test_two_who_load_the_same_model_share_it(socket_path: Path, shelf: list[Model]) -> None:
    model = shelf[0]
    with Listening(socket_path, *CHUNKS) as server, server.connect() as one, server.connect() as other:
        sent = [(guest, guest.send("load", model=model.folder)) for guest in (one, other)]
        answers = [guest.response(request)["result"] for guest, request in sent]
        assert answers[0] == answers[1]
        assert info_of(one, model)["loads"] == 1
        assert one.result("stats")["memory"]["weightsBytes"] == model.bytes
        # One goes away; the model stays for the other.
        one.close()
        assert_answers(other, model)


def test_a_cancelled_load_leaves_nothing_and_nobody_leaves_for_it(three: Wire, shelf: list[Model]) -> None:
    *resident, newcomer = shelf[:4]
    load(three, *resident)
    held = three.result("stats")["memory"]["weightsBytes"]
    streams = [begin(three, model) for model in resident]
    loading = three.send("load", model=newcomer.folder)
    state_when(three, resident[0], "draining")
    three.notify("$/cancelRequest", id=loading)
    assert three.response(loading)["error"]["data"]["kind"] == "cancelled"
    for stream in streams:
        stream.assert_ends_whole()
    stats = three.stats_when(lambda stats: stats["memory"]["loadingBytes"] == 0)
    assert stats["memory"]["weightsBytes"] == held
    assert states(three) == {model.folder: "ready" for model in resident}
    assert three.error("generate", **newcomer.asking())["data"]["kind"] == "model_not_loaded"


def test_one_of_two_who_wait_for_a_load_may_give_up(socket_path: Path, shelf: list[Model]) -> None:
    model = shelf[0]
    with Listening(socket_path, *CHUNKS) as server, server.connect() as stays, server.connect() as leaves:
        sent = stays.send("load", model=model.folder)
        given_up = leaves.send("load", model=model.folder)
        leaves.notify("$/cancelRequest", id=given_up)
        leaves.response(given_up)
        assert stays.response(sent)["result"]["state"] == "ready"
        assert_answers(stays, model)


@pytest.mark.parametrize("method", ["load", "reload"])
def test_progress_is_monotone_and_complete(three: Wire, shelf: list[Model], method: str) -> None:
    model = shelf[0]
    if method == "reload":
        load(three, model)
    token = f"progress of {method}"
    result = three.result(method, model=model.folder, partialResultToken=token)
    parts = three.progress(token)
    assert [part["seq"] for part in parts] == sorted({part["seq"] for part in parts})
    phases = [part["phase"] for part in parts]
    changes = [phase for number, phase in enumerate(phases) if phases[number - 1 : number] != [phase]]
    rest = iter(PHASES)
    assert all(phase in rest for phase in changes), changes
    for name in ("doneBytes", "tensors"):
        assert [part[name] for part in parts] == sorted(part[name] for part in parts)
    last = parts[-1]
    assert last["doneBytes"] == last["totalBytes"] == result["bytes"] == model.bytes
    assert last["tensors"] == last["totalTensors"] > 0


def test_an_unload_behind_a_load_serves_who_came_between(three: Wire, shelf: list[Model]) -> None:
    model = shelf[0]
    loading = three.send("load", model=model.folder)
    between = three.send("generate", **model.asking())
    unloading = three.send("unload", model=model.folder)
    again = three.send("load", model=model.folder)
    after = three.send("generate", **model.asking(SHORT + 1))
    assert three.response(loading)["result"]["state"] == "ready"
    assert three.response(between)["result"]["tokens"] == model.answer[:SHORT]
    assert three.response(unloading)["result"]["state"] == "unloaded"
    assert three.response(again)["result"]["state"] == "ready"
    assert three.response(after)["result"]["tokens"] == model.answer[: SHORT + 1]


# Two versions


def test_an_alias_moves_and_moves_back_while_streams_run(three: Wire, shelf: list[Model]) -> None:
    blue, green, *_ = shelf
    load(three, blue, alias="live")
    load(three, green)
    streams = [begin(three, blue, model="live")]
    moved = three.result("alias", alias="live", model=green.folder)
    assert moved == {"alias": "live", "model": green.folder, "previous": blue.folder}
    assert info_of(three, green)["aliases"] == ["live"]
    streams.append(begin(three, green, model="live"))
    assert three.result("alias", alias="live", model=blue.folder)["previous"] == green.folder
    assert_answers(three, blue, model="live")
    for stream in streams:
        stream.assert_ends_whole()
    assert three.result("alias", alias="live", model=None)["previous"] == blue.folder
    assert three.error("generate", **blue.asking() | {"model": "live"})["data"]["kind"] == "model_not_loaded"
    assert three.error("alias", alias="x", model="nobody")["data"]["kind"] == "model_not_loaded"


def test_reload_brings_what_the_files_are_now_and_streams_end_as_they_began(
    three: Wire, shelf: list[Model], tmp_path: Path
) -> None:
    old = make_model(tmp_path / "model", 100, LARGE)
    load(three, old)
    running = begin(three, old)
    new = make_model(tmp_path / "other", 101, LARGE)
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model" / "model.safetensors")
    assert_answers(three, old)
    assert three.result("reload", model=old.folder)["state"] == "ready"
    assert_answers(three, new, model=old.folder)
    running.assert_ends_whole()
    three.stats_when(lambda stats: stats["memory"]["weightsBytes"] == old.bytes)
    assert info_of(three, old)["loads"] == 2
    load(three, *shelf[:2])
    assert set(states(three).values()) == {"ready"}


def test_a_reload_that_fails_keeps_the_old_one(three: Wire, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", 100, 0)
    weights = Path(model.folder) / "model.safetensors"
    load(three, model)
    running = begin(three, model)
    kept = weights.rename(tmp_path / "kept")
    weights.write_bytes(kept.read_bytes()[:-100])
    assert three.error("reload", model=model.folder)["data"]["kind"] == "invalid_model"
    assert info_of(three, model)["state"] == "ready"
    running.assert_ends_whole()
    assert_answers(three, model)
    stats = three.stats_when(lambda stats: stats["memory"]["loadingBytes"] == 0)
    assert stats["memory"]["weightsBytes"] == model.bytes


# Going away


def test_force_ends_streams_and_those_who_wait_and_nobody_else(three: Wire, shelf: list[Model]) -> None:
    gone, stays, *_ = shelf
    load(three, gone, stays)
    cut, whole = begin(three, gone), begin(three, stays)
    patient = three.send("unload", model=gone.folder)
    forced = three.send("unload", model=gone.folder, force=True)
    assert three.response(cut.request)["error"]["data"] == {
        "kind": "unloaded",
        "retryable": False,
        "model": gone.folder,
    }
    for unload in (patient, forced):
        assert three.response(unload)["result"] == {"model": gone.folder, "state": "unloaded"}
    assert 0 < len(cut.tokens) < LONG
    assert cut.tokens == gone.answer[: len(cut.tokens)]
    whole.assert_ends_whole()
    assert three.result("stats")["memory"]["weightsBytes"] == stays.bytes
    assert three.error("unload", model=gone.folder)["data"]["kind"] == "model_not_loaded"


def test_a_folder_may_be_removed_while_its_model_is_in_memory(
    three: Wire, shelf: list[Model], tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", 100, LARGE)
    load(three, model)
    running = begin(three, model)
    shutil.rmtree(model.folder)
    running.assert_ends_whole()
    assert three.error("reload", model=model.folder)["data"]["kind"] == "model_not_found"
    assert_answers(three, model)
    # Once out of memory it cannot come back, and says so to each who asks.
    load(three, *shelf[:3])
    assert states(three)[model.folder] == "evicted"
    for _ in range(2):
        assert three.error("generate", **model.asking())["data"]["kind"] == "model_not_found"
    for other in shelf[:3]:
        assert_answers(three, other)


# All of it at once


@dataclass
class Client:
    """One of several who load, use and unload as they like, each models of its own and the others' too."""

    guest: Guest
    own: list[Model]
    others: list[Model]
    dice: random.Random
    loaded: set[str] = field(default_factory=set[str])
    pending: list[tuple[str, Model, int, bool]] = field(default_factory=list[Any])
    answered: int = 0

    def act(self) -> None:
        """Do something, and hear answers while more than a few are owed."""
        model = self.dice.choice(self.own)
        if model.folder not in self.loaded:
            self.send("load", model, sure=True)
            self.loaded.add(model.folder)
        elif self.dice.random() < 0.2:
            self.loaded.discard(model.folder)
            self.send("unload", model, sure=True)
        else:
            self.send("generate", model, sure=True)
            self.send("generate", self.dice.choice(self.others), sure=False)
        while len(self.pending) > 6:
            self.hear()

    def send(self, method: str, model: Model, *, sure: bool) -> None:
        """Ask for something; not `sure` of success is who does not know whether the model is loaded."""
        params: dict[str, Any] = {"model": model.folder}
        if method == "generate":
            params = model.asking(self.dice.randint(1, SHORT))
        self.pending.append((method, model, self.guest.send(method, **params), sure))

    def hear(self) -> None:
        """Take the oldest answer that is owed, which must be right."""
        method, model, request, sure = self.pending.pop(0)
        response = self.guest.response(request)
        if not sure and "error" in response:
            assert response["error"]["data"]["kind"] == "model_not_loaded", response
            return
        assert "error" not in response, (method, response)
        if method == "generate":
            tokens = response["result"]["tokens"]
            assert tokens == model.answer[: len(tokens)]
            self.answered += 1

    def end(self) -> None:
        """Hear everything that is owed, and unload what is loaded."""
        for model in self.own:
            if model.folder in self.loaded:
                self.send("unload", model, sure=True)
        while self.pending:
            self.hear()


def test_whatever_two_clients_do_nothing_is_dropped_and_all_memory_comes_back(
    socket_path: Path, shelf: list[Model]
) -> None:
    with Listening(socket_path, *budget_of(3, shelf)) as server, server.connect() as watcher:
        watcher.stats_when(lambda stats: "budgetBytes" in stats["memory"])
        before = watcher.result("stats")["memory"]["mlxActiveBytes"]
        halves = (shelf[::2], shelf[1::2])
        clients = [
            Client(server.connect(), own, others, random.Random(seed))
            for seed, (own, others) in enumerate((halves, halves[::-1]))
        ]
        for _ in range(CYCLES):
            for client in clients:
                client.act()
            assert_within_budget(watcher.result("stats"))
        for client in clients:
            client.end()
        stats = watcher.stats_when(lambda stats: stats["memory"]["weightsBytes"] == 0)
        assert watcher.result("models")["models"] == []
        assert stats["memory"]["reservedBytes"] == stats["memory"]["loadingBytes"] == 0
        assert stats["memory"]["mlxActiveBytes"] - before <= ROUNDING_BYTES
        assert stats["residency"]["evicted"] > 0
        assert stats["residency"]["broughtBack"] > 0
        assert sum(client.answered for client in clients) > CYCLES
        for client in clients:
            client.guest.close()
