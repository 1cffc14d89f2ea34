"""Page residency of files (mincore) and memory of this process.

Without the native module residency is unknown, and process memory comes from the standard library, which
knows the peak only.
"""

import resource
import sys
from pathlib import Path
from typing import NamedTuple

try:
    from . import _core
except ImportError:
    _core = None


class PagesReport(NamedTuple):
    """Whether residency can be told, and how often it was asked."""

    active: bool
    reason: str | None
    queries: int = 0


class Pages:
    """Answers questions about pages and counts them."""

    def __init__(self) -> None:
        self._queries = 0

    def of_files(self, paths: list[Path]) -> tuple[int, int] | None:
        """Return (resident, total) bytes of the files in the page cache now; None when it cannot be told.

        A file of another user may read as fully resident: Linux does not tell strangers.

        Raises:
            OSError: a file cannot be opened or mapped.
        """
        if _core is None:
            return None
        self._queries += 1
        pages = [_core.file_pages(str(path)) for path in paths]
        return sum(resident for resident, _ in pages), sum(total for _, total in pages)

    def process_memory(self) -> tuple[int, int]:
        """Return (resident, peak resident) bytes; on macOS the first is the physical footprint."""
        if _core is not None:
            return _core.process_memory()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_bytes = peak if sys.platform == "darwin" else peak * 1024
        return peak_bytes, peak_bytes

    def available_memory(self) -> int | None:
        """Return the bytes that the machine could give to somebody now; None where that is not known."""
        try:
            return _available_memory(sys.platform)
        except (OSError, ValueError, StopIteration, AttributeError):
            return None

    def report(self) -> PagesReport:
        """Return what is true now."""
        if _core is None:
            return PagesReport(active=False, reason="the native module was not built")
        return PagesReport(active=True, reason=None, queries=self._queries)


def _available_memory(platform: str) -> int | None:
    if platform == "linux":
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    if platform == "darwin":
        # What memory pressure is judged by there: the percentage that is free or can be made so.
        level = _sysctl("kern.memorystatus_level", 4)
        return _sysctl("hw.memsize", 8) * level // 100
    return None


def _sysctl(name: str, size: int) -> int:
    import ctypes

    value, length = ctypes.create_string_buffer(size), ctypes.c_size_t(size)
    if ctypes.CDLL(None).sysctlbyname(name.encode(), value, ctypes.byref(length), None, 0) != 0:
        raise OSError(name)
    return int.from_bytes(value.raw, sys.byteorder)
