"""The inference thread: commands in by one queue, emissions out once a step.

Between two steps it obeys commands and lets in whoever is next and has room.

Nothing but this thread touches MLX. It imports it, loads with it, runs it, frees with it, and clears MLX's
thread-local streams as its last act: without that the process aborts when the interpreter ends.
"""

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.native.blas import Blas
from mlx_sidecar.protocol.errors import EngineFailed, InternalError, OutOfMemory, SidecarError

from ..scheduling.admission import Admission
from ..scheduling.memory import Footprint, MemoryReport, Shortfall
from ..scheduling.waiting import WaitingReport
from ..telemetry.vitals import Vitals
from .mlx_start import start_mlx
from .sequence import BatchReport, Device, Displaced, Emission, FinishReason, MemoryUse, Sequence

if TYPE_CHECKING:
    from .batch import Batch

ResultT = TypeVar("ResultT")


class EngineReport(NamedTuple):
    """The engine at one moment."""

    steps: int
    waiting: WaitingReport
    memory: MemoryReport
    batches: dict[str, BatchReport]


Deliver = Callable[[list[Emission]], None]
OnHungry = Callable[[str, int], object]

log = logging.getLogger("engine")

_MEMORY_SECONDS = 0.1
"""How old the figures of MLX's allocator may be while there is work."""

_MOST_SEQUENCES, _MOST_SEQUENCES_ON_CPU = 256, 64
"""Of one model, decoded together, unless the settings say otherwise."""

_REST_SECONDS = 0.25
"""After so long without work models are made ready for company; who has just loaded one may ask at once."""

_LEAST_CACHED_BYTES = 32 * 1024 * 1024
"""So much MLX may always keep of unused buffers: without any each step would ask the system for memory."""

_IDLE_SECONDS = 5.0
"""After so long without work MLX's unused buffers are given back."""


class InferenceThread:
    """Runs batches of sequences, round-robin over models, and hands each step's emissions to `deliver`.

    `deliver` is called on this thread and must only pass the list on; `on_death` likewise, if the thread ends
    without having been asked to. So is `on_hungry`, with a model and the bytes that a sequence of it needs,
    when it can run only if another model leaves memory; see `refuse_hopeless`. The other methods may be
    called from any thread.
    """

    def __init__(
        self,
        deliver: Deliver,
        on_death: Callable[[BaseException], None],
        blas: Blas,
        vitals: Vitals,
        settings: Settings,
    ) -> None:
        self._vitals = vitals
        self._deliver = deliver
        self._on_death = on_death
        self._blas = blas
        self._settings = settings
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._batches: dict[str, Batch] = {}
        self._unfinished: set[Sequence] = set()
        self._admission: Admission[Sequence] = Admission(
            budget_bytes=0, most_waiting=settings.max_waiting, ageing_seconds=settings.ageing_ms / 1000
        )
        self._started: Future[Device] = Future()
        # Running, so that one waiter who gives up cannot cancel it for the others.
        self._started.set_running_or_notify_cancel()
        self._most_sequences = _MOST_SEQUENCES
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self.on_hungry: OnHungry = lambda _, __: self.refuse_hopeless()
        self._claims: list[Future[bool]] = []
        self._most_cached: int | None = None
        self.steps = 0
        self.memory = MemoryUse()
        self._memory_noted_at = 0.0

    def start(self) -> None:
        """Begin importing MLX; idempotent."""
        if self._thread.ident is None:
            self._thread.start()

    def started(self) -> "Future[Device]":
        """Return a future of the device; it fails with ImportError or RuntimeError if MLX cannot run here."""
        return self._started

    @property
    def sequences(self) -> int:
        """Sequences that wait, prefill or decode."""
        return len(self._admission) + self._running

    @property
    def _running(self) -> int:
        return sum(len(batch) for batch in list(self._batches.values()))

    def run(self, work: Callable[[], ResultT]) -> "Future[ResultT]":
        """Run `work` on this thread between two steps and return a future of its result."""
        future: Future[ResultT] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._commands.put(command)
        return future

    def attach(self, model: str, batch: "Batch") -> None:
        """Make `batch` the one that runs `model`. Call on this thread, out of `run`."""
        self._batches[model] = batch
        self._admission.open(
            model,
            batch.footprint,
            most_rows=self._settings.max_sequences or self._most_sequences,
            chunk_tokens=batch.prefill_chunk_tokens,
        )
        self._admission.release_claim(model)
        self._tell_of_hunger()

    def _tell_of_hunger(self) -> None:
        """Some who wait may have no room beside the models any more, as long as those stay."""
        needed: dict[str, int] = {}
        for sequence in self._admission.hopeless():
            needed[sequence.model] = max(self._admission.needed(sequence), needed.get(sequence.model, 0))
        for model, most in needed.items():
            self.on_hungry(model, most)

    def refuse_hopeless(self) -> None:
        """Fail whoever waits and can never run beside the models in memory. On this thread, out of `run`."""
        hopeless = self._admission.hopeless()
        self._admission.refuse(hopeless)
        for sequence in hopeless:
            self._fail([sequence], self._admission.out_of_memory(sequence))

    def displace(self, model: str) -> None:
        """Send back who waits for `model` and cannot run before others leave. On this thread, by `run`."""
        hopeless = [sequence for sequence in self._admission.hopeless() if sequence.model == model]
        self._admission.refuse(hopeless)
        self._fail(hopeless, Displaced())

    def batch(self, model: str) -> "Batch":
        """Return the batch that runs `model`. Call on this thread, out of `run`."""
        return self._batches[model]

    def resize(self, model: str) -> None:
        """Count `model` anew, which has got or lost an adapter. Call on this thread, out of `run`."""
        batch = self._batches[model]
        adapters = sum(adapter.nbytes for adapter in batch.report().adapters)
        footprint = batch.footprint
        self._admission.resize(model, footprint._replace(weights=footprint.weights + adapters))
        self._tell_of_hunger()

    def shortfall(self, needed_bytes: int, beside: str | None = None) -> Shortfall:
        """Return what is lacking for a model of so many bytes, or for a request to one. On this thread."""
        return self._admission.shortfall(needed_bytes, beside)

    def footprint(self, model: str) -> Footprint | None:
        """Return what a model takes; None if it is not running."""
        return self._admission.footprint(model)

    def claim(self, owner: str, needed_bytes: int) -> "Future[bool]":
        """Keep memory for a model that is about to come; the future is done when those who run leave it room.

        It is false if there is none although nobody runs: the budget has shrunk. The claim is kept until
        `attach` or `release_claim`.
        """
        future: Future[bool] = Future()

        def command() -> None:
            self._admission.claim(owner, needed_bytes)
            self._claims.append(future)

        self._commands.put(command)
        return future

    def release_claim(self, owner: str) -> None:
        """Give up a claim; nothing if there is none."""
        self._commands.put(lambda: self._admission.release_claim(owner))

    def reconfigure(self) -> None:
        """Go by what the settings are now. Call on this thread, out of `run`."""
        from .device import memory_bytes

        self._admission.reconfigure(
            budget_bytes=self._settings.memory_budget_bytes or memory_bytes(),
            most_waiting=self._settings.max_waiting,
            ageing_seconds=self._settings.ageing_ms / 1000,
        )
        self._tell_of_hunger()

    def detach(self, model: str) -> None:
        """Stop running `model` and give its memory back. Call on this thread, out of `run`."""
        batch = self._batches.get(model)
        if batch is not None:
            self._end(batch.reset(), "cancelled")
            self._end(self._admission.close(model), "cancelled")
            del self._batches[model]
        del batch
        self.give_memory_back()

    def give_memory_back(self) -> None:
        """Return MLX's unused buffers to the system. Call on this thread, out of `run`."""
        import mlx.core as mx

        gc.collect()
        mx.synchronize()
        mx.clear_cache()
        self._note_memory()

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; everything about it is reported through its `on_emission`."""
        self._commands.put(lambda: self._add(sequence))

    def cancel(self, sequence: Sequence, failure: SidecarError | None = None) -> None:
        """End a sequence at the next step boundary, "cancelled" or failed; nothing if it has ended."""
        self._commands.put(lambda: self._remove(sequence, failure))

    def retry_after_ms(self, model: str) -> int | None:
        """Return None if there is room in the line, or when there will likely be."""
        return self._admission.retry_after_ms(model, self._running, self._commands.qsize())

    def first_token_seconds(self, model: str, prompt_tokens: int) -> float:
        """Return the least time in which a first token can come; 0 while nothing is known."""
        return self._admission.first_token_seconds(model, prompt_tokens)

    def report(self) -> EngineReport:
        """Return what runs, what waits, and what memory is promised; of a moment, so approximately."""
        waiting, memory = self._admission.report()
        batches = {model: batch.report() for model, batch in list(self._batches.items())}
        return EngineReport(self.steps, waiting, memory, batches)

    def abandon(self) -> None:
        """Fail every sequence, because this thread stands still. For the event loop, as its last word."""
        self._vitals.state = "failed"
        self._fail(list(self._unfinished), EngineFailed())

    def stop(self, timeout: float) -> bool:
        """End the thread after the current step; return whether it ended within `timeout` seconds."""
        if not self._thread.is_alive():
            return True
        self._vitals.state = "stopping"
        self._commands.put(lambda: None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            device = start_mlx(self._blas, self._settings.wired_limit_bytes)
            self._most_sequences = _MOST_SEQUENCES_ON_CPU if device.kind == "cpu" else _MOST_SEQUENCES
            self._admission = self._new_admission()
        except BaseException as error:
            log.exception("MLX could not be started")
            self._vitals.state = "failed"
            self._started.set_exception(error)
            return
        if self._vitals.state == "starting":
            self._vitals.state = "ready"
        self._started.set_result(device)
        log.info("MLX %s is ready on %s after %.0f ms", device.mlx_version, device.kind, device.start_ms)
        try:
            self._loop()
            for model in list(self._batches):
                self.detach(model)
        except Exception as error:
            log.critical("the inference thread cannot go on", exc_info=error)
            self._vitals.state = "failed"
            self._fail(list(self._unfinished), EngineFailed())
            self._on_death(error)
        finally:
            _clear_streams()

    def _new_admission(self) -> Admission[Sequence]:
        from .device import memory_bytes

        return Admission(
            budget_bytes=self._settings.memory_budget_bytes or memory_bytes(),
            most_waiting=self._settings.max_waiting,
            ageing_seconds=self._settings.ageing_ms / 1000,
        )

    def _loop(self) -> None:
        while self._vitals.state != "stopping":
            busy = self.sequences > 0
            if not busy:
                self._note_memory()
            # Before waiting: those who ran may just have left.
            self._settle_claims()
            self._obey(wait=not busy)
            self._admission.admit(self._let_in)
            self._step_all()

    def _settle_claims(self) -> None:
        if not self._claims:
            return
        has_room = not self._admission.is_overdrawn
        if has_room or self._admission.report()[1].reserved_bytes == 0:
            for claim in self._claims:
                if claim.set_running_or_notify_cancel():
                    claim.set_result(has_room)
            self._claims.clear()

    def _step_all(self) -> None:
        # A function of its own, because its names must not keep a batch alive while the loop waits.
        for model, batch in list(self._batches.items()):
            if len(batch):
                self._step(model, batch)

    def _obey(self, *, wait: bool) -> None:
        if not wait and self._commands.empty():
            return
        # Not a step that takes long: a load may, and nobody should take it for a standstill.
        self._vitals.last_step_at = None
        self._obey_one(self._next_command())
        # This thread alone takes out, so what is not empty cannot become so.
        while not self._commands.empty():
            self._obey_one(self._commands.get())

    def _next_command(self) -> Callable[[], None]:
        try:
            return self._commands.get(timeout=_REST_SECONDS)
        except queue.Empty:
            self._prepare()
        try:
            return self._commands.get(timeout=_IDLE_SECONDS)
        except queue.Empty:
            # What sequences had used may be a lot, and others may need it.
            self.give_memory_back()
            return self._commands.get()

    def _prepare(self) -> None:
        for batch in self._batches.values():
            while self._commands.empty() and batch.prepare():
                pass

    def _obey_one(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception:
            # Which batch it has damaged is not known; all start afresh.
            log.exception("a command failed; every sequence ends")
            for batch in list(self._batches.values()):
                self._fail(batch.reset(), InternalError())

    def _step(self, model: str, batch: "Batch") -> None:
        from .device import DeviceLost

        began = self._vitals.last_step_at = self._vitals.last_step_at or time.monotonic()
        try:
            emissions = batch.step()
        except DeviceLost:
            raise
        except Exception:
            log.exception("a step of model %r failed; its sequences end", model)
            self._fail(batch.reset(), InternalError())
            return
        self.steps += 1
        self._vitals.last_step_at = now = time.monotonic()
        self._admission.note_step(model, now - began, batch.prefilled)
        if now >= self._memory_noted_at + _MEMORY_SECONDS:
            self._note_memory()
        for emission in emissions:
            if emission.finish:
                self._forget(emission.sequence)
        if emissions:
            self._deliver(emissions)

    def _add(self, sequence: Sequence) -> None:
        if sequence.model not in self._batches:
            self._end([sequence], "cancelled")
            return
        try:
            has_room = self._admission.put(sequence)
        except OutOfMemory as error:
            self._fail([sequence], error)
            return
        self._unfinished.add(sequence)
        if not has_room:
            self.on_hungry(sequence.model, self._admission.needed(sequence))

    def _let_in(self, sequence: Sequence) -> None:
        try:
            self._batches[sequence.model].add(sequence)
        except Exception:
            log.exception("a sequence could not be added")
            self._fail([sequence], InternalError())

    def _remove(self, sequence: Sequence, failure: SidecarError | None) -> None:
        batch = self._batches.get(sequence.model)
        if not self._admission.withdraw(sequence) and (batch is None or not batch.remove(sequence)):
            return
        if failure is None:
            self._end([sequence], "cancelled")
        else:
            self._fail([sequence], failure)

    def _fail(self, sequences: list[Sequence], failure: SidecarError) -> None:
        for sequence in sequences:
            sequence.failure = failure
        self._end(sequences, "failed")

    def _end(self, sequences: list[Sequence], finish: FinishReason) -> None:
        now = time.monotonic()
        for sequence in sequences:
            sequence.finished_at = now
            self._forget(sequence)
        if sequences:
            self._deliver([Emission(sequence, None, finish) for sequence in sequences])

    def _forget(self, sequence: Sequence) -> None:
        self._unfinished.discard(sequence)
        self._admission.left(sequence, len(sequence.tokens))

    def _note_memory(self) -> None:
        import mlx.core as mx

        self.memory = MemoryUse(
            mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory(), self._limit_cache()
        )
        self._memory_noted_at = time.monotonic()

    def _limit_cache(self) -> int:
        """Let MLX keep no more unused buffers than nobody has a claim on; return how many bytes that is."""
        import mlx.core as mx

        _, memory = self._admission.report()
        if self._most_cached is None:
            self._most_cached = mx.set_cache_limit(0)
        limit = min(self._most_cached, max(memory.free_bytes, _LEAST_CACHED_BYTES))
        mx.set_cache_limit(limit)
        return limit


def _clear_streams() -> None:
    import mlx.core as mx

    gc.collect()
    mx.clear_streams()
