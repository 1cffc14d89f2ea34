"""Families of models, each in a folder as its makers would publish it: it comes, answers, and leaves."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.tiny_folders import clear_answer, float32_network, make_folder
from support.tiny_model import make_tokenizer
from support.tiny_networks import ARCHITECTURES, parameters
from support.wire import Wire

PROMPT, ANSWER = 21, 24
TOKENIZER = make_tokenizer()
ROUNDING_BYTES = 4096
"""MLX keeps a few numbers of its own, a random key for one."""


class Layout(NamedTuple):
    """How the weights of a folder are stored."""

    architecture: str
    dtype: str = "float32"
    bits: int | None = None
    shards: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether the weights are stored in the precision that they run in here."""
        return self.dtype == "float32" and self.bits is None


FAMILIES = {architecture: Layout(architecture) for architecture in ARCHITECTURES} | {
    "llama in 4 bits": Layout("llama", dtype="bfloat16", bits=4),
    "qwen3 in bfloat16": Layout("qwen3", dtype="bfloat16"),
    "mistral in float16": Layout("mistral", dtype="float16"),
    "gemma in three files": Layout("gemma", shards=3),
    "qwen3_moe in 4 bits and three files": Layout("qwen3_moe", bits=4, shards=3),
}


class Family(NamedTuple):
    """A folder, and what mlx-lm makes of it in float32: so many weights, and a greedy answer."""

    folder: str
    layout: Layout
    parameters: int
    prompt: list[int]
    answer: list[int]


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with Wire() as wire:
        wire.initialize()
        yield wire


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, wire: Wire, tmp_path: Path) -> Iterator[Family]:
    layout = FAMILIES[request.param]
    folder = make_folder(
        tmp_path / "model",
        layout.architecture,
        dtype=layout.dtype,
        bits=layout.bits,
        shards=layout.shards,
    )
    module = float32_network(folder)
    prompt, answer = clear_answer(module, PROMPT, ANSWER)
    count = sum(array.size for _, array in parameters(module))
    yield Family(str(folder), layout, count, prompt, answer)
    wire.call("unload", model=str(folder), force=True)


def test_a_family_is_loaded_answers_as_in_mlx_lm_and_leaves_nothing(wire: Wire, family: Family) -> None:
    before = wire.result("stats")["memory"]["mlxActiveBytes"]
    loaded = wire.result("load", model=family.folder, dtype="float32")

    info = next(info for info in wire.result("models")["models"] if info["model"] == family.folder)
    config = json.loads((Path(family.folder) / "config.json").read_text())
    config |= config.get("text_config", {})
    for facts in (loaded, info):
        assert (facts["model"], facts["state"], facts["dtype"]) == (family.folder, "ready", "float32")
        assert facts["parameters"] == family.parameters
        assert facts["contextLength"] == config["max_position_embeddings"]
        assert facts["bytes"] == 4 * family.parameters
        assert ("reason" in facts) == (not family.layout.is_plain)
    assert loaded["vocabulary"] == config["vocab_size"] == TOKENIZER.get_vocab_size()
    held = wire.result("stats")["memory"]
    assert held["weightsBytes"] == info["bytes"] <= held["mlxActiveBytes"] - before

    asked: dict[str, Any] = {"model": family.folder, "tokens": family.prompt, "maxTokens": ANSWER}
    whole = wire.result("generate", **asked)
    assert whole["tokens"] == family.answer
    # Bytes at the very end that are no character yet are not said.
    assert whole["text"].rstrip("\ufffd") == TOKENIZER.decode(family.answer).rstrip("\ufffd")
    streamed = wire.result("generate", **asked, partialResultToken=family.folder)
    parts = wire.progress(family.folder)
    assert [token for part in parts for token in part["tokens"]] == family.answer
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert streamed["usage"] == whole["usage"]

    # Others beside it, that come and go at other lengths, change nothing.
    company = [
        wire.send("generate", **asked | {"tokens": family.prompt[:length], "maxTokens": length})
        for length in (3, 11)
    ]
    assert wire.result("generate", **asked)["tokens"] == family.answer
    for request_id in company:
        assert wire.response(request_id)["result"]["finishReason"] in ("stop", "length")

    assert wire.result("unload", model=family.folder) == {"model": family.folder, "state": "unloaded"}
    assert family.folder not in {info["model"] for info in wire.result("models")["models"]}
    after = wire.result("stats")["memory"]
    assert after["weightsBytes"] == after["reservedBytes"] == after["loadingBytes"] == 0
    assert abs(after["mlxActiveBytes"] - before) <= ROUNDING_BYTES
