"""The models on this machine: what `mlx-sidecar list` shows, and what `rm` may remove."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx_sidecar.protocol.errors import InvalidModel, SidecarError

from . import hub_cache
from .folder_check import check_folder
from .folder_facts import dtype_of
from .store import ModelStore
from .weight_files import weight_facts


@dataclass(frozen=True)
class Installed:
    """A model on this machine. `problem` is why it cannot be loaded, or None; the facts are then unknown."""

    model: str
    source: Literal["store", "hub"]
    folder: Path
    nbytes: int
    used_at: float
    """Seconds since 1970."""
    commit: str | None = None
    refs: tuple[str, ...] = ()
    architecture: str | None = None
    dtype: str | None = None
    problem: str | None = None


def installed(store: ModelStore) -> Iterator[Installed]:
    """Yield every model of the store and of the hub's cache, each checked as for loading."""
    for name in store.names():
        if (folder := store.find(name)) is not None:
            yield _looked_into(Installed(name, "store", folder, *_size_and_use(folder)))
    for found in hub_cache.snapshots():
        # Other things are kept there, too: what was fetched for tokenizers, or by programs of other kinds.
        if (found.folder / "config.json").exists():
            yield _looked_into(
                Installed(
                    found.model, "hub", found.folder, found.nbytes, found.used_at, found.commit, found.refs
                )
            )


def to_remove(model: str, revision: str | None, store: ModelStore) -> list[Installed]:
    """Return what goes by that name, without a look into it; of the hub's cache one revision, or all."""
    if (folder := store.find(model)) is not None and revision is None:
        return [Installed(model, "store", folder, *_size_and_use(folder))]
    return [
        Installed(model, "hub", found.folder, found.nbytes, found.used_at, found.commit, found.refs)
        for found in hub_cache.snapshots()
        if found.model == model and revision in (None, found.commit, *found.refs)
    ]


def remove(models: list[Installed], store: ModelStore) -> int:
    """Remove models, and return the bytes that come free.

    Raises:
        OSError: something cannot be removed.
    """
    freed = 0
    for model in models:
        if model.source == "store":
            store.remove(model.model)
            freed += model.nbytes
    commits = [model.commit for model in models if model.commit is not None]
    return freed + (hub_cache.remove(commits) if commits else 0)


def _looked_into(model: Installed) -> Installed:
    from dataclasses import replace

    try:
        config = check_folder(model.model, model.folder)
        facts = weight_facts(model.model, model.folder)
    except SidecarError as error:
        return replace(model, problem=error.message)
    except OSError:
        return replace(model, problem=InvalidModel(model.model, "its files cannot be read").message)
    return replace(
        model, architecture=str(config["model_type"]), dtype=dtype_of(config, facts.bytes_by_dtype)
    )


def _size_and_use(folder: Path) -> tuple[int, float]:
    stats = [entry.stat() for entry in os.scandir(folder) if entry.is_file()]
    return sum(stat.st_size for stat in stats), max((stat.st_atime for stat in stats), default=0.0)
