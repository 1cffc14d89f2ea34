"""A settings file on disk: its text, and whether it has changed."""

import os
import stat
from pathlib import Path

from .values import ConfigError

MAX_FILE_BYTES = 64 * 1024

Look = tuple[int, ...] | None


def text_of(path: Path) -> str | None:
    """Return what a file says, or None if there is none.

    Raises:
        ConfigError: it cannot be read, is too long, or is no UTF-8.
    """
    try:
        # Before it is opened: a pipe would let us wait for whoever writes it.
        if not stat.S_ISREG(path.stat().st_mode) and path != Path(os.devnull):
            raise ConfigError(f"{path}: it is not a regular file. Name a YAML file.")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: it cannot be read: {reason}.") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: it is longer than {MAX_FILE_BYTES} bytes. Keep only what you change.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: it is not UTF-8. Save it as UTF-8.") from None


def look(path: Path) -> Look:
    """Return what tells one state of a file from another; None if there is none, or no regular one."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    # The time of the inode too: it tells of new permissions, and of a time that was set back.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class WatchedFile:
    """Says when a file has changed, appeared or gone, after it was as in `known`. Who asks decides how often.

    A change counts when two looks in a row see the same: an editor may first remove a file, then write half.
    """

    def __init__(self, path: Path, known: Look) -> None:
        self._path = path
        self._known = self._last = known

    def poll(self) -> bool:
        """Return whether it has changed since the last change that was told."""
        before, self._last = self._last, look(self._path)
        if self._last != before or self._last == self._known:
            return False
        self._known = self._last
        return True
