import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

# MLX binds its BLAS once in a process, so each side of a comparison runs in one of its own.
PRODUCTS = """
import json, sys
from mlx_sidecar.native.blas import Blas
blas = Blas()
if "late" not in sys.argv:
    blas.activate()
import mlx.core as mx
if "late" in sys.argv:
    blas.activate()
blas.confirm(lambda: mx.eval(mx.ones((4, 4)) @ mx.ones((4, 4))))
mx.random.seed(1)
results = []
for m, k, n in ((1, 576, 1536), (7, 33, 5), (128, 576, 192), (3, 1, 3)):
    a, b = mx.random.normal((m, k)), mx.random.normal((k, n))
    results += [a @ b, b.T @ a.T, mx.random.normal((2, m, k)) @ b]
sums = [r.flatten()[:50].tolist() for r in results]
print(json.dumps({"report": blas.report()._asdict(), "sums": sums}))
mx.clear_streams()
"""
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="MLX uses Accelerate on this platform")


def products(*arguments: str, **env: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS, *arguments],
        capture_output=True,
        check=True,
        env=os.environ | env,
        timeout=120,
    )
    return json.loads(done.stdout)


@linux_only
def test_products_through_openblas_are_those_of_mlx_within_float32() -> None:
    fast, plain = products(), products(MLX_SIDECAR_BLAS="off")
    assert fast["report"]["active"]
    assert not plain["report"]["active"]
    for quick, slow in zip(fast["sums"], plain["sums"], strict=True):
        assert np.allclose(quick, slow, rtol=1e-4, atol=1e-4)


@linux_only
def test_calls_are_counted_where_they_arrive() -> None:
    report = products()["report"]
    assert report["calls"] >= 12
    assert "OpenBLAS" in report["library"]
    assert report["threads"] >= 1


@linux_only
def test_one_processor_is_left_to_others_unless_the_user_says_otherwise() -> None:
    assert products()["report"]["threads"] == max(1, len(os.sched_getaffinity(0)) - 1)
    assert products(OPENBLAS_NUM_THREADS="2")["report"]["threads"] == 2


@linux_only
def test_switched_off_it_says_so() -> None:
    report = products(MLX_SIDECAR_BLAS="off")["report"]
    assert (report["active"], report["reason"]) == (False, "switched off by MLX_SIDECAR_BLAS=off")


@linux_only
def test_too_late_is_told_and_not_pretended() -> None:
    report = products("late")["report"]
    assert (report["active"], report["reason"]) == (False, "MLX was already loaded")
