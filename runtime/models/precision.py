"""In which precision a model runs, why, and how much memory its weights take then. No MLX here."""

from collections.abc import Mapping
from typing import Any, cast

from mlx_sidecar.protocol.messages import DtypeRequest

DOES_NOT_RUN = "its network does not run: config.json and the weights do not fit together"
_SLOW_ON_CPU = "MLX's CPU backend computes quantized and 16-bit matrix products far slower than float32"
_NAMES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_DEFAULT_BITS = 4


def choose_dtype(dtype: DtypeRequest, stored: str, device: str) -> tuple[str, str | None]:
    """Return the precision to run in, and why, where that is not as stored."""
    if dtype in ("stored", stored):
        return stored, f"{_SLOW_ON_CPU}, but {dtype!r} was asked for" if _slow(stored, device) else None
    if dtype != "auto":
        return dtype, f"asked for; the folder holds {stored}"
    if _slow(stored, device):
        return "float32", f"{_SLOW_ON_CPU}; the folder holds {stored}"
    return stored, None


def projected_bytes(
    bytes_by_dtype: Mapping[str, int], config: Mapping[str, Any], dtype: DtypeRequest, device: str
) -> int:
    """Return the bytes that the weights of a folder will take in memory.

    `bytes_by_dtype` is what its files hold, by the names of safetensors. Packed weights (U32) that will be
    unpacked are counted by the bits of most layers, their scales as if they stayed: rather a little too much.
    """
    bits = _bits(config)
    floats = {name: size for name, size in bytes_by_dtype.items() if name in _NAMES}
    stored = f"{bits}-bit" if bits else _NAMES[max(floats, key=lambda name: floats[name], default="F32")]
    wanted, _ = choose_dtype(dtype, stored, device)
    if wanted == stored or wanted not in _BYTES:
        return sum(bytes_by_dtype.values())
    width = _BYTES[wanted]
    total = 0
    for name, size in bytes_by_dtype.items():
        if name in floats:
            total += size // _STORED_BYTES[name] * width
        elif name == "U32" and bits:
            total += size * 8 // bits * width
        else:
            total += size
    return total


def _bits(config: Mapping[str, Any]) -> int | None:
    quantization = config.get("quantization") or config.get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    bits = cast(dict[str, Any], quantization).get("bits", _DEFAULT_BITS)
    return bits if isinstance(bits, int) and bits > 0 else _DEFAULT_BITS


def _slow(dtype: str, device: str) -> bool:
    return device == "cpu" and dtype != "float32"
