"""The device that MLX runs on: how much memory it has, and what an exception out of it means."""

import os

import mlx.core as mx

_SHARE = 0.9
"""Of the device's memory. The rest is for what no budget counts: kernels, other programs, fragments."""


class DeviceLost(Exception):
    """The device computes nothing any more; only a new process can help."""


def device_works() -> bool:
    """Return whether the device still computes anything."""
    try:
        return mx.array([True, True]).all().item() is True
    except Exception:
        return False


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that there was no memory; MLX has no type for that."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate" in text


def memory_bytes() -> int:
    """Return the bytes that weights and caches may take together."""
    info = mx.device_info()
    for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if isinstance(size := info.get(name), int):
            return int(size * _SHARE)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * _SHARE)
