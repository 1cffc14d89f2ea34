"""A copy of a model's folder with float32 weights, which mlx-lm on a CPU needs to be of any use.

python float32_model.py FROM TO

The weights are those that the sidecar computes with when it loads FROM on a CPU. No answer ends before its
length: the token that ends it is replaced by one that no text has.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, cast

NEVER = "<empty_output>"
"""A special token of the demo model that it does not use."""


def make(source: Path, target: Path) -> None:
    """Write the copy; it is complete when its config.json is there."""
    from mlx_sidecar.native.blas import Blas
    from mlx_sidecar.runtime.engine.mlx_start import start_mlx

    start_mlx(Blas())
    import mlx.core as mx
    from mlx import utils

    from mlx_sidecar.runtime.models.loader import load_network

    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "tokenizer.json", target)
    module = load_network(source, "float32", "cpu").module
    weights = dict(cast(Any, utils).tree_flatten(module.parameters()))
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "mlx"})
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": NEVER}))
    config = json.loads((source / "config.json").read_text())
    del config["quantization"]
    config |= {"torch_dtype": "float32", "eos_token_id": _id_of(NEVER, source)}
    (target / "config.json").write_text(json.dumps(config))
    mx.clear_streams()


def _id_of(token: str, folder: Path) -> int:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return next(each["id"] for each in added if each["content"] == token)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
