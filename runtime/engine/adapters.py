"""The adapters of one model: they come and go while its sequences run, and each row of a batch has its own.

The first adapter that changes a layer puts an `AdaptedLinear` in its place, the last one puts the layer back.
An adapter keeps its slot for as long as it is there, so that what runs does not notice the others.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import mlx.core as mx

from .adapted_linear import AdaptedLinear, LowRank, RowSlots, Stack, sizes, stacked
from .rows import Rows
from .sequence import AdapterReport, Sequence

_TRIED_LENGTHS = (3, 1)
"""Of a chunk of prefill, and of a decode step: a model may have different code for them."""


class AdapterError(ValueError):
    """This cannot be an adapter of the model; the message is fit for a client."""


@dataclass(frozen=True)
class AdapterWeights:
    """What an adapter adds to layers, by their paths in a model; evaluated, so that it may cross threads."""

    layers: dict[str, LowRank]

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(array.nbytes for part in self.layers.values() for array in part)


class _Place(NamedTuple):
    """Where a layer hangs in the model's tree, and what hangs there."""

    parent: Any
    key: Any
    module: Any


class Adapters:
    """What adapters add to one model, and which row has which. Inference thread only, but for `report`."""

    def __init__(self, model: Any) -> None:
        self.report: tuple[AdapterReport, ...] = ()
        self._model = model
        self._rows = RowSlots()
        # Slot 0 has nothing: it is that of rows without an adapter.
        self._slots: dict[str | None, int] = {None: 0}
        self._layers: dict[str, AdaptedLinear] = {}

    def __contains__(self, name: str | None) -> bool:
        return name in self._slots

    @property
    def nbytes(self) -> int:
        """Bytes of all stacks: what the adapters have beside the model's weights."""
        return sum(layer.stack.nbytes for layer in self._layers.values())

    @contextmanager
    def of(self, sequences: Iterable[Sequence | None]) -> Generator[None]:
        """Give each row of the forward passes that are built in the block the adapter of its sequence.

        A row without a sequence has none; nor has one whose sequence has ended and whose adapter is gone.
        """
        slots = [self._slots.get(sequence.adapter, 0) if sequence else 0 for sequence in sequences]
        with self._given(slots):
            yield

    def check(self, weights: AdapterWeights) -> None:
        """Compare every matrix with the layer that it is for.

        Raises:
            AdapterError: the model has no such layer, or one of another size.
        """
        paths = {id(layer.linear): path for path, layer in self._layers.items()}
        for path, part in weights.layers.items():
            place = self._place(path)
            if place is None:
                raise AdapterError(f"the model has no layer {path!r}")
            linear = _unadapted(place.module)
            if (other := paths.setdefault(id(linear), path)) != path:
                raise AdapterError(f"layers {other!r} and {path!r} of the model are one and the same")
            found, expected = (part.a.shape[1], part.b.shape[1]), sizes(linear)
            if expected is None:
                kind = type(place.module).__name__
                raise AdapterError(f"layer {path!r} is of kind {kind}; adapters are for linear layers only")
            if found != expected:
                raise AdapterError(
                    f"layer {path!r} takes {expected[0]} numbers and gives {expected[1]}, "
                    f"but the adapter is for one that takes {found[0]} and gives {found[1]}"
                )

    def attach(self, name: str, weights: AdapterWeights) -> None:
        """Take an adapter in, all of it or nothing.

        Raises:
            AdapterError: it does not fit the model.
            ValueError: there is one of that name.
        """
        if name in self._slots:
            raise ValueError(f"there is an adapter {name!r} already")
        self.check(weights)
        slot = min(set(range(len(self._slots) + 1)) - set(self._slots.values()))
        wanted = {path: layer.stack.parts() for path, layer in self._layers.items()}
        for path, part in weights.layers.items():
            wanted[path] = {**wanted.get(path, {}), slot: part}
        self._arrange({**self._slots, name: slot}, wanted)
        try:
            self._try_out(slot)
        except Exception as error:
            self.detach(name)
            raise AdapterError("the code of this model does not take adapters in these layers") from error

    def detach(self, name: str) -> None:
        """Forget an adapter and give its memory back. No sequence that has not ended may have it.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self._slots:
            raise ValueError(f"there is no adapter {name!r}")
        slots = {other: slot for other, slot in self._slots.items() if other != name}
        gone = self._slots[name]
        self._arrange(
            slots,
            {
                path: {slot: part for slot, part in layer.stack.parts().items() if slot != gone}
                for path, layer in self._layers.items()
            },
        )

    def _arrange(self, slots: dict[str | None, int], wanted: dict[str, dict[int, LowRank]]) -> None:
        """Make the stacks that are wanted, and only then touch the model."""
        count, before = max(slots.values()) + 1, max(self._slots.values()) + 1
        stacks: dict[str, Stack] = {}
        for path, parts in wanted.items():
            present = self._layers.get(path)
            if parts and (present is None or count != before or present.stack.ranks.keys() != parts.keys()):
                stacks[path] = stacked(parts, count, self._linear(path))
        mx.eval([(stack.a, stack.b) for stack in stacks.values()])
        for path, parts in wanted.items():
            if not parts:
                self._put(path, self._layers.pop(path).linear)
            elif path in self._layers:
                self._layers[path].stack = stacks.get(path, self._layers[path].stack)
            else:
                self._layers[path] = AdaptedLinear(self._linear(path), self._rows, stacks[path])
                self._put(path, self._layers[path])
        self._slots = slots
        self.report = tuple(self._report(name, slot) for name, slot in slots.items() if name is not None)

    def _try_out(self, slot: int) -> None:
        """Have the model's code build its graph with the adapter in two rows; nothing is computed."""
        rows = Rows(self._model)
        with self._given([slot, slot]):
            for length in _TRIED_LENGTHS:
                self._model(mx.zeros((2, length), mx.int32), cache=rows.layers)

    @contextmanager
    def _given(self, slots: list[int]) -> Generator[None]:
        self._rows.slots = mx.array(slots, mx.uint32) if any(slots) else None
        try:
            yield
        finally:
            self._rows.slots = None

    def _report(self, name: str, slot: int) -> AdapterReport:
        stacks = [layer.stack for layer in self._layers.values() if slot in layer.stack.ranks]
        # The zeros are everybody's: all reports together are all bytes.
        nbytes = sum(stack.nbytes // len(stack.ranks) for stack in stacks)
        return AdapterReport(name, nbytes, max(stack.ranks[slot] for stack in stacks))

    def _place(self, path: str) -> _Place | None:
        place = _Place(None, None, self._model)
        for part in path.split("."):
            parent: Any = place.module
            # Keys as written only, or a layer would have several paths.
            keys = {str(key): key for key in _keys(parent)}
            if part not in keys:
                return None
            place = _Place(parent, keys[part], parent[keys[part]])
        return place

    def _linear(self, path: str) -> Any:
        return _unadapted(cast(_Place, self._place(path)).module)

    def _put(self, path: str, module: Any) -> None:
        parent, key, _ = cast(_Place, self._place(path))
        parent[key] = module


def _keys(module: Any) -> Iterable[Any]:
    if isinstance(module, AdaptedLinear):
        return ()  # What is inside an adapted layer is not the model's.
    if isinstance(module, list):
        return range(len(cast("list[Any]", module)))
    return cast("dict[str, Any]", module) if isinstance(module, dict) else ()


def _unadapted(module: Any) -> Any:
    return module.linear if isinstance(module, AdaptedLinear) else module
