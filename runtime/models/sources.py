"""From what a client calls a model to a folder on this machine. Nothing is ever downloaded here."""

import re
from pathlib import Path
from typing import Any, cast

import msgspec

from mlx_sidecar.protocol.errors import InvalidModel, ModelNotFound

from .store import ModelStore

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# Weights, configuration and text files; never code, pickles or other frameworks' weights.
HUB_FILES = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "*.tiktoken", "*.txt"]

_CONFIG_LIMIT_BYTES = 16 * 1024 * 1024


def find_model(model: str, store: ModelStore) -> Path:
    """Return the folder of `model`: a name in the store, an absolute path, or a hub id in the hub's cache.

    Raises:
        ModelNotFound: none of the three leads to a folder.
        InvalidModel: the folder does not look like a model.
    """
    folder = store.find(model) or _absolute(model) or _in_hub_cache(model)
    if folder is None:
        raise ModelNotFound(model)
    check_folder(model, folder)
    return folder


def check_folder(model: str, folder: Path) -> None:
    """Raise InvalidModel, saying what is missing, unless the folder has the files of a model."""
    config = folder / "config.json"
    if not config.is_file():
        raise InvalidModel(
            model, "the folder has no config.json; name the folder that holds the model's files"
        )
    if not weight_files(folder):
        raise InvalidModel(model, "the folder has no model*.safetensors; other weight formats are not loaded")
    if config.stat().st_size > _CONFIG_LIMIT_BYTES:
        raise InvalidModel(model, "its config.json is too large to be one")
    try:
        value: Any = msgspec.json.decode(config.read_bytes())
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise InvalidModel(model, "its config.json is not valid JSON") from None
    if not isinstance(value, dict) or not isinstance(cast(dict[str, Any], value).get("model_type"), str):
        raise InvalidModel(model, "its config.json does not name a model_type")


def weight_files(folder: Path) -> list[Path]:
    """Return the files that mlx-lm would read the weights from."""
    return sorted(folder.glob("model*.safetensors"))


def _absolute(model: str) -> Path | None:
    # A relative path would depend on where the host happened to start us.
    try:
        path = Path(model).expanduser()
        return path if path.is_absolute() and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _in_hub_cache(model: str) -> Path | None:
    if not HUB_ID.fullmatch(model):
        return None
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    download = cast(Any, huggingface_hub.snapshot_download)
    try:
        # The same files as in `pull`: the hub's library calls a snapshot without the others incomplete.
        return Path(download(model, local_files_only=True, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
