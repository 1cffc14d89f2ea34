"""Model folders that mean harm are refused by the real server, which goes on as if nothing had been."""

import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
from support.hostile_models import CANARY, HOSTILE, Hostile
from support.tiny_model import make_tiny_model
from support.wire import Wire

MORE_BYTES = 256 * 1024 * 1024
LEAST_FOLDERS = 60


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Generator[Wire]:
    """A server that has a good model loaded."""
    with Wire() as wire:
        wire.initialize()
        wire.result("load", model=str(tiny_model))
        yield wire


@pytest.fixture(scope="module")
def resident_before(server: Wire) -> int:
    return server.result("stats")["memory"]["peakResidentBytes"]


def test_there_are_enough_kinds_of_them() -> None:
    assert len({hostile.name for hostile in HOSTILE}) == len(HOSTILE) >= LEAST_FOLDERS


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name.replace(" ", "-"))
@pytest.mark.timeout(5, func_only=True)
def test_a_hostile_folder_is_refused_and_leaves_nothing(
    server: Wire, resident_before: int, model: str, tmp_path: Path, hostile: Hostile
) -> None:
    folder = hostile.make(tmp_path / "hostile")
    answer = server.error("load", model=str(folder))
    assert answer["data"]["kind"] == hostile.kind, answer
    # The name of the model is the client's own; beyond it there is nothing of the server's in the text.
    assert str(tmp_path) not in answer["message"].replace(str(folder), "")
    assert not (tmp_path / CANARY).exists()
    stats = server.result("stats")
    assert stats["memory"]["peakResidentBytes"] - resident_before < MORE_BYTES
    ready = [line["model"] for line in stats["models"] if line["state"] == "ready"]
    assert model in ready
    assert str(folder) not in ready
    assert len(server.result("generate", model=model, tokens=[1, 2], maxTokens=3)["tokens"]) > 0


TEMPLATES = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "size": "{{ 'a' * 2500000000 }}",
    "depth": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_that_means_harm_costs_its_own_request_only(
    server: Wire, model: str, tmp_path: Path, kind: str
) -> None:
    folder = make_tiny_model(tmp_path / "harmful")
    (folder / "chat_template.jinja").write_text(TEMPLATES[kind])
    server.result("load", model=str(folder))
    before = server.result("stats")["memory"]["peakResidentBytes"]
    messages = [{"role": "user", "content": "hi"}]
    asked = server.send("generate", model=str(folder), messages=messages)
    assert len(server.result("generate", model=model, tokens=[1, 2], maxTokens=3)["tokens"]) > 0
    assert server.response(asked)["error"]["data"]["kind"] == "unsupported"
    assert server.result("stats")["memory"]["peakResidentBytes"] - before < MORE_BYTES
    server.result("unload", model=str(folder))


def test_a_folder_that_is_removed_once_its_model_is_loaded_is_not_missed(
    server: Wire, tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "fleeting")
    server.result("load", model=str(folder))
    shutil.rmtree(folder)
    answer = server.result("generate", model=str(folder), tokens=[1, 2], maxTokens=20, logitBias={"3": 1000})
    assert answer["tokens"] == [3] * 20
    server.result("unload", model=str(folder))
    assert server.error("load", model=str(folder))["data"]["kind"] == "model_not_found"
