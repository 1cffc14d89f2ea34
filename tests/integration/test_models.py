"""Loading and unloading, on tiny models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as safetensors
from support.tiny_model import make_tiny_model
from support.wire import Wire, lines

FOREVER: dict[str, Any] = {"tokens": [1], "maxTokens": 250, "logitBias": {"3": 1000}}


@pytest.fixture
def wire() -> Wire:
    return Wire()


def test_unload_gives_the_memory_back(wire: Wire, tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path))
    with wire:
        wire.initialize()
        sizes: list[int] = []
        for _ in range(3):
            wire.result("load", model=model)
            wire.result("generate", model=model, tokens=[1, 2, 3], maxTokens=5)
            assert wire.result("unload", model=model) == {"model": model, "state": "unloaded"}
            sizes.append(wire.result("stats")["memory"]["mlxActiveBytes"])
        assert wire.result("models") == {"models": []}
        assert max(sizes) <= 4096, sizes


def test_a_request_sent_right_behind_load_waits_for_it(wire: Wire, tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path))
    with wire:
        wire.initialize()
        load = wire.send("load", model=model)
        generate = wire.send("generate", model=model, tokens=[1], maxTokens=2)
        assert wire.response(generate)["result"]["usage"]["promptTokens"] == 1
        assert wire.response(load)["result"]["state"] == "ready"


def test_loading_twice_is_loading_once(wire: Wire, tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path))
    with wire:
        wire.initialize()
        ids = [wire.send("load", model=model) for _ in range(3)]
        first, *others = [wire.response(request_id)["result"] for request_id in ids]
        assert others == [first, first]
        assert len(wire.result("models")["models"]) == 1
        error = wire.error("load", model=model, dtype="bfloat16")
        assert error["data"]["path"] == "dtype"


def test_unload_waits_for_requests_and_force_ends_them(wire: Wire, tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path))
    with wire:
        wire.initialize()
        wire.result("load", model=model)
        generate = wire.send("generate", model=model, **FOREVER)
        unload = wire.send("unload", model=model)
        assert wire.error("generate", model=model, prompt="x")["data"]["kind"] == "model_not_loaded"
        assert wire.response(generate)["result"]["finishReason"] == "length"
        assert wire.response(unload)["result"]["state"] == "unloaded"

        wire.result("load", model=model)
        generate = wire.send("generate", model=model, **FOREVER, partialResultToken="t")
        while not wire.progress("t"):
            wire.result("ping")
        wire.result("unload", model=model, force=True)
        assert wire.response(generate)["error"]["data"]["kind"] == "unloaded"


def test_force_also_ends_what_is_still_being_tokenized(wire: Wire, roomy_model: Path) -> None:
    model = str(roomy_model)
    params = {"model": model, "prompt": "a b c d " * 20_000} | {"maxTokens": 10**9, "logitBias": {"3": 1000}}
    with wire:
        wire.initialize()
        wire.result("load", model=model)
        wire.write(
            lines(
                {"id": "g", "method": "generate", "params": params},
                {"id": "u", "method": "unload", "params": {"model": model, "force": True}},
            )
        )
        assert wire.response("g")["error"]["data"]["kind"] == "unloaded"
        assert wire.response("u")["result"]["state"] == "unloaded"


def test_two_models_answer_side_by_side(wire: Wire, tmp_path: Path) -> None:
    models = [str(make_tiny_model(tmp_path / str(seed), seed=seed)) for seed in (1, 2)]
    params: dict[str, Any] = {"tokens": [1, 2, 3], "maxTokens": 20}
    with wire:
        wire.initialize()
        for model in models:
            wire.result("load", model=model)
        alone = [wire.result("generate", model=model, **params)["tokens"] for model in models]
        ids = [wire.send("generate", model=model, **params) for model in models]
        assert [wire.response(request_id)["result"]["tokens"] for request_id in ids] == alone
        assert alone[0] != alone[1]


def test_sixteen_bit_weights_become_float32_on_a_cpu_and_stay_when_asked(wire: Wire, tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path, dtype="float16"))
    with wire:
        wire.initialize()
        loaded = wire.result("load", model=model)
        on_cpu = wire.result("stats")["engine"]["device"] == "cpu"
        assert loaded["dtype"] == ("float32" if on_cpu else "float16")
        assert ("float16" in loaded.get("reason", "")) == on_cpu
        wire.result("unload", model=model)
        assert wire.result("load", model=model, dtype="stored")["dtype"] == "float16"
        wire.result("unload", model=model)
        loaded = wire.result("load", model=model, dtype="bfloat16")
        assert loaded["dtype"] == "bfloat16"
        assert "asked for" in loaded["reason"]


def test_sharded_weights_are_loaded_whole(wire: Wire, tmp_path: Path) -> None:
    whole, parts = make_tiny_model(tmp_path / "whole"), make_tiny_model(tmp_path / "parts")
    weights = safetensors.load_file(parts / "model.safetensors")
    names = sorted(weights)
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        shard = {name: np.ascontiguousarray(weights[name]) for name in chosen}
        safetensors.save_file(shard, parts / f"model-{number:05}-of-00002.safetensors")
    (parts / "model.safetensors").unlink()
    with wire:
        wire.initialize()
        answers = []
        for folder in (whole, parts):
            wire.result("load", model=str(folder))
            answers.append(wire.result("generate", model=str(folder), tokens=[1, 2], maxTokens=8)["tokens"])
        assert answers[0] == answers[1]


def test_a_missing_tensor_is_an_invalid_model(wire: Wire, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    weights = safetensors.load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    safetensors.save_file(weights, folder / "model.safetensors")
    with wire:
        wire.initialize()
        assert wire.error("load", model=str(folder))["data"]["kind"] == "invalid_model"


def test_cancelling_a_load_is_answered_and_the_model_can_be_loaded_again(wire: Wire, tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path))
    with wire:
        wire.initialize()
        load = wire.send("load", model=model)
        wire.notify("$/cancelRequest", id=load)
        response = wire.response(load)
        assert response.get("error", {}).get("data", {}).get("kind") == "cancelled"
        assert wire.result("load", model=model)["state"] == "ready"
        assert wire.result("generate", model=model, tokens=[1], maxTokens=1)["finishReason"] in (
            "length",
            "stop",
        )


def test_without_tokenizer_json_transformers_builds_the_tokenizer(wire: Wire, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "unk_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|end|>"}))
    (folder / "tokenizer.json").unlink()
    with wire:
        wire.initialize()
        wire.result("load", model=str(folder))
        tokens = wire.result("tokenize", model=str(folder), text="hello world")["tokens"]
        assert wire.result("detokenize", model=str(folder), tokens=tokens)["text"] == "hello world"
        assert len(tokens) == 2
