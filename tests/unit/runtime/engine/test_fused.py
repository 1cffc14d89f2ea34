"""Fused projections compute what they replace, in as much memory."""

from typing import Any

import pytest
from support.tiny_networks import ARCHITECTURES, fresh_network

from mlx_sidecar.runtime.engine.fused import fuse_projections


def nbytes(network: Any) -> int:
    from mlx.utils import tree_flatten  # pyright: ignore[reportUnknownVariableType]

    flat: Any = tree_flatten(network.parameters())
    return sum(array.nbytes for _, array in flat)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fused_network_gives_the_same_logits(architecture: str) -> None:
    import mlx.core as mx

    network: Any = fresh_network(architecture)
    tokens = mx.array([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
    plain, before = network(tokens), nbytes(network)
    mx.eval(plain)
    fuse_projections(network)
    assert mx.allclose(network(tokens), plain, atol=1e-5).item()
    assert nbytes(network) == before


def test_weights_are_given_up_as_they_are_joined() -> None:
    import mlx.core as mx
    from mlx import nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(512, 512), nn.Linear(512, 512)

    network = nn.Sequential(*[Layer() for _ in range(16)])
    mx.eval(network.parameters())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert fuse_projections(network) == 16
    assert mx.get_peak_memory() - before < nbytes(network) / 4


def test_quantized_projections_are_fused_too() -> None:
    import mlx.core as mx
    from mlx import nn

    network: Any = fresh_network("llama")
    nn.quantize(network, group_size=32, bits=4)
    tokens = mx.array([[1, 2, 3, 4, 5]])
    plain = network(tokens)
    mx.eval(plain)
    assert fuse_projections(network) == 4
    assert mx.allclose(network(tokens), plain, atol=1e-5).item()


def test_projections_of_different_kinds_are_left_alone() -> None:
    from mlx import nn

    network: Any = fresh_network("llama")
    attention = network.layers[0].self_attn
    attention.k_proj = nn.QuantizedLinear.from_linear(attention.k_proj, group_size=32, bits=4)
    assert fuse_projections(network) == 3
    assert isinstance(attention.q_proj, nn.Linear)
