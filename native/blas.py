"""OpenBLAS under MLX's Linux CPU build.

MLX's Linux CPU wheel links the reference BLAS, which is an order of magnitude slower. `activate` puts a
library of MLX's three CBLAS names in front of it, forwarding to the OpenBLAS that the package
`scipy-openblas32` ships. Elsewhere MLX has Accelerate or a GPU, and the component stays off.
"""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import ctypes

SWITCH = "MLX_SIDECAR_BLAS"
"""Environment variable; `off` leaves MLX its own BLAS, for comparisons."""

THREADS = "OPENBLAS_NUM_THREADS"
"""OpenBLAS's own environment variable; where it is set, it is obeyed."""

_SYMBOL_PREFIX = "scipy_"

log = logging.getLogger("native")


class BlasReport(NamedTuple):
    """What is true now. `calls` counts matrix products that MLX made through the faster library."""

    active: bool
    reason: str | None
    library: str | None = None
    threads: int | None = None
    calls: int = 0


class Blas:
    """The one shim of this process: activate it, import MLX, then confirm that MLX uses it."""

    def __init__(self) -> None:
        self._shim: ctypes.CDLL | None = None
        self._openblas: ctypes.CDLL | None = None
        self._reason: str | None = "MLX has not been started"

    def activate(self) -> None:
        """Put OpenBLAS in front of MLX's BLAS. Call before anything imports `mlx.core`."""
        shim, openblas = _library("_blas*.so"), _openblas()
        if reason := _obstacle(shim, openblas):
            self._reason = reason
            return
        import ctypes

        # Bound while still private: once global, a name that leads nowhere would end the process.
        local = ctypes.CDLL(str(shim), mode=os.RTLD_LOCAL)
        local.mlx_sidecar_blas_error.restype = ctypes.c_char_p
        if local.mlx_sidecar_blas_bind(str(openblas).encode(), _SYMBOL_PREFIX.encode()) != 0:
            error: bytes = local.mlx_sidecar_blas_error()
            # The linker's words hold paths; they are for the log only.
            log.warning("OpenBLAS could not be opened: %s", error.decode(errors="replace"))
            self._reason = "OpenBLAS could not be opened; the log says why"
            return
        self._openblas = ctypes.CDLL(str(openblas))
        self._openblas.scipy_openblas_get_config.restype = ctypes.c_char_p
        if THREADS not in os.environ:
            self._openblas.scipy_openblas_set_num_threads(_default_threads())
        self._shim = ctypes.CDLL(str(shim), mode=os.RTLD_GLOBAL)
        self._shim.mlx_sidecar_blas_calls.restype = ctypes.c_ulonglong
        self._reason = "MLX has made no matrix product yet"

    def confirm(self, multiply: Callable[[], object]) -> None:
        """Run a float32 matrix product through MLX and see whether it came by here."""
        if self._shim is None:
            return
        before = self._calls()
        multiply()
        arrived = self._calls() > before
        self._reason = None if arrived else "MLX was loaded before the shim, or does not link CBLAS"

    def report(self) -> BlasReport:
        """Return what is true now."""
        if self._shim is None or self._openblas is None or self._reason is not None:
            return BlasReport(active=False, reason=self._reason)
        config: bytes = self._openblas.scipy_openblas_get_config()
        return BlasReport(
            active=True,
            reason=None,
            library=config.decode(errors="replace").strip(),
            threads=int(self._openblas.scipy_openblas_get_num_threads()),
            calls=self._calls(),
        )

    def _calls(self) -> int:
        return int(self._shim.mlx_sidecar_blas_calls()) if self._shim else 0


def _obstacle(shim: Path | None, openblas: Path | None) -> str | None:
    if sys.platform != "linux":
        return "not needed: MLX uses Accelerate on this platform"
    if os.environ.get(SWITCH) == "off":
        return f"switched off by {SWITCH}=off"
    if shim is None:
        return "the native module was not built"
    if openblas is None:
        return "the package scipy-openblas32 is not installed; it is part of the 'cpu' extra"
    if "mlx.core" in sys.modules:
        return "MLX was already loaded"
    return None


def _default_threads() -> int:
    """Return one thread less than there are processors.

    OpenBLAS splits every product evenly and waits for the slowest part. With a thread on each processor, any
    other busy process makes decoding several times slower than a single thread would be.
    """
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _library(pattern: str) -> Path | None:
    return next(iter(sorted(Path(__file__).parent.glob(pattern))), None)


def _openblas() -> Path | None:
    import importlib.util

    # find_spec and not import: the package's own __init__ costs more than everything here.
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    return next(iter(sorted(folder.glob("libscipy_openblas*.so"))), None)
