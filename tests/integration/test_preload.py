"""Models that the settings want in memory from the start."""

import json
from pathlib import Path

from support.tiny_model import make_tiny_model
from support.wire import Wire


def test_preloaded_models_are_there_for_whoever_comes_early_and_a_broken_one_keeps_nobody_out(
    tmp_path: Path,
) -> None:
    first, second = (str(make_tiny_model(tmp_path / str(seed), seed=seed)) for seed in (1, 2))
    file = tmp_path / "runtime.yaml"
    wanted = [
        {"model": str(tmp_path / "nowhere")},
        {"model": first, "alias": "chat", "pin": True},
        {"model": second, "ttl_ms": 60_000},
    ]
    file.write_text("models_preload:\n" + "".join(f"  - {json.dumps(one)}\n" for one in wanted))
    with Wire("--config", file) as wire:
        wire.initialize()
        # Nobody has asked for a load.
        answer = wire.result("generate", model="chat", tokens=[1, 2], maxTokens=2)
        assert answer["usage"]["completionTokens"] == 2
        assert wire.result("load", model=second)["state"] == "ready"
        lines = {line["model"]: line for line in wire.result("models")["models"]}
        assert lines[str(tmp_path / "nowhere")]["failure"]["kind"] == "model_not_found"
        assert (lines[first]["pinned"], lines[first]["aliases"]) == (True, ["chat"])
        assert (lines[second]["pinned"], lines[second]["ttlMs"]) == (False, 60_000)
        wire.result("shutdown")
        wire.notify("exit")
        assert wire.wait() == 0
    assert b"the preload of" in wire.stderr
