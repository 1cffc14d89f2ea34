"""The weight files of a folder: what they hold, by their headers, checked before MLX sees them.

MLX's reader takes files that contradict themselves: tensors that overlap, holes, bytes behind the end, shapes
of 2^32. The reference reader of the safetensors package refuses them, so it goes first.
"""

import json
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from mlx_sidecar.protocol.errors import InvalidModel

from .bounded_json import MIB, BadFile
from .config_check import check_against_weights
from .folder_check import is_weight_file, read_by_loading
from .sources import read_config

MAX_HEADER_BYTES = 16 * MIB
MAX_TENSORS = 1_000_000
MAX_SIZE = 2**31 - 1
"""Of one dimension: MLX counts in 32 bits."""

_LENGTH = struct.Struct("<Q")
_MLX_READS = {
    *("F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "C64", "BOOL"),
    *("U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64"),
}


class Tensor(NamedTuple):
    """What a header says of one tensor; the type in the words of safetensors."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class WeightFacts(NamedTuple):
    """What the files hold together. `bytes_by_dtype` has the types in the words of safetensors."""

    tensors: int
    bytes_by_dtype: dict[str, int]
    total_bytes: int
    files: list[Path]


def weight_files(folder: Path) -> list[Path]:
    """Return the files that mlx-lm would read the weights from, in order."""
    return sorted(path for path in folder.iterdir() if is_weight_file(path.name))


def weight_facts(model: str, folder: Path) -> WeightFacts:
    """Check every header, and config.json against them; reads no data. The folder has passed `check_folder`.

    Raises:
        InvalidModel: a file is damaged or incomplete, or has what MLX cannot read or no model needs.
        OSError: a file cannot be read.
    """
    tensors = read_headers(model, folder)
    check_against_weights(
        model, read_config(model, folder), {name: tensor.shape for name, tensor in tensors.items()}
    )
    by_dtype: Counter[str] = Counter()
    for tensor in tensors.values():
        by_dtype[tensor.dtype] += tensor.nbytes
    return WeightFacts(len(tensors), dict(by_dtype), by_dtype.total(), weight_files(folder))


def read_headers(model: str, folder: Path) -> Mapping[str, Tensor]:
    """Return every tensor of the folder by its name.

    Raises:
        InvalidModel: a file is damaged or incomplete, or has what MLX cannot read or no model needs.
        OSError: a file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            for name, tensor in _read_header(path):
                if name in tensors:
                    raise BadFile(f"its weights have the tensor {name[:100]!a} twice")
                tensors[name] = tensor
        except BadFile as error:
            raise InvalidModel(model, str(error)) from None
        if len(tensors) > MAX_TENSORS:
            raise InvalidModel(model, f"its weights have more than {MAX_TENSORS} tensors")
    if not tensors:
        raise InvalidModel(model, "its weight files are empty")
    return tensors


def stamp(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return name, size, time and inode of every file that loading may read: other ones mean other content.

    Raises:
        OSError: the folder, or a file that was in it a moment ago, is gone.
    """
    with os.scandir(folder) as entries:
        stats = [(entry.name, entry.stat()) for entry in entries if read_by_loading(entry.name)]
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats))


def _read_header(path: Path) -> Iterator[tuple[str, Tensor]]:
    header = _raw_header(path)
    _ask_the_reference_reader(path)
    try:
        # The reference reader lets the last of two tensors of one name win, and so hides the first.
        members: list[tuple[str, Any]] = json.loads(header, object_pairs_hook=_Members)
    except (ValueError, RecursionError):
        raise _damaged(path) from None
    for name, member in members:
        if name == "__metadata__":
            continue
        said: dict[str, Any] = dict(member)
        begin, end = said["data_offsets"]
        tensor = Tensor(said["dtype"], tuple(said["shape"]), end - begin)
        if tensor.dtype not in _MLX_READS:
            raise BadFile(f"its {path.name} has tensors of type {tensor.dtype!a}, which MLX does not read")
        if max(tensor.shape, default=0) > MAX_SIZE:
            raise BadFile(f"its {path.name} has a tensor that is too large in one dimension")
        yield name, tensor


class _Members(list[tuple[str, Any]]):
    """The members of an object in order, two of one name included."""


def _raw_header(path: Path) -> bytes:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_LENGTH.size)
        if len(start) < _LENGTH.size:
            raise _damaged(path)
        (length,) = _LENGTH.unpack(start)
        if length > min(MAX_HEADER_BYTES, size - _LENGTH.size):
            raise _damaged(path)
        return file.read(length)


def _ask_the_reference_reader(path: Path) -> None:
    import safetensors

    try:
        with cast(Any, safetensors).safe_open(path, "numpy"):
            pass
    except safetensors.SafetensorError:
        raise _damaged(path) from None


def _damaged(path: Path) -> BadFile:
    return BadFile(f"its {path.name[:100]!a} is damaged or incomplete; bring the model again")
