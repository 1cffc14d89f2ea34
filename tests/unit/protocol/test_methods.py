import pytest

from mlx_sidecar.protocol.methods import METHODS, PARAMS_DECODERS


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_refuses_unknown_parameters(method: str) -> None:
    assert METHODS[method].params.__struct_config__.forbid_unknown_fields


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_and_each_of_its_types_says_what_it_is(method: str) -> None:
    entry = METHODS[method]
    assert entry.name == method
    assert all(kind.__doc__ for kind in (entry.params, entry.result) if kind is not None)


def test_every_method_has_a_decoder() -> None:
    assert set(METHODS) <= set(PARAMS_DECODERS)
