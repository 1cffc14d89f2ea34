"""From what a client calls a model to a folder on this machine. Nothing is ever downloaded here."""

from pathlib import Path
from typing import Any

from mlx_sidecar.protocol.errors import InvalidModel, ModelNotFound

from .bounded_json import BadFile, read_json
from .folder_check import check_folder
from .hub_cache import find_snapshot, is_hub_id
from .store import ModelStore


def find_model(model: str, store: ModelStore, revision: str | None = None) -> Path:
    """Return the folder of `model`: a name in the store, an absolute path, or a hub id in the hub's cache.

    The folder has passed `check_folder`; `weight_facts` comes next. Without `revision` a hub id is its main
    branch as it was when it was pulled.

    Raises:
        ModelNotFound: none of the three leads to a folder.
        UnsafeModel: the folder could run code, or leads out of itself.
        InvalidModel: it does not look like a model, or `revision` is for something that has none.
        OSError: the folder cannot be read.
    """
    folder = store.find(model) or absolute_folder(model)
    if folder is not None and revision is not None:
        raise InvalidModel(model, "only models of the hub have revisions; leave 'revision' out")
    if folder is None and is_hub_id(model):
        folder = find_snapshot(model, revision)
    if folder is None:
        raise ModelNotFound(model if revision is None else f"{model}@{revision}")
    check_folder(model, folder)
    return folder


def read_config(model: str, folder: Path) -> dict[str, Any]:
    """Return config.json of a folder that has passed `check_folder`.

    Raises:
        InvalidModel: it has changed since, and is none any more.
        OSError: it cannot be read.
    """
    try:
        return read_json(folder / "config.json")
    except BadFile as error:
        raise InvalidModel(model, str(error)) from None


def absolute_folder(model: str) -> Path | None:
    """Return the folder that an absolute path leads to, or None; `~` is the user's."""
    # A relative path would depend on where the host happened to start us.
    try:
        path = Path(model).expanduser()
        return path if path.is_absolute() and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None
