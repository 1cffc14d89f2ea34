"""The folder of imported models: `<home>/models/<name>/`, each complete or absent.

A model appears by one rename, together with a receipt of what it was made from and by which importer, so a
half-finished import is never seen and an outdated one is recognised.
"""

import errno
import fcntl
import os
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import msgspec

IMPORTER_VERSION = 1
"""Raise when the import writes other files for the same source."""

_RECEIPT = "mlx-sidecar.json"
_STAGING = ".adding-"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}", re.IGNORECASE | re.ASCII)


def is_store_name(name: str) -> bool:
    """Tell whether `name` can be a model of the store; it can never lead out of it."""
    return _NAME.fullmatch(name) is not None


class ModelStore:
    """Finds, adds and removes models below one home folder."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "models"

    def find(self, name: str) -> Path | None:
        """Return the folder of a complete model, or None."""
        if not is_store_name(name):
            return None
        folder = self._folder / name
        return folder if (folder / _RECEIPT).is_file() else None

    def names(self) -> list[str]:
        """Return the names of the complete models, in order."""
        if not self._folder.is_dir():
            return []
        return sorted(path.name for path in self._folder.iterdir() if self.find(path.name) is not None)

    def is_current(self, name: str, source_sha256: str) -> bool:
        """Tell whether the model is there, made from this source by this version of the import."""
        folder = self.find(name)
        return folder is not None and (folder / _RECEIPT).read_bytes() == _receipt(source_sha256)

    @contextmanager
    def adding(self, name: str, source_sha256: str) -> Generator[Path]:
        """Give a path to write a model folder at; when the block ends well it becomes the model `name`.

        Raises:
            ValueError: `name` cannot be a model of the store.
        """
        if not is_store_name(name):
            raise ValueError(f"{name!r} cannot be a model of the store")
        with self.scratch() as staging:
            made = staging / "model"
            yield made
            (made / _RECEIPT).write_bytes(_receipt(source_sha256))
            self._replace(name, made, staging)

    @contextmanager
    def scratch(self) -> Generator[Path]:
        """Give a folder, where models are kept, that is gone when the block ends.

        What processes that were killed have left of theirs goes first: each holds a lock on its own.
        """
        # Of no use to a server, which only finds.
        import shutil
        import tempfile

        self._folder.mkdir(parents=True, exist_ok=True)
        self._clean_up()
        while True:
            folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self._folder))
            # Somebody may take it for left over, in the moment before it is locked.
            with suppress(FileNotFoundError):
                held = os.open(folder, os.O_RDONLY)
                fcntl.flock(held, fcntl.LOCK_EX)
                if folder.exists():
                    break
                os.close(held)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)

    def remove(self, name: str) -> None:
        """Remove a model; it is gone at once, and its files a little later.

        Raises:
            OSError: there is no such model, or it cannot be removed.
        """
        with self.scratch() as staging:
            (self._folder / name).rename(staging / "removed")

    def _replace(self, name: str, made: Path, staging: Path) -> None:
        target = self._folder / name
        for attempt in count():
            with suppress(FileNotFoundError):
                target.rename(staging / f"old-{attempt}")
            try:
                made.rename(target)
            except OSError as error:
                # Somebody else put the same model there in between; then ours replaces theirs.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                return

    def _clean_up(self) -> None:
        import shutil

        for folder in self._folder.glob(f"{_STAGING}*"):
            with suppress(OSError):
                found = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
                finally:
                    os.close(found)


def _receipt(source_sha256: str) -> bytes:
    return msgspec.json.encode({"sourceSha256": source_sha256, "importer": IMPORTER_VERSION}) + b"\n"
