"""Model folder -> network in memory, evaluated. Runs on the loader thread, beside whoever decodes."""

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.utils as tree
import mlx_lm.utils as mlx_lm
from mlx import nn

from mlx_sidecar.protocol.messages import DtypeRequest

from ..engine.device import is_out_of_memory
from ..engine.rows import Rows
from .precision import DOES_NOT_RUN, choose_dtype

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_PIECE_BYTES = 32 * 1024 * 1024


class Loaded(NamedTuple):
    """How far a load is."""

    done_bytes: int
    total_bytes: int
    tensors: int
    total_tensors: int


OnPiece = Callable[[Loaded], None]
"""Called between two pieces; what it raises ends the load."""


@dataclass
class Network:
    """A model in memory. `dtype` is what its weights are now; `reason` why, when not as stored."""

    module: nn.Module
    dtype: str
    reason: str | None
    parameters: int
    context_length: int
    vocabulary: int
    nbytes: int
    load_ms: float


class LoadError(Exception):
    """The folder is not a model that can be loaded; the message is fit for a client."""


def load_network(
    folder: Path, dtype: DtypeRequest, device: str, on_piece: OnPiece = lambda _: None
) -> Network:
    """Read the weights, convert them if asked or wise, and evaluate every array of the network.

    What was evaluated may be used on any thread; a graph only where it was made.

    Raises:
        LoadError: the folder's files are damaged or of a kind that is not supported.
        MemoryError: the device has no memory left.
    """
    began = time.monotonic()
    try:
        loaded = cast(Any, mlx_lm.load_model(folder, lazy=True))
    except Exception as error:
        raise LoadError(_explain(error)) from error
    module, config = loaded
    context_length, vocabulary = _sizes(config)
    stored = _stored_dtype(module)
    wanted, reason = choose_dtype(dtype, stored, device)
    if wanted != stored:
        module = _convert(module, _DTYPES[wanted])
    _evaluate(module, on_piece)
    if device == "cpu":
        # A first pass takes longer than those to come; elsewhere the engine's warm-up is for that.
        _run_once(module)
    mx.eval(list(_all_arrays(module)))
    return Network(
        module=module,
        dtype=wanted,
        reason=reason,
        parameters=_count(module),
        context_length=context_length,
        vocabulary=vocabulary,
        nbytes=sum(array.nbytes for _, array in _arrays(module)),
        load_ms=(time.monotonic() - began) * 1000,
    )


def _run_once(module: Any) -> None:
    try:
        mx.eval(module(mx.array([[0]]), cache=Rows(module).layers))
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError from None
        raise LoadError(DOES_NOT_RUN) from error


def _count(module: Any) -> int:
    """Return the number of weights; mlx-lm leaves out those of modules that have others inside."""
    leaves: Any = tree.tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module)
    inside = {id(array) for _, leaf in leaves for _, array in _arrays(leaf)}
    outside = sum(array.size for _, array in _arrays(module) if id(array) not in inside)
    return cast(int, mlx_lm.get_total_parameters(module)) + outside


def _evaluate(module: nn.Module, on_piece: OnPiece) -> None:
    arrays = [array for _, array in _arrays(module)]
    total = sum(array.nbytes for array in arrays)
    done = tensors = 0
    for piece in _pieces(arrays):
        on_piece(Loaded(done, total, tensors, len(arrays)))
        try:
            mx.eval(piece)
        except Exception as error:
            if is_out_of_memory(error):
                raise MemoryError from None
            raise LoadError("its weight files are damaged or incomplete") from error
        done += sum(array.nbytes for array in piece)
        tensors += len(piece)
    on_piece(Loaded(done, total, tensors, len(arrays)))


def _pieces(arrays: list[mx.array]) -> Iterator[list[mx.array]]:
    piece: list[mx.array] = []
    size = 0
    for array in arrays:
        piece.append(array)
        size += array.nbytes
        if size >= _PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _all_arrays(root: object) -> Iterator[mx.array]:
    """Yield every array that a network holds in whatever way: rotary tables, for one, are no parameters."""
    seen: set[int] = set()
    pending: list[object] = [root]
    while pending:
        found = pending.pop()
        if id(found) in seen or isinstance(found, type | ModuleType | str | bytes | int | float | None):
            continue
        seen.add(id(found))
        if isinstance(found, mx.array):
            yield found
        pending += _held_by(found)


def _held_by(found: Any) -> list[Any]:
    held: list[Any] = []
    if isinstance(found, dict):
        held += cast("dict[Any, Any]", found).values()
    elif isinstance(found, list | tuple | set):
        held += cast("list[Any]", found)
    elif isinstance(found, FunctionType):
        held += inspect.getclosurevars(found).nonlocals.values()
    attributes: Any = getattr(cast(Any, found), "__dict__", {})
    return held + list(attributes.values())


def _sizes(config: dict[str, Any]) -> tuple[int, int]:
    """Return context length and vocabulary; multimodal models keep them in a config within the config."""
    inner = config.get("text_config")
    facts = (cast(dict[str, Any], inner) if isinstance(inner, dict) else {}) | config
    context = facts.get("max_position_embeddings") or facts.get("max_sequence_length")
    vocabulary = facts.get("vocab_size")
    if not isinstance(context, int) or not isinstance(vocabulary, int) or min(context, vocabulary) < 1:
        raise LoadError("its config.json does not give max_position_embeddings and vocab_size as integers")
    return context, vocabulary


def _stored_dtype(module: Any) -> str:
    """Return "float16" and the like, or "4-bit" for quantized weights, by what most weights are."""
    bits = {
        layer.bits for _, layer in module.named_modules() if isinstance(getattr(layer, "bits", None), int)
    }
    if bits:
        return f"{min(bits)}-bit"
    sizes: dict[str, int] = {}
    for _, array in _arrays(module):
        name = str(array.dtype).removeprefix("mlx.core.")
        sizes[name] = sizes.get(name, 0) + array.size
    return max(sizes, key=lambda name: sizes[name])


def _convert(module: Any, dtype: mx.Dtype) -> nn.Module:
    def convert(array: mx.array) -> mx.array:
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array

    # Scales first: unpacking with float32 scales rounds once, and is five times faster on a CPU.
    module.update(tree.tree_map(convert, module.parameters()))
    return mlx_lm.dequantize_model(module)


def _arrays(module: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree.tree_flatten(module.parameters())
    return flat


def _explain(error: Exception) -> str:
    """Say what is wrong without the library's words, which may hold paths."""
    if isinstance(error, FileNotFoundError):
        return "the folder has no model*.safetensors"
    if isinstance(error, ValueError) and "not supported" in str(error):
        return "its architecture is not one that mlx-lm knows"
    if isinstance(error, ValueError) and "custom module" in str(error):
        return "it wants to run code of its own, which is never done"
    return "its config.json and its weights do not fit together, or are damaged"
