"""Loading on a thread of its own: what is handed over may be used anywhere, and nothing else is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import make_tiny_model
from support.tiny_networks import tiny_network

from mlx_sidecar.runtime.models.loader_thread import LoaderThread


def nobody(_: object) -> None:
    """Listen to nothing."""


@pytest.fixture(scope="module", autouse=True)
def _started() -> None:
    """Import MLX as the engine does."""
    tiny_network("llama")


def greedy(module: Any, tokens: int = 8) -> list[int]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache, inputs, chosen = make_prompt_cache(module), mx.array([[1, 2, 3]]), list[int]()
    for _ in range(tokens):
        inputs = module(inputs, cache=cache)[:, -1].argmax(axis=-1, keepdims=True)
        chosen.append(int(inputs.item()))
    return chosen


# Tables of rotary embeddings with a scale are arrays that are no parameters.
SCALED: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("more", [{}, {"rope_scaling": SCALED}], ids=["plain", "with-tables"])
def test_a_network_from_the_loader_thread_gives_the_same_tokens_here(tmp_path: Path, more: Any) -> None:
    from mlx_sidecar.runtime.models.loader import load_network

    folder = make_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | more
    (folder / "config.json").write_text(json.dumps(config))
    here = load_network(folder, "auto", "cpu", nobody)
    thread = LoaderThread()
    there = thread.run(lambda: load_network(folder, "auto", "cpu", nobody)).result(60)
    assert thread.stop(60)
    # The thread has ended, and with it every graph that it did not evaluate.
    assert greedy(there.module) == greedy(here.module)


def test_a_load_tells_how_far_it_is_and_ends_where_it_is_told_to(tmp_path: Path) -> None:
    from mlx_sidecar.runtime.models import loader

    folder = make_tiny_model(tmp_path)
    told: list[Any] = []
    network = loader.load_network(folder, "auto", "cpu", told.append)
    assert told[0].done_bytes == 0
    assert told[-1].done_bytes == told[-1].total_bytes == network.nbytes
    assert told[-1].tensors == told[-1].total_tensors

    class GivenUpError(Exception):
        pass

    def give_up(_: object) -> None:
        raise GivenUpError

    with pytest.raises(GivenUpError):
        loader.load_network(folder, "auto", "cpu", give_up)


def test_the_loader_thread_does_one_thing_after_the_other_and_survives_what_fails() -> None:
    thread, order = LoaderThread(), list[int]()

    def fail() -> None:
        raise ValueError("as it should")

    first = thread.run(lambda: order.append(1))
    failing = thread.run(fail)
    last = thread.run(lambda: order.append(2))
    last.result(60)
    assert first.done()
    assert isinstance(failing.exception(), ValueError)
    assert order == [1, 2]
    assert thread.stop(60)
