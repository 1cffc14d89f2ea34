"""What a model may do is tried before anybody depends on it."""

from typing import Any

import pytest
from support.tiny_networks import ARCHITECTURES, MIXES_ROWS_UP, UNBATCHABLE, tiny_network

from mlx_sidecar.runtime.engine.self_check import fastest_step, why_alone


def no_mask(*_: Any, **__: Any) -> None:
    """Whatever is asked, let everything be seen."""


class Careless:
    """A network that sees every row's tokens in the place where the first row has them."""

    def __init__(self) -> None:
        self._network: Any = tiny_network("llama")
        self.layers: Any = self._network.layers

    def make_cache(self) -> Any:
        return self._network.make_cache()

    def __call__(self, inputs: Any, cache: Any) -> Any:
        if inputs.shape[0] > 1:
            for layer in cache:
                layer.layout.mask = no_mask
        return self._network(inputs, cache=cache)


@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if name not in UNBATCHABLE + MIXES_ROWS_UP]
)
def test_a_network_that_gives_the_same_in_company_may_share_a_batch(architecture: str) -> None:
    assert why_alone(tiny_network(architecture)) is None


def test_a_cache_for_one_sequence_runs_alone_and_says_why() -> None:
    assert why_alone(tiny_network("llama4")) == "its ChunkedKVCache holds one sequence only"


def test_code_that_raises_on_padded_rows_runs_alone() -> None:
    assert why_alone(tiny_network("gemma2")) == "its code does not take rows of different length"


def test_code_that_mixes_rows_up_without_a_word_is_found_out() -> None:
    assert why_alone(Careless()) == "its answers change when rows of different length share a batch"


def test_steps_are_not_compiled_without_the_kernel_they_need() -> None:
    step, reason = fastest_step(tiny_network("llama"))
    assert type(step).__name__ == "PlainStep"
    assert reason == "compiled steps write their caches in a CUDA kernel"
