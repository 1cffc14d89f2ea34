"""The sequences of one model: prefill of those that have come, decode of those that are ready.

One step hands the device a decode step of every batch and a chunk of prefill, then reads the tokens that the
decode step before gave. Sequences join and leave between steps. Whatever fails, fails for as few as possible:
the sequences of a batch that raised begin again from their tokens, each alone until it has proved itself.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten  # pyright: ignore[reportUnknownVariableType]

from mlx_sidecar.protocol.errors import GenerationFailed, InternalError, SidecarError

from .adapters import Adapters, AdapterWeights
from .chunks import chunks_for
from .compiled_step import PlainStep
from .decode import Chosen, DecodeBatch
from .device import DeviceLost, device_works, is_out_of_memory
from .footprint import footprint
from .pace import LEAST_TOKENS
from .prefill import Prefill, next_together
from .rows import plain_only
from .self_check import SharingCheck, Step, fastest_step
from .sequence import BatchReport, Emission, FinishReason, Sequence

log = logging.getLogger("engine")

_NOT_NUMBERS = "the model computed something that is not a number"
_CHANGE_THE_REQUEST = "Change the request; if others fail in the same way, the model's weights are damaged"
_NO_MEMORY = "the device had no memory left, even with nothing beside it"
_ASK_FOR_LESS = "Shorten the prompt, unload a model, or give the sidecar a smaller memory budget"


class ModelBatch:
    """Runs sequences of one model; see `Batch`. Inference thread only."""

    def __init__(self, model: Any, *, prefill_chunk_tokens: int) -> None:
        self.model = model
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.prefilled = 0
        self.adapters = Adapters(model)
        self._step, self.why_not_compiled = fastest_step(model)
        # Compiled steps know nothing of what is beside the model's own weights.
        self._adapted_step = PlainStep(model) if self.why_not_compiled is None else self._step
        self._plain = plain_only(model)
        self.chunks = chunks_for(prefill_chunk_tokens, plain=self._plain)
        self.pace = self.chunks.pace()
        self._live: set[Sequence] = set()
        self._suspects: set[Sequence] = set()
        self._waiting: deque[Sequence] = deque()
        self._prefills: deque[Prefill] = deque()
        self._decoding: list[DecodeBatch] = []
        self._ending: list[DecodeBatch] = []
        self._emissions: list[Emission] = []
        self._dispatched_prompt = 0
        self._why_alone: str | None = None
        self._check: SharingCheck | None = SharingCheck(model)
        weights_bytes = sum(array.nbytes for _, array in _arrays(model))
        # Another batch would be another pass over the weights. Padding is dearer than that: it is masked.
        self._most_padding = weights_bytes // 4
        self.footprint = footprint(model, weights_bytes, self.chunks.most_together, self._most_padding)

    def __len__(self) -> int:
        return len(self._live)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in; its prefill begins in the next step.

        Raises:
            ValueError: the model has no adapter of the name that the sequence wants.
        """
        if sequence.adapter not in self.adapters:
            raise ValueError(f"there is no adapter {sequence.adapter!r}")
        self._live.add(sequence)
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Drop a sequence and, in the next step, its share of the caches; return whether it was here."""
        if sequence not in self._live:
            return False
        self._forget(sequence)
        return True

    def reset(self) -> list[Sequence]:
        """Drop every sequence and its memory, and return those that had not ended."""
        left = list(self._live)
        self._live.clear()
        self._drop_all()
        return left

    def step(self) -> list[Emission]:
        """Decode one token of every sequence that is ready, and prefill a chunk of the others.

        Raises:
            DeviceLost: nothing can be computed any more.
        """
        began = time.monotonic()
        self._settle()
        if self.chunks.come_first:
            self.prefilled = self._prefill()
            decoding = self._decode()
        else:
            decoding = self._decode()
            # What is read now is behind the chunk of the step before.
            self.prefilled, self._dispatched_prompt = self._dispatched_prompt, self._prefill()
        for batch in [*self._ending, *self._decoding]:
            self._guarded(batch, lambda batch=batch: self._read(batch))
        self._ending.clear()
        if self.prefilled or not self._dispatched_prompt:
            self.pace.note(time.monotonic() - began, self.prefilled, decoding=decoding)
        emissions, self._emissions = self._emissions, []
        if not self._live:
            self._drop_all()
        return emissions

    def prepare(self) -> bool:
        """Do a little of what the first company would wait for; return whether there is more."""
        if self._check is not None and not self._check.advance():
            self._check_sharing()
        return self._check is not None

    def check_adapter(self, weights: AdapterWeights) -> None:
        """Raise AdapterError, fit for a client, if this cannot be an adapter of the model; cheap."""
        self.adapters.check(weights)

    def attach_adapter(self, name: str, weights: AdapterWeights) -> None:
        """Let sequences run with an adapter from now on; those that run do not notice.

        Raises:
            AdapterError: it does not fit the model.
            ValueError: there is one of that name.
        """
        self.adapters.attach(name, weights)

    def detach_adapter(self, name: str) -> None:
        """Give an adapter's memory back.

        Raises:
            ValueError: there is none of that name, or a sequence that has not ended has it.
        """
        if any(sequence.adapter == name for sequence in self._live):
            raise ValueError(f"the adapter {name!r} is in use")
        self.adapters.detach(name)

    def report(self) -> BatchReport:
        """Return what is being done; any thread may ask."""
        running = sum(len(batch.sequences) for batch in list(self._decoding))
        return BatchReport(
            prefilling=max(len(self._live) - running, 0),
            running=running,
            groups=len(self._decoding),
            why_alone=self._why_alone,
            why_not_compiled=self.why_not_compiled,
            adapters=self.adapters.report,
        )

    def _decode(self) -> bool:
        self._join()
        for batch in list(self._decoding):
            self._guarded(batch, lambda batch=batch: self._dispatch(batch))
        return bool(self._decoding)

    def _dispatch(self, batch: DecodeBatch) -> None:
        batch.arrange()
        with self.adapters.of(batch.slots):
            batch.dispatch()

    def _settle(self) -> None:
        for batch in list(self._decoding):
            self._guarded(batch, lambda batch=batch: self._settle_one(batch))
        self._prefills = deque(
            prefill for prefill in self._prefills if not self._live.isdisjoint(prefill.sequences)
        )

    def _settle_one(self, batch: DecodeBatch) -> None:
        if not batch.settle(self._live):
            self._decoding.remove(batch)
            if batch.awaits(self._live):
                self._ending.append(batch)

    def _join(self) -> None:
        """Bring batches together where one pass over the weights costs more than the padding between them."""
        joined: list[DecodeBatch] = []
        if len(self._decoding) > 1:
            self._check_sharing()
        for batch in self._decoding:
            host = None if self._alone(batch) else next((b for b in joined if self._fit(b, batch)), None)
            if host is None:
                joined.append(batch)
                continue
            try:
                host.join(batch)
            except Exception as error:
                log.exception("sequences of a model could not be put together; from now on each runs alone")
                self._why_alone = "its caches cannot be put together"
                joined.remove(host)
                self._recover([*host.sequences, *batch.sequences], error)
        self._decoding = joined

    def _check_sharing(self) -> None:
        if self._check is not None:
            self._why_alone, self._check = self._check.why_alone(), None

    def _alone(self, batch: DecodeBatch) -> bool:
        return self._why_alone is not None or not self._suspects.isdisjoint(batch.sequences)

    def _fit(self, host: DecodeBatch, batch: DecodeBatch) -> bool:
        if self._alone(host) or host.step is not batch.step or host.rows.empty or batch.rows.empty:
            return False
        return host.rows.padding_bytes_with(batch.rows) <= self._most_padding

    def _came_together(self) -> bool:
        """Return whether whoever is prefilled next was there before those who decode said anything."""
        first = [*self._waiting, *(sequence for prefill in self._prefills for sequence in prefill.sequences)]
        came_at = min((sequence.submitted_at for sequence in first), default=0.0)
        return not any(
            sequence.first_token_at is not None and sequence.first_token_at < came_at
            for batch in self._decoding
            for sequence in batch.sequences
        )

    def _prefill(self) -> int:
        tokens = self.pace.tokens(decoding=bool(self._decoding), together=self._came_together())
        spent = 0
        # A small rest of the budget would be a chunk that costs a pass over the weights.
        while (spent == 0 or tokens - spent >= LEAST_TOKENS) and (
            prefill := self._next_prefill()
        ) is not None:
            spent += (
                self._guarded(prefill, lambda p=prefill, most=tokens - spent: self._advance(p, most)) or 0
            )
            if prefill in self._prefills:
                break  # The next turn may be another's.
        return spent

    def _advance(self, prefill: Prefill, most: int) -> int:
        with self.adapters.of(prefill.sequences):
            done = prefill.advance(most) if prefill.remaining else 0
        if prefill.remaining and any(other.remaining < prefill.remaining for other in self._prefills):
            # A long prompt does not hold up the short ones behind it, but among equals the first ends first.
            self._prefills.append(prefill)
        elif prefill.remaining:
            self._prefills.appendleft(prefill)
        else:
            step = self._step_for(prefill.sequences[0])
            self._decoding.append(DecodeBatch(step, prefill.sequences, prefill.finish()))
        return done

    def _step_for(self, sequence: Sequence) -> Step:
        return self._step if sequence.adapter is None else self._adapted_step

    def _next_prefill(self) -> Prefill | None:
        while self._waiting:
            self._prefills.append(self._begin())
        return self._prefills.popleft() if self._prefills else None

    def _begin(self) -> Prefill:
        if len(self._waiting) > 1:
            self._check_sharing()
        step = self._step_for(self._waiting[0])
        together = self._plain and self._why_alone is None and self._waiting[0] not in self._suspects
        most = self.chunks.most_together if together else 0
        any_number = not self.chunks.shapes
        apart = {sequence for sequence in self._waiting if self._step_for(sequence) is not step}
        sequences = next_together(self._waiting, most, self._suspects | apart, any_number=any_number)
        return Prefill(self.model, sequences, self.chunks)

    def _read(self, batch: DecodeBatch) -> None:
        for chosen in batch.read(last=self.chunks.come_first and self._urgent(batch)):
            if chosen.sequence in self._live:
                self._take(chosen)

    def _urgent(self, batch: DecodeBatch) -> bool:
        """Return whether tokens would come late if they were read behind the next step."""
        if self._waiting or self._prefills:
            return True  # That step is behind a chunk.
        return any(sequence.first_token_at is None for sequence in batch.sequences)

    def _take(self, chosen: Chosen) -> None:
        sequence, token = chosen.sequence, chosen.token
        if not chosen.usable:
            self._end(sequence, "failed", GenerationFailed(_NOT_NUMBERS, _CHANGE_THE_REQUEST))
            return
        self._suspects.discard(sequence)
        if sequence.first_token_at is None:
            sequence.first_token_at = time.monotonic()
        if token in sequence.stop_token_ids:
            self._end(sequence, "stop")
            return
        sequence.tokens.append(token)
        if len(sequence.tokens) == sequence.max_tokens:
            self._end(sequence, "length", chosen=chosen)
        else:
            self._emissions.append(Emission(sequence, token, None, chosen.log_probs))

    def _end(
        self,
        sequence: Sequence,
        finish: FinishReason,
        failure: SidecarError | None = None,
        chosen: Chosen | None = None,
    ) -> None:
        sequence.finished_at = time.monotonic()
        sequence.failure = failure
        self._forget(sequence)
        token, log_probs = (chosen.token, chosen.log_probs) if chosen else (None, None)
        self._emissions.append(Emission(sequence, token, finish, log_probs))

    def _guarded(self, group: "DecodeBatch | Prefill", work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:
            log.exception("a step failed; its sequences begin again from their tokens")
            self._decoding = [batch for batch in self._decoding if batch is not group]
            self._recover(group.sequences, error)
            return None

    def _recover(self, sequences: list[Sequence], error: Exception) -> None:
        if not device_works():
            raise DeviceLost from error
        no_memory = is_out_of_memory(error)
        if no_memory:
            mx.clear_cache()
        live = [sequence for sequence in sequences if sequence in self._live]
        if len(sequences) == 1:
            failure = GenerationFailed(_NO_MEMORY, _ASK_FOR_LESS) if no_memory else InternalError()
            for sequence in live:
                self._end(sequence, "failed", failure)
            return
        self._suspects.update(live)
        self._waiting.extendleft(reversed(live))

    def _forget(self, sequence: Sequence) -> None:
        self._live.discard(sequence)
        self._suspects.discard(sequence)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if not self._live:
            self._drop_all()

    def _drop_all(self) -> None:
        self._suspects.clear()
        self._waiting.clear()
        self._prefills.clear()
        self._decoding.clear()
        self._ending.clear()


def _arrays(model: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(model.parameters())
    return flat
