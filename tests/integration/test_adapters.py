"""LoRA adapters over the wire: chosen by a request, several in one batch, gone when nobody uses them."""

import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as safetensors
from support.tiny_model import make_tiny_model
from support.wire import Wire

FINITE: dict[str, Any] = {"tokens": [1, 2, 3], "maxTokens": 12}
# Nothing ends it but its length.
FOREVER: dict[str, Any] = {"tokens": [1], "maxTokens": 200, "logitBias": {"270": -1000, "269": -1000}}


def make_adapter(folder: Path, model: Path, seed: int, rank: int = 4) -> str:
    """Write an adapter of every projection of a model, as mlx-lm does."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for name, weight in safetensors.load_file(model / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            outputs, inputs = weight.shape
            path = name.removesuffix(".weight")
            tensors[f"{path}.lora_a"] = rng.normal(0, inputs**-0.5, (inputs, rank)).astype(np.float32)
            tensors[f"{path}.lora_b"] = rng.normal(0, rank**-0.5, (rank, outputs)).astype(np.float32)
    folder.mkdir(parents=True)
    safetensors.save_file(tensors, folder / "adapters.safetensors")
    parameters: dict[str, Any] = {"rank": rank, "scale": 4.0, "dropout": 0.0, "keys": []}
    config: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


class Adapted:
    """A server with a tiny model and adapters "a", "b" and "c"."""

    def __init__(self, wire: Wire, folder: Path) -> None:
        self.wire = wire
        self.folder = make_tiny_model(folder / "model")
        self.model = str(self.folder)
        self.paths = {name: make_adapter(folder / name, self.folder, ord(name)) for name in "abc"}
        wire.result("load", model=self.model)

    def load(self, *names: str) -> None:
        for name in names:
            self.wire.result("loadAdapter", model=self.model, adapter=name, path=self.paths[name])

    def ask(self, adapter: str | None = None, **params: Any) -> dict[str, Any]:
        chosen = {} if adapter is None else {"adapter": adapter}
        return {"model": self.model, **FINITE, **chosen, **params}

    def tokens(self, adapter: str | None = None) -> list[int]:
        return self.wire.result("generate", **self.ask(adapter))["tokens"]

    def kind(self, method: str, **params: Any) -> str:
        return self.wire.error(method, model=self.model, **params)["data"]["kind"]


@pytest.fixture
def adapted(tmp_path: Path) -> Generator[Adapted]:
    with Wire() as wire:
        wire.initialize()
        yield Adapted(wire, tmp_path)


def test_each_request_gets_the_adapter_that_it_names_alone_and_together(adapted: Adapted) -> None:
    base = adapted.tokens()
    adapted.load("a", "b", "c")
    alone = {name: adapted.tokens(name) for name in "abc"}
    assert len({tuple(tokens) for tokens in [base, *alone.values()]}) == 4
    assert adapted.tokens() == base
    names = [None, "a", "b", "c", "b", "a", None]
    asked = [adapted.wire.send("generate", **adapted.ask(name, deduplicate=False)) for name in names]
    together = [adapted.wire.response(request)["result"]["tokens"] for request in asked]
    assert together == [base if name is None else alone[name] for name in names]


def test_an_adapter_is_listed_with_what_it_takes_and_gives_that_back(adapted: Adapted) -> None:
    before = adapted.wire.result("stats")["memory"]
    loaded = adapted.wire.result("loadAdapter", model=adapted.model, adapter="a", path=adapted.paths["a"])
    assert (loaded["rank"], loaded["modules"], loaded["inUse"]) == (4, 14, 0)
    (line,) = adapted.wire.result("models")["models"]
    assert line["adapters"] == [{"adapter": "a", "rank": 4, "bytes": loaded["bytes"], "inUse": 0}]
    memory = adapted.wire.result("stats")["memory"]
    assert memory["weightsBytes"] - before["weightsBytes"] == loaded["bytes"]
    assert memory["loadingBytes"] == 0
    adapted.wire.result("unloadAdapter", model=adapted.model, adapter="a")
    after = adapted.wire.result("stats")["memory"]
    assert after["weightsBytes"] == before["weightsBytes"]
    assert after["mlxActiveBytes"] <= before["mlxActiveBytes"] + 4096
    assert adapted.kind("generate", **FINITE, adapter="a") == "adapter_not_loaded"
    assert adapted.kind("unloadAdapter", adapter="a") == "adapter_not_loaded"


def test_an_unload_waits_for_the_adapters_requests_and_force_ends_only_those(adapted: Adapted) -> None:
    adapted.load("a", "b")
    wire = adapted.wire

    def stream(adapter: str | None, token: str) -> int:
        request = wire.send("generate", **adapted.ask(adapter, **FOREVER, partialResultToken=token))
        while not wire.progress(token):
            wire.result("ping")
        return request

    waited_for = stream("a", "1")
    unloading = wire.send("unloadAdapter", model=adapted.model, adapter="a")
    assert adapted.kind("generate", **FINITE, adapter="a") == "adapter_not_loaded"
    assert "result" in wire.response(waited_for)
    assert wire.response(unloading)["result"] == {"model": adapted.model, "adapter": "a"}

    forced, other = stream("b", "2"), stream(None, "3")
    wire.result("unloadAdapter", model=adapted.model, adapter="b", force=True)
    error = wire.response(forced)["error"]["data"]
    assert (error["kind"], error["adapter"]) == ("unloaded", "b")
    assert "result" in wire.response(other)


def test_a_model_that_comes_back_has_its_adapters_again(adapted: Adapted) -> None:
    adapted.load("a", "b")
    expected = adapted.tokens("a")
    shutil.rmtree(adapted.paths["b"])
    adapted.wire.result("reload", model=adapted.model)
    assert adapted.tokens("a") == expected
    # Its folder is gone, so nobody could bring it back.
    assert adapted.kind("generate", **FINITE, adapter="b") == "adapter_not_loaded"


def test_of_two_that_come_at_once_under_one_name_one_is_refused(adapted: Adapted) -> None:
    wire = adapted.wire
    both = [
        wire.send("loadAdapter", model=adapted.model, adapter="x", path=adapted.paths[name]) for name in "ab"
    ]
    first, second = (wire.response(request) for request in both)
    assert first["result"]["adapter"] == "x"
    assert second["error"]["data"]["kind"] == "invalid_adapter"
    # One that is cancelled at any moment is there whole or not at all.
    for _ in range(10):
        request = wire.send("loadAdapter", model=adapted.model, adapter="y", path=adapted.paths["c"])
        wire.notify("$/cancelRequest", id=request)
        wire.response(request)
        listed = {one["adapter"] for one in wire.result("models")["models"][0]["adapters"]}
        if "y" in listed:
            wire.result("unloadAdapter", model=adapted.model, adapter="y")
    adapted.load("c")
    assert adapted.tokens("c") != adapted.tokens()


def test_an_adapter_that_comes_while_its_model_makes_room_comes_behind(tmp_path: Path) -> None:
    with Wire("--prefill-chunk-tokens-cpu", "8") as wire:
        wire.initialize()
        adapted = Adapted(wire, tmp_path)
        size = wire.result("models")["models"][0]["bytes"]
        peak = wire.result("models")["models"][0]["prefillPeakBytes"]
    other = str(make_tiny_model(tmp_path / "other", seed=1))
    # Room for one model and what it needs to run, not for two.
    budget = ("--memory-budget-bytes", str(2 * size - 1000 if peak < size else size + peak + 100_000))
    with Wire("--prefill-chunk-tokens-cpu", "8", *budget) as wire:
        wire.initialize()
        wire.result("load", model=adapted.model)
        asked = [
            wire.send("load", model=other),
            wire.send("loadAdapter", model=adapted.model, adapter="a", path=adapted.paths["a"]),
            wire.send("loadAdapter", model=adapted.model, adapter="b", path="/no/such/folder"),
            wire.send("reload", model=adapted.model),
            wire.send("load", model=other),
        ]
        answers = [wire.response(request) for request in asked]
        assert "result" in answers[0]
        assert answers[2]["error"]["data"]["kind"] == "invalid_adapter"
        assert all("internal_error" not in json.dumps(answer) for answer in answers)
        for model in (adapted.model, other):
            wire.result("unload", model=model)
        assert wire.result("stats")["memory"]["weightsBytes"] == 0


def test_what_is_no_adapter_of_the_model_is_refused_and_leaves_nothing_behind(
    adapted: Adapted, tmp_path: Path
) -> None:
    base, before = adapted.tokens(), adapted.wire.result("stats")["memory"]["weightsBytes"]
    paths = {"empty": str(tmp_path / "empty"), "nowhere": "/no/such/folder", "relative": "adapters"}
    (tmp_path / "empty").mkdir()
    other_shape = Path(shutil.copytree(adapted.paths["a"], tmp_path / "other"))
    tensors = safetensors.load_file(other_shape / "adapters.safetensors")
    name = next(name for name in tensors if name.endswith("lora_a"))
    safetensors.save_file(tensors | {name: tensors[name][:-1]}, other_shape / "adapters.safetensors")
    cut = Path(shutil.copytree(adapted.paths["a"], tmp_path / "cut"))
    whole = (cut / "adapters.safetensors").read_bytes()
    (cut / "adapters.safetensors").write_bytes(whole[:-100])
    for path in (*paths.values(), str(other_shape), str(cut)):
        error = adapted.wire.error("loadAdapter", model=adapted.model, adapter="x", path=path)
        assert error["data"]["kind"] == "invalid_adapter"
        assert str(tmp_path) not in error["message"].replace(adapted.model, "")
    adapted.load("a")
    assert adapted.kind("loadAdapter", adapter="a", path=adapted.paths["a"]) == "invalid_adapter"
    assert adapted.kind("generate", **FINITE, adapter="x") == "adapter_not_loaded"
    adapted.wire.result("unloadAdapter", model=adapted.model, adapter="a")
    assert adapted.wire.result("stats")["memory"]["weightsBytes"] == before
    assert adapted.tokens() == base
