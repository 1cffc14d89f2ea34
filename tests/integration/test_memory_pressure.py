"""A machine that has too little memory left, and then enough again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.wire import Wire

pytestmark = pytest.mark.timeout(60)


def test_a_short_machine_takes_caches_models_and_requests_and_gives_all_of_it_back(
    model: str, tmp_path: Path
) -> None:
    file = tmp_path / "runtime.yaml"
    file.write_text("min_available_bytes: 0\n")
    with Wire("--config", file) as wire:
        wire.initialize()
        wire.result("load", model=model)
        tokens = wire.result("generate", model=model, tokens=[1, 2], maxTokens=4)["tokens"]

        def until(condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
            while not condition(stats := wire.result("stats")):
                pass
            return stats

        # More than any machine has.
        file.write_text(f"min_available_bytes: {2**50}\n")
        stats = until(lambda stats: stats["memory"]["pressure"]["level"] == "requests")
        pressure = stats["memory"]["pressure"]
        assert "bytes available" in pressure["reason"]
        assert pressure["caches"] >= pressure["models"] == 1
        assert stats["models"][0]["state"] == "evicted"
        refused = wire.error("generate", model=model, tokens=[1, 2], maxTokens=4)
        assert refused["data"]["kind"] == "overloaded"
        assert refused["data"]["retryAfterMs"] > 0

        file.write_text("min_available_bytes: 0\n")
        stats = until(lambda stats: stats["memory"]["pressure"]["level"] == "none")
        assert stats["memory"]["pressure"]["restored"] == 1
        assert "reason" not in stats["memory"]["pressure"]
        assert wire.result("generate", model=model, tokens=[1, 2], maxTokens=4)["tokens"] == tokens
        assert wire.result("stats")["residency"]["broughtBack"] == 1
