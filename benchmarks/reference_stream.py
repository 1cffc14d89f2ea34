"""The reference side of single_stream.py: mlx-lm's `stream_generate` in this process, on the same weights.

The weights come through the sidecar's loader (float32 on a CPU) and MLX runs on the same BLAS: what differs
is everything around the forward pass.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, cast

from mlx_sidecar.native.blas import Blas


def main() -> None:
    """Answer every line on stdin with times on stdout."""
    Blas().activate()
    import mlx.core as mx
    import mlx_lm
    import mlx_lm.tokenizer_utils

    from mlx_sidecar.runtime.models.loader import load_network

    folder = Path(sys.argv[1])
    device = "cpu" if mx.default_device().type == mx.DeviceType.cpu else "gpu"
    network = load_network(folder, "auto", device)
    tokenizer = cast(Any, mlx_lm.tokenizer_utils).load(folder)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        times: list[float] = []
        ids: list[int] = []
        began = time.perf_counter()
        stream = cast(Any, mlx_lm).stream_generate(
            network.module, tokenizer, request["tokens"], max_tokens=request["maxTokens"]
        )
        for part in stream:
            times.append((time.perf_counter() - began) * 1000)
            ids.append(part.token)
        print(json.dumps({"ids": ids, "firstMs": times[0], "lastMs": times[-1]}), flush=True)
    mx.clear_streams()


if __name__ == "__main__":
    main()
