"""The cache that the hub's own library keeps: finding, listing and removing models, without a network."""

import fcntl
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

# Weights, configuration and text files; never code, pickles or other frameworks' weights.
HUB_FILES = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "*.tiktoken", "*.txt"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)


@dataclass(frozen=True)
class Snapshot:
    """One revision of a model in the cache: its commit, and the branches and tags that stand for it."""

    model: str
    commit: str
    refs: tuple[str, ...]
    folder: Path
    nbytes: int
    used_at: float
    """Seconds since 1970: when a file of it was last opened, as far as the file system keeps that."""


def is_hub_id(model: str) -> bool:
    """Tell whether `model` looks like `owner/model`."""
    return _HUB_ID.fullmatch(model) is not None


def is_revision(revision: str) -> bool:
    """Tell whether `revision` can be a branch, tag or commit; it can never lead out of the cache."""
    return _REVISION.fullmatch(revision) is not None


def find_snapshot(model: str, revision: str | None = None) -> Path | None:
    """Return the folder of a hub model that is complete in the cache, or None."""
    if revision is not None and not is_revision(revision):
        return None
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    download = cast(Any, huggingface_hub.snapshot_download)
    try:
        # The same files as in `pull`: the hub's library calls a snapshot without the others incomplete.
        return Path(download(model, revision=revision, local_files_only=True, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def snapshots() -> Iterator[Snapshot]:
    """Yield every revision of every model in the cache, by name and commit. An absent cache has none."""
    for repository in sorted(_repositories(), key=lambda found: found.repo_id):
        for revision in sorted(repository.revisions, key=lambda found: found.commit_hash):
            opened = max((file.blob_last_accessed for file in revision.files), default=revision.last_modified)
            yield Snapshot(
                repository.repo_id,
                revision.commit_hash,
                tuple(sorted(revision.refs)),
                revision.snapshot_path,
                revision.size_on_disk,
                opened,
            )


def remove(commits: list[str]) -> int:
    """Remove revisions, and the files that no other one shares; return the bytes that come free."""
    from huggingface_hub import scan_cache_dir

    strategy = scan_cache_dir().delete_revisions(*commits)
    strategy.execute()
    return strategy.expected_freed_size


def remove_leftovers(model: str) -> None:
    """Remove the beginnings of files that pulls left when they were killed; nothing goes on from them.

    A file that is being fetched has its lock held by whoever does.
    """
    from huggingface_hub import constants

    cache, name = Path(constants.HF_HUB_CACHE), f"models--{model.replace('/', '--')}"
    for leftover in (cache / name / "blobs").glob("*.incomplete"):
        lock = cache / ".locks" / name / f"{leftover.name.partition('.')[0]}.lock"
        # Without its lock, or with somebody who holds it, it is left alone.
        with suppress(OSError), lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _repositories() -> list[Any]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return [found for found in scan_cache_dir().repos if found.repo_type == "model"]
    except CacheNotFound:
        return []
