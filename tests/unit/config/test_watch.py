import os
from pathlib import Path

import pytest

from mlx_sidecar.config.values import ConfigError
from mlx_sidecar.config.watch import MAX_FILE_BYTES, WatchedFile, look, text_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "runtime.yaml"
    path.write_text("max_waiting: 1\n")
    return path


def watched(path: Path) -> WatchedFile:
    return WatchedFile(path, look(path))


def test_a_file_that_stays_as_it_is_has_not_changed(file: Path) -> None:
    it = watched(file)
    assert [it.poll() for _ in range(3)] == [False] * 3


def test_a_change_is_told_once_when_it_has_settled(file: Path) -> None:
    it = watched(file)
    file.write_text("max_waiting: 22\n")
    assert [it.poll() for _ in range(4)] == [False, True, False, False]


def test_a_file_that_is_still_being_written_is_waited_for(file: Path) -> None:
    it = watched(file)
    for length in range(1, 4):
        file.write_text("#" * length)
        assert not it.poll()
    assert it.poll()


def test_replacing_the_file_is_a_change_and_the_new_one_is_watched(file: Path, tmp_path: Path) -> None:
    it = watched(file)
    for text in ("max_waiting: 2\n", "max_waiting: 3\n"):
        new = tmp_path / "new"
        new.write_text(text)
        os.utime(new, ns=(0, 0))
        new.replace(file)
        assert [it.poll() for _ in range(3)] == [False, True, False]


def test_going_and_coming_back_are_changes(file: Path) -> None:
    it = watched(file)
    file.unlink()
    assert [it.poll() for _ in range(3)] == [False, True, False]
    file.write_text("")
    assert [it.poll() for _ in range(3)] == [False, True, False]


def test_a_file_that_is_gone_for_a_moment_has_not_gone(file: Path, tmp_path: Path) -> None:
    it = watched(file)
    aside = tmp_path / "aside"
    file.rename(aside)
    assert not it.poll()
    aside.rename(file)
    # Its inode was touched, so it is read again; it was never taken to be missing.
    assert [it.poll(), it.poll()] == [False, True]


def test_an_edit_that_keeps_size_and_time_is_a_change(file: Path) -> None:
    it = watched(file)
    before = file.stat()
    file.write_text("max_waiting: 2\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert [it.poll(), it.poll()] == [False, True]


def test_what_was_written_before_the_watch_began_is_a_change(file: Path) -> None:
    known = look(file)
    file.write_text("max_waiting: 22\n")
    it = WatchedFile(file, known)
    assert [it.poll(), it.poll()] == [False, True]


def test_the_text_of_a_file_is_without_a_mark(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert text_of(file) == "a: 1\n"


def test_what_is_not_there_has_no_text(tmp_path: Path, file: Path) -> None:
    assert text_of(tmp_path / "none") is None
    assert text_of(file / "below-a-file") is None
    assert text_of(Path(os.devnull)) == ""


def test_what_cannot_be_a_settings_file_is_refused_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="not a regular file"):
            text_of(path)


def test_a_file_that_is_too_long_or_no_text_is_refused(file: Path) -> None:
    file.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="longer than"):
        text_of(file)
    file.write_bytes(b"# fine\na: \xff\n")
    with pytest.raises(ConfigError, match=rf"{file}:2: it is not UTF-8"):
        text_of(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(file: Path) -> None:
    file.chmod(0)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        text_of(file)
