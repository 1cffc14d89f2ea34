"""What a model may do is tried before anybody depends on it."""

from typing import Any

import pytest
from support.tiny_networks import ARCHITECTURES, MIXES_ROWS_UP, UNBATCHABLE, tiny_network

from mlx_sidecar.runtime.engine.self_check import SharingCheck, fastest_step


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
    assert SharingCheck(tiny_network(architecture)).why_alone() is None


def test_a_cache_for_one_sequence_runs_alone_and_says_why() -> None:
    assert SharingCheck(tiny_network("llama4")).why_alone() == "its ChunkedKVCache holds one sequence only"


def test_code_that_raises_on_padded_rows_runs_alone() -> None:
    assert (
        SharingCheck(tiny_network("gemma2")).why_alone() == "its code does not take rows of different length"
    )


def test_code_that_mixes_rows_up_without_a_word_is_found_out() -> None:
    assert (
        SharingCheck(Careless()).why_alone()
        == "its answers change when rows of different length share a batch"
    )


def test_steps_are_not_compiled_without_the_kernel_they_need() -> None:
    step, reason = fastest_step(tiny_network("llama"))
    assert type(step).__name__ == "PlainStep"
    assert reason == "compiled steps write their caches in a CUDA kernel"


def test_a_check_goes_on_where_it_was_and_ends() -> None:
    check = SharingCheck(Careless())
    advances = 1
    while check.advance():
        advances += 1
    assert advances > 5
    assert not check.advance()
    assert check.why_alone() == SharingCheck(Careless()).why_alone()
