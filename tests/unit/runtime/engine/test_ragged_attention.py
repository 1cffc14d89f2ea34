"""What needs no GPU of the attention kernel; with one, the kernel itself against MLX's masked attention."""

from typing import NamedTuple

import mlx.core as mx
import pytest

from mlx_sidecar.runtime.engine.ragged_attention import append_and_attend, why_not_ragged

ROWS, HEADS, KV_HEADS, LENGTH, SIZE = 3, 4, 2, 40, 64
SCALE = SIZE**-0.5

needs_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="the kernel is for CUDA")


class Inputs(NamedTuple):
    q: mx.array
    new_keys: mx.array
    new_values: mx.array
    keys: mx.array
    values: mx.array
    start: mx.array
    end: mx.array


def inputs() -> Inputs:
    new, buffer = (ROWS, KV_HEADS, 1, SIZE), (ROWS, KV_HEADS, LENGTH, SIZE)
    shapes = [(ROWS, HEADS, 1, SIZE), new, new, buffer, buffer]
    keys = mx.random.split(mx.random.key(1), len(shapes))
    q, new_keys, new_values, buffer, other = (
        mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True)
    )
    start, end = mx.array([0, 7, 30], mx.int32), mx.array([LENGTH, 8, 33], mx.int32)
    return Inputs(q, new_keys, new_values, buffer, other, start, end)


def masked(given: Inputs) -> mx.array:
    at = mx.arange(LENGTH)
    mask = (at >= given.start[:, None]) & (at < given.end[:, None])
    return mx.fast.scaled_dot_product_attention(
        given.q, given.keys, given.values, scale=SCALE, mask=mask[:, None, None]
    )


def close(first: mx.array, second: mx.array) -> bool:
    return bool(mx.allclose(first, second, atol=2e-5).item())


@pytest.mark.skipif(mx.cuda.is_available(), reason="here it is available")
def test_a_machine_without_cuda_is_told_why_it_has_no_kernel() -> None:
    assert why_not_ragged(64, mx.float32) == "it is a CUDA kernel"


@needs_cuda
@pytest.mark.parametrize(
    ("size", "dtype"), [(60, mx.float32), (8, mx.float32), (264, mx.float32), (64, mx.int8)]
)
def test_heads_that_the_kernel_cannot_hold_are_named(size: int, dtype: mx.Dtype) -> None:
    reason = why_not_ragged(size, dtype)
    assert reason is not None
    assert str(size) in reason or str(dtype) in reason


@pytest.mark.parametrize(
    "wrong",
    [
        {"q": mx.zeros((ROWS, HEADS, 2, SIZE))},
        {"q": mx.zeros((ROWS, HEADS + 1, 1, SIZE))},
        {"q": mx.zeros((ROWS, HEADS, 1, SIZE), mx.float16)},
        {"keys": mx.zeros((ROWS, KV_HEADS, LENGTH - 1, SIZE))},
        {
            "keys": mx.zeros((ROWS + 1, KV_HEADS, LENGTH, SIZE)),
            "values": mx.zeros((ROWS + 1, KV_HEADS, LENGTH, SIZE)),
        },
        {"start": mx.zeros((ROWS - 1,), mx.int32)},
        {"end": mx.zeros((ROWS,), mx.int64)},
        {"new_values": mx.zeros((ROWS, KV_HEADS, 1, SIZE - 8))},
    ],
)
def test_what_does_not_fit_together_is_refused_before_the_device_sees_it(wrong: dict[str, mx.array]) -> None:
    with pytest.raises(ValueError, match="fit together"):
        append_and_attend(*inputs()._replace(**wrong), SCALE)


@needs_cuda
def test_a_row_without_keys_gives_zeros() -> None:
    given = inputs()._replace(end=mx.array([LENGTH, 7, 33], mx.int32))
    assert not append_and_attend(*given, SCALE)[1].any().item()


@needs_cuda
def test_one_position_of_each_row_is_written_and_rows_attend_to_their_own_span_only() -> None:
    given = inputs()
    last = (mx.arange(LENGTH) == given.end[:, None] - 1)[:, None, :, None]
    keys, values = mx.where(last, given.new_keys, given.keys), mx.where(last, given.new_values, given.values)
    mx.eval(keys, values)
    out = append_and_attend(*given, SCALE)
    mx.eval(out)
    assert mx.array_equal(given.keys, keys).item()
    assert mx.array_equal(given.values, values).item()
    assert close(out, masked(given._replace(keys=keys, values=values)))
