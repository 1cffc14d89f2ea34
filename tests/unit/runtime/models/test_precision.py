from typing import Any

import pytest

from mlx_sidecar.protocol.messages import DtypeRequest
from mlx_sidecar.runtime.models.precision import choose_dtype, projected_bytes

FOUR_BIT: dict[str, Any] = {"quantization": {"group_size": 64, "bits": 4}}


@pytest.mark.parametrize(
    ("asked", "stored", "device", "dtype", "why"),
    [
        ("auto", "bfloat16", "metal", "bfloat16", None),
        ("auto", "4-bit", "cuda", "4-bit", None),
        ("auto", "float32", "cpu", "float32", None),
        ("auto", "bfloat16", "cpu", "float32", "far slower"),
        ("auto", "4-bit", "cpu", "float32", "far slower"),
        ("stored", "4-bit", "cpu", "4-bit", "was asked for"),
        ("float16", "float16", "metal", "float16", None),
        ("float32", "float16", "metal", "float32", "the folder holds float16"),
    ],
)
def test_a_model_runs_as_it_is_stored_unless_that_is_far_slower_or_another_way_was_asked_for(
    asked: DtypeRequest, stored: str, device: str, dtype: str, why: str | None
) -> None:
    chosen, reason = choose_dtype(asked, stored, device)
    assert chosen == dtype
    assert (reason is None) if why is None else why in (reason or "")


@pytest.mark.parametrize(
    ("held", "config", "asked", "device", "projected"),
    [
        ({"F32": 400}, {}, "auto", "cpu", 400),
        ({"BF16": 200}, {}, "auto", "cpu", 400),
        ({"BF16": 200}, {}, "auto", "metal", 200),
        ({"F32": 400, "I32": 8}, {}, "float16", "metal", 208),
        # 100 bytes hold 200 weights of four bits.
        ({"U32": 100, "F16": 20}, FOUR_BIT, "auto", "cpu", 840),
        ({"U32": 100, "F16": 20}, FOUR_BIT, "stored", "cpu", 120),
        ({"U32": 100, "F16": 20}, {"quantization": {"bits": "four"}}, "float32", "cpu", 840),
        ({"U32": 100}, {"quantization_config": {"bits": 8}}, "float32", "metal", 400),
        ({}, {}, "auto", "cpu", 0),
    ],
)
def test_memory_is_projected_in_the_precision_that_the_model_will_run_in(
    held: dict[str, int], config: dict[str, Any], asked: DtypeRequest, device: str, projected: int
) -> None:
    assert projected_bytes(held, config, asked, device) == projected
