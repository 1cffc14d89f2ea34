"""What a host sees when the model is at fault: an error that says so, and everything else goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy as safetensors
from support.tiny_model import END, make_tiny_model, make_tokenizer
from support.wire import Wire

NO_END = {str(make_tokenizer().token_to_id(END)): -1000}
POISON = 50
"""A letter, so that its text is final at once."""


@pytest.fixture
def untemplated(tmp_path: Path) -> str:
    """A model that has never heard of chats."""
    model = make_tiny_model(tmp_path / "untemplated")
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return str(model)


@pytest.fixture
def poisoned(tmp_path: Path) -> str:
    """A model to which the token POISON is not a number."""
    file = make_tiny_model(tmp_path / "poisoned") / "model.safetensors"
    weights = safetensors.load_file(file)
    weights["model.embed_tokens.weight"][POISON] = float("nan")
    safetensors.save_file(weights, file, metadata={"format": "mlx"})
    return str(file.parent)


def test_messages_for_a_model_without_a_chat_template_are_unsupported(untemplated: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with Wire() as wire:
        wire.initialize()
        wire.result("load", model=untemplated)
        for method in ("generate", "tokenize"):
            error = wire.error(method, model=untemplated, messages=messages)
            assert error["data"] == {"kind": "unsupported", "retryable": False}
            assert "no chat template" in error["message"]
        answer = wire.result("generate", model=untemplated, prompt="hello", maxTokens=3, logitBias=NO_END)
        assert answer["finishReason"] == "length"


def test_an_answer_that_becomes_no_number_fails_behind_its_parts_and_its_neighbour_goes_on(
    poisoned: str,
) -> None:
    asked: dict[str, Any] = {"model": poisoned, "tokens": [1], "maxTokens": 200, "logitBias": NO_END}
    with Wire() as wire:
        wire.initialize()
        wire.result("load", model=poisoned)
        whole = wire.result("generate", **asked)
        assert POISON not in whole["tokens"]
        neighbour = wire.send("generate", **asked, partialResultToken="neighbour")
        while not wire.progress("neighbour"):
            wire.result("ping")
        swallowing = asked | {"logitBias": NO_END | {str(POISON): 1000}, "partialResultToken": "swallowing"}
        error = wire.error("generate", **swallowing)
        assert error["data"] == {"kind": "generation_failed", "retryable": False}
        assert [part["tokens"] for part in wire.progress("swallowing")] == [[POISON]]
        error = wire.error("generate", **asked | {"tokens": [1, POISON]})
        assert error["data"] == {"kind": "generation_failed", "retryable": False}
        assert wire.response(neighbour)["result"]["finishReason"] == "length"
        parts = wire.progress("neighbour")
        assert [token for part in parts for token in part["tokens"]] == whole["tokens"]
