"""The models that models.py loads: random weights, made once and kept in build/benchmarks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.random_llama import Shape, make_random_llama

HOME = Path(__file__).parents[1] / "build" / "benchmarks"
HALF_BILLION_BYTES = Shape(layers=12, hidden=1024, heads=16, kv_heads=8, head=64, intermediate=2816)
"""190 million weights: 380 MB in bfloat16, 760 MB in float32."""
WIDTHS = (64, 80, 96, 112, 112, 128)
"""Of the small models, of which the vocabulary is nearly all: 13 to 26 MB in float32."""


def bfloat16_folder() -> Path:
    """Return the folder of a model that a CPU has to convert."""
    return _made("random-bfloat16", HALF_BILLION_BYTES)


def float32_folder() -> Path:
    """Return the folder of the same model as a CPU runs it."""
    folder, stored = HOME / "random-float32", bfloat16_folder()
    if not (folder / "model.safetensors").exists():
        shutil.copytree(stored, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        _widen(stored / "model.safetensors", folder / "model.safetensors")
    return folder


def small_folders() -> list[Path]:
    """Return the folders of six small models of different sizes."""
    return [_made(f"small-{seed}", small_shape(width), seed) for seed, width in enumerate(WIDTHS)]


def small_shape(width: int) -> Shape:
    """Return the shape of a small model."""
    return Shape(2, width, heads=4, kv_heads=2, head=16, intermediate=2 * width, context=1024)


def float32_bytes(folder: Path) -> int:
    """Return what the weights of a bfloat16 folder take in float32; the header counts as weights."""
    return 2 * (folder / "model.safetensors").stat().st_size


def _made(name: str, shape: Shape, seed: int = 1) -> Path:
    folder = HOME / name
    if not (folder / "model.safetensors").exists():
        # Under another name until it is whole.
        partial = HOME / f"{name}.partial"
        make_random_llama(partial, shape, seed).rename(folder)
    return folder


def _widen(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    for name, tensor in header.items():
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            tensor |= {"dtype": "F32", "data_offsets": [2 * begin, 2 * end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    values = np.memmap(source, np.uint16, "r", offset=8 + length)
    partial = target.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for begin in range(0, len(values), 1 << 22):
            # A bfloat16 is the upper half of a float32.
            file.write((values[begin : begin + (1 << 22)].astype(np.uint32) << 16).tobytes())
    partial.rename(target)
