"""Admission by projected memory: what runs has room to reach its full length, whatever else runs.

Projected are the weights of every model and of its adapters, what models that are being loaded will take, the
KV cache of every running sequence at its full length, and once the peak of a chunk of prefill, the largest of
the models that run. Nothing is admitted in the hope that a neighbour ends early. Bytes everywhere. Changed on
the inference thread only; whatever changes nothing may be asked on any.
"""

from typing import Generic, NamedTuple

from .item import ItemT

KV_STEP_TOKENS = 256
"""KV caches grow by this many tokens at a time, so a sequence never holds less than a multiple of it."""


class Footprint(NamedTuple):
    """What a model takes, in bytes: its weights, and what a sequence adds.

    `kv_per_token` is of the caches that grow, `kv_fixed` of those that do not (recurrent state, the window of
    sliding attention). `prefill_peak` is what a step needs at most beyond weights and caches.
    """

    weights: int
    kv_per_token: int
    kv_fixed: int
    prefill_peak: int


class MemoryReport(NamedTuple):
    """The budget at one moment, in bytes.

    `claimed_bytes` is what models will take that are being loaded, `reserved_bytes` what running sequences
    may grow to, and `kv_bytes` the caches among that, by model.
    """

    budget_bytes: int = 0
    weights_bytes: int = 0
    claimed_bytes: int = 0
    reserved_bytes: int = 0
    free_bytes: int = 0
    kv_bytes: tuple[tuple[str, int], ...] = ()


class Shortfall(NamedTuple):
    """How many bytes something lacks that is to come: `now`, and `ever`, when no sequence runs any more.

    Not above 0 if there is room. What is lacking `ever` has to be unloaded; the rest ends by itself.
    """

    now: int
    ever: int


class MemoryBudget(Generic[ItemT]):
    """Says who has room. What was reserved is never more than the budget leaves beside the weights."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._claims: dict[str, int] = {}
        self._models: dict[str, Footprint] = {}
        self._reserved: dict[ItemT, int] = {}
        self._weights_bytes = 0
        self._reserved_bytes = 0
        self._running: dict[str, tuple[int, int]] = {}

    @property
    def available_bytes(self) -> int:
        """What the models in memory, or on their way there, leave for sequences, running or not."""
        return self.budget_bytes - self._weights_bytes - sum(list(self._claims.values()))

    @property
    def is_overdrawn(self) -> bool:
        """Whether what runs takes more than is left for it, because something has a claim on it now."""
        return self._reserved_bytes + self._peak() > self.available_bytes

    def claim(self, owner: str, needed_bytes: int) -> None:
        """Keep memory for what is about to come. Nobody is admitted to it; who has it already may keep it."""
        self._claims[owner] = needed_bytes

    def release_claim(self, owner: str) -> None:
        """Give up a claim; nothing if there is none."""
        self._claims.pop(owner, None)

    def shortfall(self, needed_bytes: int) -> Shortfall:
        """Return what is lacking for so many bytes more."""
        ever = needed_bytes - self.available_bytes
        return Shortfall(ever + self._reserved_bytes + self._peak(), ever)

    def set_model(self, name: str, footprint: Footprint) -> None:
        """Count a model in. It is in memory already, so this cannot fail; nobody is admitted until it fits.

        Some who wait, for whatever model, may not be able to fit any more: ask `can_ever` again.
        """
        self.forget_model(name)
        self._weights_bytes += footprint.weights
        self._models[name] = footprint

    def forget_model(self, name: str) -> None:
        """Count a model out, after its sequences were released; nothing if it is not known."""
        if (gone := self._models.pop(name, None)) is not None:
            self._weights_bytes -= gone.weights

    def projection(self, model: str, prompt_tokens: int, max_tokens: int) -> int:
        """Return the bytes of a sequence's caches at its full length.

        Raises:
            KeyError: the model is not known.
        """
        footprint = self._models[model]
        steps = -(-(prompt_tokens + max_tokens) // KV_STEP_TOKENS)
        return footprint.kv_fixed + footprint.kv_per_token * steps * KV_STEP_TOKENS

    def needed(self, model: str, prompt_tokens: int, max_tokens: int) -> int:
        """Return the bytes that a sequence needs when nothing else runs: its caches and the peak of prefill.

        Raises:
            KeyError: the model is not known.
        """
        return self.projection(model, prompt_tokens, max_tokens) + self._models[model].prefill_peak

    def can_ever(self, model: str, prompt_tokens: int, max_tokens: int) -> bool:
        """Return whether a sequence fits beside the models in memory once nothing else runs.

        Raises:
            KeyError: the model is not known.
        """
        return self.needed(model, prompt_tokens, max_tokens) <= self.available_bytes

    def could_ever(self, model: str, prompt_tokens: int, max_tokens: int) -> bool:
        """Return whether a sequence fits beside its own model, when every other one has left memory.

        Raises:
            KeyError: the model is not known.
        """
        alone = self.budget_bytes - self._models[model].weights
        return self.needed(model, prompt_tokens, max_tokens) <= alone

    def reserve(self, item: ItemT) -> bool:
        """Return whether an item may run, and if so keep its memory until `release`; twice is once.

        Raises:
            KeyError: its model is not known.
        """
        if item in self._reserved:
            return True
        projected = self.projection(item.model, len(item.prompt), item.max_tokens)
        peak = max(self._peak(), self._models[item.model].prefill_peak)
        if self._reserved_bytes + projected + peak > self.available_bytes:
            return False
        self._reserved[item] = projected
        self._reserved_bytes += projected
        count, kv = self._running.get(item.model, (0, 0))
        self._running[item.model] = (count + 1, kv + projected)
        return True

    def release(self, item: ItemT) -> bool:
        """Give back what an item had reserved; return whether it had."""
        projected = self._reserved.pop(item, None)
        if projected is None:
            return False
        self._reserved_bytes -= projected
        count, kv = self._running.pop(item.model)
        if count > 1:
            self._running[item.model] = (count - 1, kv - projected)
        return True

    def report(self) -> MemoryReport:
        """Return the state of the budget."""
        reserved = self._reserved_bytes + self._peak()
        available = self.available_bytes
        claimed = self.budget_bytes - self._weights_bytes - available
        return MemoryReport(
            self.budget_bytes,
            self._weights_bytes,
            claimed,
            reserved,
            max(available - reserved, 0),
            tuple((name, kv) for name, (_, kv) in list(self._running.items())),
        )

    def footprint(self, model: str) -> Footprint | None:
        """Return what a model takes; None if it is not known."""
        return self._models.get(model)

    def _peak(self) -> int:
        # A copy, because another thread may be asking.
        running = [self._models.get(name) for name in list(self._running)]
        return max((model.prefill_peak for model in running if model is not None), default=0)
