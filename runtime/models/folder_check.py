"""Whether the files of a folder may be opened at all, by us or by a library. Nothing of a model is ever run.

Only the folder itself counts, not folders inside it: nothing that loads a model looks there.
"""

import os
import stat
from pathlib import Path
from typing import Any

from mlx_sidecar.protocol.errors import InvalidModel, UnsafeModel

from .bounded_json import MIB, BadFile, children, read_json
from .config_check import check_config, check_end_tokens, code_field
from .tokenizer_check import check_template, check_template_file, check_tokenizer

MAX_FILES = 10_000
MAX_SHARDS = 4096

_CODE = {
    ".py": "Python code", ".pyc": "compiled Python code", ".pyd": "machine code", ".so": "machine code",
    ".dylib": "machine code", ".dll": "machine code", ".bin": "a pickle, which can run code",
    ".pt": "a pickle, which can run code", ".pth": "a pickle, which can run code",
    ".ckpt": "a pickle, which can run code", ".pkl": "a pickle, which can run code",
    ".pickle": "a pickle, which can run code", ".joblib": "a pickle, which can run code",
}  # fmt: skip
_SUFFIX_LIMITS = {
    ".json": 64 * MIB, ".jinja": MIB, ".model": 64 * MIB, ".tiktoken": 64 * MIB, ".txt": 64 * MIB,
    ".safetensors": None,
}  # fmt: skip
_READ_AS_JSON = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "hf_quant_config.json", "chat_template.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "feature_extractor_config.json",
)  # fmt: skip
_INDEX = "model.safetensors.index.json"


def check_folder(model: str, folder: Path) -> dict[str, Any]:
    """Check every file by its name, kind and size, and those with settings by what they say.

    Return config.json. Weights have been seen by name only; `weight_facts` looks into them.

    Raises:
        UnsafeModel: a file or field could make a library run code, or a link leads out of the folder.
        InvalidModel: something is missing, damaged or too large.
        OSError: the folder cannot be read.
    """
    names = _check_files(model, folder)
    if "config.json" not in names:
        raise InvalidModel(
            model, "the folder has no config.json; name the folder that holds the model's files"
        )
    if not any(is_weight_file(name) for name in names):
        raise InvalidModel(model, "the folder has no model*.safetensors; other weight formats are not loaded")
    try:
        settings = {name: read_json(folder / name) for name in _READ_AS_JSON if name in names}
        index = read_json(folder / _INDEX, 64 * MIB) if _INDEX in names else {}
        if "tokenizer.json" in names:
            check_tokenizer(folder / "tokenizer.json")
        if "chat_template.jinja" in names:
            check_template_file(folder / "chat_template.jinja")
        check_template(settings.get("tokenizer_config.json", {}))
    except BadFile as error:
        raise InvalidModel(model, str(error)) from None
    for name, value in settings.items():
        check_end_tokens(model, name, value)
        if (field := code_field(value)) is not None:
            raise UnsafeModel(model, f"its {name} has the field {field!r}, which asks for code to be run")
    _check_index(model, index, names)
    check_config(model, settings["config.json"])
    return settings["config.json"]


def is_weight_file(name: str) -> bool:
    """Tell whether mlx-lm would read weights from a file of this name."""
    return name.startswith("model") and name.endswith(".safetensors")


def read_by_loading(name: str) -> bool:
    """Tell whether loading a model may open a file of this name."""
    return Path(name).suffix.lower() in _SUFFIX_LIMITS


def _check_files(model: str, folder: Path) -> set[str]:
    roots = _allowed_roots(folder)
    names: set[str] = set()
    shards = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            names.add(entry.name)
            shards += is_weight_file(entry.name)
            if len(names) > MAX_FILES or shards > MAX_SHARDS:
                raise InvalidModel(model, f"it has more than {MAX_FILES} files or {MAX_SHARDS} shards")
            _check_file(model, entry, roots)
    return names


def _check_file(model: str, entry: "os.DirEntry[str]", roots: list[Path]) -> None:
    shown = ascii(entry.name[:100])
    suffix = Path(entry.name).suffix.lower()
    if entry.is_symlink() and not any(map(_target(entry).is_relative_to, roots)):
        raise UnsafeModel(model, f"its {shown} is a link that leads out of the folder; put a copy there")
    try:
        status = entry.stat()
    except OSError:
        raise InvalidModel(model, f"its {shown} is a link that leads nowhere") from None
    if stat.S_ISDIR(status.st_mode):
        if suffix in _SUFFIX_LIMITS:
            raise InvalidModel(model, f"its {shown} is a folder, not a file")
        return
    if not stat.S_ISREG(status.st_mode):
        raise InvalidModel(model, f"its {shown} is not an ordinary file")
    if suffix in _CODE:
        raise UnsafeModel(model, f"its {shown} is {_CODE[suffix]}; move that file elsewhere")
    limit = _SUFFIX_LIMITS.get(suffix)
    if limit is not None and status.st_size > limit:
        raise InvalidModel(model, f"its {shown} is too large: more than {limit // MIB} MiB")


def _target(link: "os.DirEntry[str]") -> Path:
    # Unlike Path.resolve it takes links that lead to themselves.
    return Path(os.path.realpath(link.path))


def _allowed_roots(folder: Path) -> list[Path]:
    """Return what links in a folder may lead to: itself; in a hub's cache, where that keeps the contents."""
    folder = folder.resolve()
    repository = folder.parent.parent
    if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [repository, repository.parent / "blobs"]
    return [folder]


def _check_index(model: str, index: dict[str, Any], names: set[str]) -> None:
    for file in {str(value) for value in children(index.get("weight_map"))}:
        if "/" in file or "\\" in file or file in (".", ".."):
            raise UnsafeModel(model, f"its {_INDEX} names a file outside the folder")
        if file not in names:
            raise InvalidModel(model, f"its {_INDEX} names {file[:100]!a}, which is missing")
