"""What runs the sequences of one model, as the inference thread sees it."""

from typing import TYPE_CHECKING, Protocol

from ..scheduling.memory import Footprint
from .sequence import BatchReport, Emission, Sequence

if TYPE_CHECKING:
    from .adapters import AdapterWeights


class Batch(Protocol):
    """A set of sequences that advance together, one token a step. Used on the inference thread only."""

    def __len__(self) -> int:
        """Return the number of sequences that wait, prefill or decode."""
        ...

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in; it starts as soon as there is room."""
        ...

    def remove(self, sequence: Sequence) -> bool:
        """Drop a sequence and its KV cache; return whether it was here."""
        ...

    def step(self) -> list[Emission]:
        """Decode one token of every running sequence and prefill one chunk of a waiting one."""
        ...

    def prepare(self) -> bool:
        """Do a little of what would hold up the first sequences; return whether there is more to do."""
        ...

    def reset(self) -> list[Sequence]:
        """Drop every sequence and its memory, and return those that had not ended."""
        ...

    def attach_adapter(self, name: str, weights: "AdapterWeights") -> None:
        """Let sequences run with an adapter from now on.

        Raises:
            AdapterError: it does not fit the model.
        """
        ...

    def detach_adapter(self, name: str) -> None:
        """Give an adapter's memory back; nobody may be using it."""
        ...

    def report(self) -> BatchReport:
        """Return what is being done; any thread may ask."""
        ...

    @property
    def footprint(self) -> Footprint:
        """What the model and its sequences take."""
        ...

    @property
    def prefill_chunk_tokens(self) -> int:
        """The most prompt tokens that one step takes."""
        ...

    @property
    def prefilled(self) -> int:
        """The prompt tokens that the last step waited for."""
        ...
