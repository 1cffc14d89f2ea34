"""The header of a GGUF file: metadata and the list of tensors, read with every size checked.

The layout is that of the GGUF specification, versions 2 and 3, little endian. Tensor data is not read here.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

MAX_TENSORS = 65_536
MAX_METADATA = 65_536
MAX_ARRAY_ITEMS = 4_000_000
MAX_STRING_BYTES = 16 * 1024 * 1024
MAX_NAME_BYTES = 64  # GGML's own limit for the name of a tensor

# GGML type number -> (name, values per block, bytes per block); the ones the import can carry over in full.
READABLE_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
}
_OTHER_TYPE_NAMES = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_STRING, _ARRAY, _FLOAT64 = 8, 9, 12


class GgufError(Exception):
    """The file cannot be imported; the message says why in words fit for a person."""


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table. `shape` is slowest dimension first, as arrays print it."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """All that a file says about itself. `data_start` is the byte where tensor offsets count from."""

    metadata: dict[str, Any]
    tensors: list[GgufTensor]
    data_start: int


def read_header(path: Path) -> GgufHeader:
    """Return the header of the file at `path`.

    Raises:
        GgufError: not GGUF, out of bounds, or a tensor of a type that cannot be carried over.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file, size)
        if reader.take(4) != b"GGUF":
            raise GgufError("this is not a GGUF file")
        version = reader.scalar("I")
        if version not in (2, 3):
            raise GgufError(f"GGUF version {version} is not supported, only 2 and 3")
        tensor_count = reader.bounded("Q", MAX_TENSORS, "tensors")
        metadata_count = reader.bounded("Q", MAX_METADATA, "metadata entries")
        metadata = {reader.string(): reader.value(reader.scalar("I")) for _ in range(metadata_count)}
        if len(metadata) != metadata_count:
            raise GgufError("two metadata entries have the same name")
        tensors = [_tensor(reader) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise GgufError("general.alignment makes no sense")
        data_start = -(-file.tell() // alignment) * alignment
    for tensor in tensors:
        if data_start + tensor.offset + tensor.nbytes > size:
            raise GgufError(f"the file ends before the data of tensor {tensor.name!r}: it is incomplete")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise GgufError("two tensors have the same name")
    return GgufHeader(metadata, tensors, data_start)


def _tensor(reader: "_Reader") -> GgufTensor:
    name = reader.string(MAX_NAME_BYTES)
    dimensions = reader.bounded("I", 8, "dimensions")
    shape = tuple(reader.scalar("Q") for _ in range(dimensions))[::-1]
    number = reader.scalar("I")
    offset = reader.scalar("Q")
    if number not in READABLE_TYPES:
        kind = _OTHER_TYPE_NAMES.get(number, f"number {number}")
        readable = ", ".join(entry[0] for entry in READABLE_TYPES.values())
        raise GgufError(
            f"tensor {name!r} has type {kind}, which cannot be carried over without loss. "
            f"Types that can: {readable}"
        )
    kind, block, block_bytes = READABLE_TYPES[number]
    if not shape or not all(shape) or shape[-1] % block or prod(shape) > 1 << 48:
        raise GgufError(f"tensor {name!r} has shape {shape}, which does not fit its type {kind}")
    return GgufTensor(name, shape, kind, offset, prod(shape) // block * block_bytes)


class _Reader:
    """Takes typed values off a file and never more bytes than the file has left."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def take(self, count: int) -> bytes:
        if count > self._left:
            raise GgufError("the file ends inside its header: it is incomplete")
        self._left -= count
        return self._file.read(count)

    def scalar(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack(self.take(layout.size))[0]

    def bounded(self, code: str, limit: int, what: str) -> int:
        count: int = self.scalar(code)
        if count > limit:
            raise GgufError(f"the header claims {count} {what}; the limit is {limit}")
        return count

    def string(self, limit: int = MAX_STRING_BYTES) -> str:
        length = self.bounded("Q", limit, "bytes in a string")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _FLOAT64:
            # MLX's reader takes four of its eight bytes, and all that follows for something else.
            raise GgufError("the metadata has a number of type float64, which MLX cannot read")
        if kind != _ARRAY:
            raise GgufError(f"the metadata has a value of unknown type {kind}")
        item_kind = self.scalar("I")
        count = self.bounded("Q", MAX_ARRAY_ITEMS, "items in an array")
        if item_kind in _SCALARS:
            layout = struct.Struct(f"<{count}{_SCALARS[item_kind]}")
            return list(layout.unpack(self.take(layout.size)))
        if item_kind != _STRING:
            raise GgufError(f"the metadata has an array of items of type {item_kind}, which cannot be read")
        return [self.string() for _ in range(count)]
