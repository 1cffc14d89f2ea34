import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_sidecar.native.pages import Pages


def test_a_file_just_read_is_in_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(os.urandom(1_000_000))
    file.read_bytes()
    assert Pages().of_files([file]) == (1_000_000, 1_000_000)


def test_sizes_of_several_files_add_up(tmp_path: Path) -> None:
    for name, size in (("a", 10), ("b", 5000), ("empty", 0)):
        (tmp_path / name).write_bytes(b"x" * size)
    counted = Pages().of_files([tmp_path / name for name in ("a", "b", "empty")])
    assert counted is not None
    assert counted[1] == 5010


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Pages().of_files([tmp_path / "nothing"])


def test_process_memory_grows_with_what_the_process_holds() -> None:
    pages = Pages()
    before, _ = pages.process_memory()
    # Mapped, because an allocation could be given memory that the process holds already.
    with mmap.mmap(-1, 50_000_000) as held:
        held.write(b"x" * len(held))
        after, peak = pages.process_memory()
    assert after - before > 40_000_000
    assert peak >= after


def test_queries_are_counted() -> None:
    pages = Pages()
    pages.of_files([])
    pages.of_files([])
    assert (pages.report().active, pages.report().queries) == (True, 2)


def test_without_the_native_module_it_says_so_and_memory_is_still_told() -> None:
    script = (
        "import sys\n"
        "sys.modules['mlx_sidecar.native._core'] = None\n"
        "from mlx_sidecar.native.pages import Pages\n"
        "pages = Pages()\n"
        "assert pages.of_files([]) is None\n"
        "assert pages.process_memory()[0] > 1_000_000\n"
        "print(pages.report().active, pages.report().reason)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60)
    assert done.stdout.strip() == b"False the native module was not built"
