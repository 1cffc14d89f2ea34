"""What every foreign client is asked, and what our own plain driver got for the same."""

import json
from collections.abc import Generator
from pathlib import Path

import pytest
from support.recording import recorded
from support.tiny_model import END, make_tiny_model, make_tokenizer
from support.wire import Json, Wire

SEPARATORS = "line\u2028paragraph\u2029next\u0085end"


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """A model, requests, and the answers that they must have; the Node tests get the same as JSON."""
    model = make_tiny_model(tmp_path_factory.mktemp("clients") / "tiny")
    _give_room(model)
    tokenizer = make_tokenizer()
    asked = {
        "model": str(model),
        "prompt": "hello world",
        "logitBias": {str(tokenizer.token_to_id(END)): -1000},
    }
    finite = asked | {"maxTokens": 48}
    separators = asked | {"maxTokens": 9} | _only_line_separators(tokenizer.encode("\u2028").ids)
    with Wire() as wire:
        wire.initialize()
        wire.result("load", model=str(model))
        answer = wire.result("generate", **finite)
    return {
        "model": str(model),
        "finite": finite,
        "answer": {"text": answer["text"], "tokens": answer["tokens"]},
        "endless": asked | {"maxTokens": 2**31 - 1},
        "separators": separators,
        "detokenize": {"model": str(model), "tokens": tokenizer.encode(SEPARATORS).ids},
        "detokenized": SEPARATORS,
    }


@pytest.fixture
def command(tmp_path: Path) -> Generator[str]:
    """The sidecar, as a program. When the test is over all that it said is held up to the schema."""
    with recorded(tmp_path / "recorded") as program:
        yield program


def _give_room(model: Path) -> None:
    """Make the context so long that only a cancel ends an answer."""
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 1 << 20}))


def _only_line_separators(ids: list[int]) -> Json:
    """Return parameters under which the three bytes of a character follow one another for ever.

    The bias sets the order and the penalty moves each byte behind the next; the model's own logits, a few
    units, never matter.
    """
    first, second, third = ids
    return {
        "logitBias": {str(first): 300, str(second): 250, str(third): 220},
        "frequencyPenalty": 100,
    }
