"""How MLX and mlx-lm come into the process: on the inference thread, without what a text model never uses.

Importing `mlx_lm` the plain way takes about two seconds: its package body and three modules import
transformers and huggingface_hub for annotations, for a tokenizer class that we do not use, and for downloads
that belong to `pull`. Here the package body is not run, and placeholders stand in for the two libraries while
mlx-lm's modules are imported; afterwards they are gone, and who needs the real ones imports them as usual.
"""

import importlib.util
import os
import resource
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from mlx_sidecar.native.blas import Blas

from .sequence import Device

_PLACEHOLDERS = {
    "transformers": ("AutoTokenizer", "PreTrainedTokenizer", "PreTrainedTokenizerFast"),
    "transformers.tokenization_utils_base": ("PreTrainedTokenizerBase",),
    "huggingface_hub": ("snapshot_download",),
}


_CUDA_CACHES = {
    # Of attention's plans: a prompt needs one for every chunk, and each takes up to 0.1 s to make.
    "MLX_CUDA_SDPA_CACHE_SIZE": "1024",
    # MLX counts all misses of its caches, ever, and raises when they are twice the size: any server's end.
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
}


def start_mlx(blas: Blas, wired_limit_bytes: int | None = None) -> Device:
    """Import what the engine needs and return what it will run on.

    Raises:
        ImportError: MLX, mlx-lm or their native libraries are missing.
    """
    from importlib.metadata import version

    began = time.monotonic()
    for name, value in _CUDA_CACHES.items():
        os.environ.setdefault(name, value)
    blas.activate()
    import mlx.core as mx

    blas.confirm(lambda: mx.eval(mx.ones((32, 32)) @ mx.ones((32, 32))))
    _import_mlx_lm()
    kind = _device_kind()
    if kind == "cuda":
        from .compiled_step import attend_in_place

        attend_in_place()
    if kind == "cpu":
        # On a CPU it would start a C++ compiler at run time, for over a second for each new expression, and
        # load the result from a folder in /tmp. It makes decoding no faster.
        mx.disable_compile()
    wired = limit_wired_memory(wired_limit_bytes)
    return Device(kind, version("mlx"), (time.monotonic() - began) * 1000, wired)


def limit_wired_memory(wanted_bytes: int | None = None) -> int | None:
    """Set Metal's wired limit, once, and return it; None elsewhere, where there is none.

    None is the recommended size, and no more is possible; 0 is off: some versions of macOS panic with it.
    """
    import mlx.core as mx

    recommended = mx.device_info().get("max_recommended_working_set_size")
    if recommended is None:
        return None
    limit = int(recommended) if wanted_bytes is None else min(wanted_bytes, int(recommended))
    if limit:
        mx.set_wired_limit(limit)
    return limit


def _device_kind() -> str:
    import mlx.core as mx

    if mx.default_device().type != mx.DeviceType.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def _import_mlx_lm() -> None:
    if "mlx_lm" not in sys.modules:
        spec = importlib.util.find_spec("mlx_lm")
        if spec is None:
            raise ImportError("mlx_lm is not installed")
        sys.modules["mlx_lm"] = importlib.util.module_from_spec(spec)
    with _placeholders(), _file_limit_kept():
        importlib.import_module("mlx_lm.generate")


@contextmanager
def _placeholders() -> Generator[None]:
    absent = [name for name in _PLACEHOLDERS if name not in sys.modules]
    for name in absent:
        module: Any = ModuleType(name)
        module.__path__ = []
        for member in _PLACEHOLDERS[name]:
            setattr(module, member, _Placeholder)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


class _Placeholder:
    """Stands for a class of transformers while mlx-lm is imported: it can be subclassed and registered."""

    @classmethod
    def register(cls, *_: object, **__: object) -> None:
        """Accept what `AutoTokenizer.register` accepts."""


@contextmanager
def _file_limit_kept() -> Generator[None]:
    # mlx_lm.utils lowers the limit of open files, hard limit included, which nobody can undo later.
    real = resource.setrlimit
    resource.setrlimit = _ignore
    try:
        yield
    finally:
        resource.setrlimit = real


def _ignore(*_: object) -> None:
    """Do nothing, whatever the arguments."""
