"""Every kind of bad input gets one typed error, and the next request works."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import CONTEXT_LENGTH, make_tiny_model
from support.wire import Wire


def still_works(wire: Wire, model: str) -> None:
    answer = wire.result("generate", model=model, tokens=[1, 2], maxTokens=2)
    assert answer["usage"]["promptTokens"] == 2


def kind_of(error: Any) -> str:
    assert isinstance(error["code"], int)
    assert error["message"].endswith(".")
    assert isinstance(error["data"]["retryable"], bool)
    return error["data"]["kind"]


def test_an_unknown_method(tiny_server: Wire, model: str) -> None:
    error = tiny_server.error("no/such/method")
    assert (error["code"], kind_of(error)) == (-32601, "method_not_found")
    still_works(tiny_server, model)


@pytest.mark.parametrize(
    ("params", "path"),
    [
        ({"prompt": "x", "temprature": 1}, "temprature"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "topP": 2}, "topP"),
        ({"prompt": "x", "stop": [""]}, "stop[0]"),
        ({"prompt": "x", "topK": 100_000}, "topK"),
        ({"prompt": "x", "logitBias": {"100000": 1}}, "logitBias.100000"),
        ({"prompt": "x", "logitBias": {"-1": 1}}, "logitBias.-1"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({}, "messages"),
        ({"prompt": ""}, "prompt"),
        ({"tokens": []}, "tokens"),
        ({"tokens": [1, 100_000]}, "tokens[1]"),
        ({"tokens": [2**40]}, "tokens[0]"),
    ],
)
def test_a_wrong_parameter_is_named(tiny_server: Wire, model: str, params: Any, path: str) -> None:
    error = tiny_server.error("generate", model=model, **params)
    assert (error["code"], kind_of(error), error["data"]["path"]) == (-32602, "invalid_params", path)
    still_works(tiny_server, model)


def test_out_of_range_ids_to_detokenize(tiny_server: Wire, model: str) -> None:
    error = tiny_server.error("detokenize", model=model, tokens=[1, 2, 99_999])
    assert (kind_of(error), error["data"]["path"]) == ("invalid_params", "tokens[2]")
    still_works(tiny_server, model)


def test_a_model_that_is_nowhere(tiny_server: Wire, model: str) -> None:
    for name in ("no-such-model", "owner/no-such-model", "/no/such/folder", "../relative", "a\x00b"):
        assert kind_of(tiny_server.error("load", model=name)) == "model_not_found"
    still_works(tiny_server, model)


@pytest.mark.parametrize("method", ["generate", "tokenize", "detokenize", "unload"])
def test_a_model_that_is_not_loaded(tiny_server: Wire, model: str, method: str) -> None:
    params: dict[str, Any] = {
        "generate": {"prompt": "x"},
        "tokenize": {"text": "x"},
        "detokenize": {"tokens": []},
    }
    error = tiny_server.error(method, model="not-loaded", **params.get(method, {}))
    assert kind_of(error) == "model_not_loaded"
    still_works(tiny_server, model)


def test_folders_that_are_no_models_are_refused_and_leave_nothing_behind(
    tiny_server: Wire, model: str, tmp_path: Path
) -> None:
    def broken(name: str, file: str, content: bytes | None) -> str:
        folder = make_tiny_model(tmp_path / name)
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_bytes(content)
        return str(folder)

    whole = (Path(model) / "model.safetensors").read_bytes()
    config = json.loads((Path(model) / "config.json").read_text())
    (tmp_path / "empty").mkdir()
    folders = [
        str(tmp_path / "empty"),
        broken("no-config", "config.json", None),
        broken("bad-config", "config.json", b"{"),
        broken("no-weights", "model.safetensors", None),
        broken("cut-weights", "model.safetensors", whole[:-1000]),
        broken("garbage", "model.safetensors", b"garbage"),
        broken("other-shape", "config.json", json.dumps(config | {"hidden_size": 64}).encode()),
        broken("unknown-kind", "config.json", json.dumps(config | {"model_type": "nonsense"}).encode()),
        broken("own-code", "config.json", json.dumps(config | {"model_file": "evil.py"}).encode()),
        broken("no-context", "config.json", json.dumps(config | {"max_position_embeddings": "x"}).encode()),
        broken("bad-tokenizer", "tokenizer.json", b"{}"),
    ]
    before = tiny_server.result("stats")["memory"]["mlxActiveBytes"]
    for folder in folders:
        error = tiny_server.error("load", model=folder)
        assert kind_of(error) == ("unsafe_model" if "own-code" in folder else "invalid_model"), folder
        assert str(tmp_path) not in error["message"].replace(folder, "")
    stats = tiny_server.result("stats")
    assert [entry["model"] for entry in stats["models"] if entry["state"] != "failed"] == [model]
    failures = {entry["model"]: entry["failure"]["kind"] for entry in stats["models"] if "failure" in entry}
    assert failures.keys() >= set(folders)
    assert stats["memory"]["mlxActiveBytes"] <= before + 4096
    still_works(tiny_server, model)


def test_a_prompt_longer_than_the_context(tiny_server: Wire, model: str) -> None:
    error = tiny_server.error("generate", model=model, tokens=[1] * CONTEXT_LENGTH)
    assert kind_of(error) == "context_overflow"
    assert (error["data"]["promptTokens"], error["data"]["contextLength"]) == (CONTEXT_LENGTH,) * 2
    still_works(tiny_server, model)


def test_two_requests_with_one_id(tiny_server: Wire, model: str) -> None:
    params = {"model": model, "tokens": [1], "maxTokens": 100, "logitBias": {"3": 1000}}
    line = json.dumps({"jsonrpc": "2.0", "id": "twice", "method": "generate", "params": params}).encode()
    tiny_server.write(line + b"\n" + line + b"\n")
    refused = tiny_server.response("twice")
    assert kind_of(refused["error"]) == "duplicate_id"
    assert tiny_server.response("twice")["result"]["usage"]["completionTokens"] == 100
    still_works(tiny_server, model)


@pytest.mark.parametrize("line", [b"hello", b"{", b"\xff\xfe", b'{"jsonrpc":"2.0","id":1,"method":"ping"'])
def test_a_line_that_is_not_json(tiny_server: Wire, model: str, line: bytes) -> None:
    tiny_server.write(line + b"\n")
    assert kind_of(tiny_server.response(None)["error"]) == "parse_error"
    still_works(tiny_server, model)


@pytest.mark.parametrize("line", [b"[]", b"1", b"{}", b'{"jsonrpc":"2.0","id":null,"method":"ping"}'])
def test_json_that_is_not_a_request(tiny_server: Wire, model: str, line: bytes) -> None:
    tiny_server.write(line + b"\n")
    assert kind_of(tiny_server.response(None)["error"]) == "invalid_request"
    still_works(tiny_server, model)


def test_a_request_before_initialize() -> None:
    with Wire() as wire:
        assert kind_of(wire.error("models")) == "not_initialized"
        assert wire.result("ping")["state"] == "starting"
        error = wire.error("initialize", protocolVersion=99)
        assert error["data"]["path"] == "protocolVersion"
        wire.initialize()
        assert kind_of(wire.error("initialize", protocolVersion=1)) == "invalid_request"
        assert wire.result("models") == {"models": []}
