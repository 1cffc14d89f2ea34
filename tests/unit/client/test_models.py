"""What is said about models and adapters, and how far a load or a pull is."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from support.scripted_server import Json, ScriptedServer, talking

from mlx_sidecar.client import Sidecar, SidecarRequestError
from mlx_sidecar.protocol import messages as m

pytestmark = pytest.mark.anyio

LOADED: Json = {
    "model": "m",
    "state": "ready",
    "dtype": "float32",
    "parameters": 10,
    "contextLength": 512,
    "vocabulary": 100,
    "bytes": 40,
    "loadMs": 5.0,
    "phases": {"runtimeMs": 1.0, "weightsMs": 2.0, "warmupMs": 2.0},
}
ADAPTED: Json = {
    "model": "m",
    "adapter": "poet",
    "rank": 8,
    "bytes": 64,
    "inUse": 0,
    "modules": 4,
    "loadMs": 2.0,
}
PULLED: Json = {"model": "m", "bytes": 40, "revision": "main"}

Watch = Callable[[Any], object]
Call = Callable[[Sidecar], Awaitable[Any]]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


def loading(seq: int) -> Json:
    far = {"doneBytes": 10 * seq, "totalBytes": 40, "tensors": seq, "totalTensors": 4}
    return {"seq": seq, "phase": "weights", **far}


def pulling(seq: int) -> Json:
    return {"seq": seq, "phase": "fetching", "doneBytes": 10 * seq, "totalBytes": 40, "remainingMs": 1.5}


def load(sidecar: Sidecar, watch: Watch | None) -> Awaitable[Any]:
    return sidecar.load("m", on_progress=watch, pin=True)


def reload(sidecar: Sidecar, watch: Watch | None) -> Awaitable[Any]:
    return sidecar.reload("m", on_progress=watch)


def pull(sidecar: Sidecar, watch: Watch | None) -> Awaitable[Any]:
    return sidecar.pull("m", revision="main", on_progress=watch)


watched = pytest.mark.parametrize(
    ("ask", "values", "result"),
    [
        (load, [loading(1), loading(2)], LOADED),
        (reload, [loading(1), loading(2)], LOADED),
        (pull, [pulling(1), pulling(2)], PULLED),
    ],
    ids=["load", "reload", "pull"],
)
Ask = Callable[[Sidecar, Watch | None], Awaitable[Any]]


@asynccontextmanager
async def asking(
    call: Call,
) -> AsyncGenerator[tuple[ScriptedServer, Json, list[Any], anyio.CancelScope]]:
    """A call that is under way: the server, its request, what has become of it, and how to give it up."""
    outcome: list[Any] = []
    scope = anyio.CancelScope()

    async def run(sidecar: Sidecar) -> None:
        with scope:
            outcome.append(await call(sidecar))

    async with talking() as (sidecar, server), anyio.create_task_group() as tasks:
        tasks.start_soon(run, sidecar)
        yield server, await server.next(), outcome, scope


@watched
async def test_how_far_it_is_comes_before_its_result_and_in_its_type(
    ask: Ask, values: list[Json], result: Json
) -> None:
    told: list[Any] = []
    async with asking(lambda sidecar: ask(sidecar, told.append)) as (server, request, outcome, _):
        for value in values:
            await server.progress(request, value)
        await server.send({"id": request["id"], "result": result})
    kind = m.PullProgress if ask is pull else m.LoadProgress
    assert told == [msgspec.convert(value, kind) for value in values]
    assert msgspec.to_builtins(outcome[0]) == result


@watched
async def test_who_does_not_want_to_know_asks_for_no_progress(
    ask: Ask, values: list[Json], result: Json
) -> None:
    async with asking(lambda sidecar: ask(sidecar, None)) as (server, request, outcome, _):
        assert "partialResultToken" not in request["params"]
        # A server that tells all the same harms nobody.
        await server.send({"method": "$/progress", "params": {"token": request["id"], "value": values[0]}})
        await server.send({"id": request["id"], "result": result})
    assert msgspec.to_builtins(outcome[0]) == result


@watched
async def test_whoever_gives_up_waiting_cancels_it_on_the_server(
    ask: Ask, values: list[Json], result: Json
) -> None:
    told = anyio.Event()
    async with asking(lambda sidecar: ask(sidecar, lambda _: told.set())) as (
        server,
        request,
        outcome,
        scope,
    ):
        await server.progress(request, values[0])
        await told.wait()
        scope.cancel()
        assert await server.next() == cancel_of(request)
        # It comes late, and to nobody.
        await server.send({"id": request["id"], "result": result})
    assert outcome == []


@watched
async def test_what_the_watcher_raises_comes_out_and_cancels_it_on_the_server(
    ask: Ask, values: list[Json], result: Json
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    async def refuse(sidecar: Sidecar) -> str:
        with pytest.raises(ZeroDivisionError):
            await ask(sidecar, fail)
        return "raised"

    async with asking(refuse) as (server, request, outcome, _):
        await server.progress(request, values[0])
        assert await server.next() == cancel_of(request)
        await server.send({"id": request["id"], "result": result})
    assert outcome == ["raised"]


async def test_what_is_no_progress_of_a_load_costs_itself_only() -> None:
    told: list[m.LoadProgress] = []
    async with asking(lambda sidecar: load(sidecar, told.append)) as (server, request, outcome, _):
        await server.progress(request, {"seq": 1, "text": "Once", "tokens": [1]})
        await server.progress(request, loading(2))
        await server.send({"id": request["id"], "result": LOADED})
    assert [part.seq for part in told] == [2]
    assert outcome[0].state == "ready"


async def test_a_load_that_is_refused_on_the_way_says_why_behind_what_came() -> None:
    told: list[m.LoadProgress] = []
    error = {"code": 1017, "message": "Gone.", "data": {"kind": "unloaded", "retryable": False, "model": "m"}}

    async def refused(sidecar: Sidecar) -> SidecarRequestError:
        with pytest.raises(SidecarRequestError) as caught:
            await load(sidecar, told.append)
        return caught.value

    async with asking(refused) as (server, request, outcome, _):
        await server.progress(request, loading(1))
        await server.send({"id": request["id"], "error": error})
    assert [part.seq for part in told] == [1]
    assert (outcome[0].kind, outcome[0].data["model"]) == ("unloaded", "m")


SAID: list[tuple[Call, str, Json, Json]] = [
    (
        lambda sidecar: sidecar.load("m", alias="a", revision="v1", ttlMs=None),
        "load",
        {"model": "m", "alias": "a", "revision": "v1", "ttlMs": None},
        LOADED,
    ),
    (lambda sidecar: sidecar.reload("m"), "reload", {"model": "m"}, LOADED),
    (
        lambda sidecar: sidecar.alias("a", "m"),
        "alias",
        {"alias": "a", "model": "m"},
        {"alias": "a", "model": "m", "previous": None},
    ),
    (
        lambda sidecar: sidecar.alias("a", None),
        "alias",
        {"alias": "a", "model": None},
        {"alias": "a", "model": None, "previous": "m"},
    ),
    (lambda sidecar: sidecar.pull("m"), "pull", {"model": "m"}, {"model": "m", "bytes": 40}),
    (
        lambda sidecar: sidecar.load_adapter("m", "poet", Path("/adapters/poet")),
        "loadAdapter",
        {"model": "m", "adapter": "poet", "path": "/adapters/poet"},
        {
            "model": "m",
            "adapter": "poet",
            "rank": 8,
            "bytes": 64,
            "inUse": 0,
            "modules": 4,
            "loadMs": 2.0,
        },
    ),
    (
        lambda sidecar: sidecar.unload_adapter("m", "poet", force=True),
        "unloadAdapter",
        {"model": "m", "adapter": "poet", "force": True},
        {"model": "m", "adapter": "poet"},
    ),
]


@pytest.mark.parametrize(("call", "method", "params", "result"), SAID)
async def test_a_method_says_what_it_was_asked_and_returns_what_it_was_told(
    call: Call, method: str, params: Json, result: Json
) -> None:
    async with asking(call) as (server, request, outcome, _):
        assert (request["method"], request["params"]) == (method, params)
        await server.send({"id": request["id"], "result": result})
    assert msgspec.to_builtins(outcome[0]) == result


async def test_an_answer_is_asked_of_an_adapter() -> None:
    async with talking() as (sidecar, server):
        generation = sidecar.generate("m", prompt="", adapter="poet")
        request = await server.expect("generate")
        assert request["params"]["adapter"] == "poet"
        await server.end(request, 0)
        assert (await generation.result()).finish_reason == "stop"


def cancel_of(request: Json) -> Json:
    return {"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": request["id"]}}
