"""generate."""

import math
import os
import time
from collections.abc import Awaitable, Hashable

import anyio
from msgspec import UNSET, Struct, UnsetType

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import (
    ContextOverflow,
    DeadlineExceeded,
    InvalidParams,
    Overloaded,
)

from ..engine.sequence import Displaced, Sampling, Sequence
from ..engine.thread import InferenceThread
from ..models.entry import Entry
from ..models.housekeeping import Housekeeping
from ..models.loaded import LoadedModel, Use
from ..models.registry import ModelRegistry
from ..pool import Pool
from ..scheduling.duplicates import Duplicates, Work, key_of
from ..scheduling.priority import Priority
from ..server.connection import Call
from ..telemetry.counters import Counters
from ..text.answer import Answer
from .generation import Generation
from .tokens import check_ids, encode, only_one


class Request(Struct, eq=False):
    """A `generate` under way: it waits within `scope`, which its deadline ends, then has a `generation`."""

    params: m.GenerateParams
    call: Call
    arrived_at: float
    scope: anyio.CancelScope
    generation: Generation | None = None

    def cancel(self) -> None:
        """End it with a result, whatever it waits for. From now on it cannot be too late."""
        self.scope.deadline = math.inf
        if self.generation is None:
            self.scope.cancel()
        else:
            self.generation.cancel()

    def check_deadline(self, seconds: float = 0.0) -> None:
        """Raise DeadlineExceeded if its time is up, or will be in so many seconds."""
        if anyio.current_time() + seconds >= self.scope.deadline:
            assert self.params.deadline_ms is not None
            started = self.generation is not None and self.generation.started
            raise DeadlineExceeded(self.params.deadline_ms, never_started=not started)


class GenerateApi:
    """From a request to a sequence, and from its end to a result."""

    def __init__(
        self,
        registry: ModelRegistry,
        engine: InferenceThread,
        pool: Pool,
        counters: Counters,
        housekeeping: Housekeeping,
    ) -> None:
        self._registry = registry
        self._housekeeping = housekeeping
        self._engine = engine
        self._pool = pool
        self._counters = counters
        self._duplicates = Duplicates(engine.submit, engine.cancel)

    def generate(self, params: m.GenerateParams, call: Call) -> Awaitable[m.GenerateResult]:
        """Answer a prompt, streamed if the request has a `partialResultToken`.

        Raises:
            InvalidParams, ModelNotLoaded, AdapterNotLoaded, ContextOverflow, Unsupported, Overloaded,
            DeadlineExceeded, OutOfMemory, GenerationFailed, Unloaded, EngineFailed, InternalError, and why
            its model could not be brought back into memory.
        """
        only_one("messages", {"messages": params.messages, "prompt": params.prompt, "tokens": params.tokens})
        if not isinstance(params.partial_result_token, UnsetType):
            call.open_stream(params.partial_result_token)
        request = Request(params, call, time.monotonic(), anyio.CancelScope())
        if params.deadline_ms is not None:
            request.scope.deadline = anyio.current_time() + params.deadline_ms / 1000
        # From now on a cancel ends in a result.
        call.on_cancel = request.cancel
        return self._generate(request)

    async def _generate(self, request: Request) -> m.GenerateResult:
        self._counters.started += 1
        try:
            result = await self._result(request)
        except Exception as error:
            self._counters.count_failure(error)
            raise
        self._counters.count(result)
        return result

    async def _result(self, request: Request) -> m.GenerateResult:
        params = request.params
        adapter = None if isinstance(params.adapter, UnsetType) else params.adapter
        self._housekeeping.check()
        with request.scope:
            # Found once: who has to go back stays with the model that it came for.
            entry = self._registry.find(params.model)
            wanted: str | Entry = params.model
            while True:
                try:
                    async with self._registry.using(wanted, adapter) as (model, uses):
                        self._check_line(model.key)
                        prompt = await self._prompt(params, model)
                        return await self._answer(request, model, uses, prompt)
                except Displaced:
                    wanted, request.generation = entry, None
        request.check_deadline()
        return _cancelled_before_it_began(request.arrived_at, streamed=request.call.stream is not None)

    async def _prompt(self, params: m.GenerateParams, model: LoadedModel) -> list[int]:
        if isinstance(params.tokens, list):
            prompt = params.tokens
            check_ids(prompt, model)
        else:
            prompt = await self._pool.run(encode, model, params.messages, params.prompt)
        if not prompt:
            given = next(
                name for name in ("tokens", "messages", "prompt") if getattr(params, name) is not UNSET
            )
            raise InvalidParams(given, "is empty")
        if len(prompt) >= model.facts.context_length:
            raise ContextOverflow(len(prompt), model.facts.context_length)
        return prompt

    async def _answer(
        self, request: Request, model: LoadedModel, uses: list[Use], prompt: list[int]
    ) -> m.GenerateResult:
        params, call = request.params, request.call
        stops = [params.stop] if isinstance(params.stop, str) else params.stop
        generation = Generation(
            Answer(model.tokenizer.stream(), stops),
            request.arrived_at,
            None if call.stream is None else call.progress,
            log_probs=params.log_probs is not None,
        )
        sequence = Sequence(
            model=model.key,
            adapter=None if isinstance(params.adapter, UnsetType) else params.adapter,
            prompt=prompt,
            max_tokens=min(params.max_tokens, model.facts.context_length - len(prompt)),
            sampling=_sampling(params, model.facts.vocabulary),
            stop_token_ids=model.tokenizer.eos_ids | frozenset(params.stop_token_ids),
            on_emission=generation.on_emission,
            log_probs=params.log_probs,
            priority=Priority[params.priority.upper()],
            owner=id(call.connection),
        )
        # Whoever was cancelled while waiting never becomes a sequence.
        await anyio.lowlevel.checkpoint_if_cancelled()
        for use in uses:
            if use.gone is not None:  # While the prompt was worked out: there is no sequence to end.
                raise use.gone
        work = self._work(request, sequence, generation)
        request.generation = generation
        call.on_overflow = generation.fail
        for use in uses:
            use.sequences.add(work.sequence)
        try:
            await generation.finished()
        finally:
            # Also when the request is being torn down: does nothing to a sequence that has ended.
            if work.leave(generation):
                for use in uses:
                    use.sequences.discard(work.sequence)
        return generation.result()

    def _work(self, request: Request, sequence: Sequence, generation: Generation) -> Work:
        """Let `generation` follow identical work that is under way, or begin `sequence`.

        Raises:
            Overloaded: the line is full.
            DeadlineExceeded: its first token would come too late.
        """
        key: Hashable = key_of(sequence) if _is_repeatable(request.params) else None
        work = self._duplicates.find(key, sequence)
        if work is not None:
            self._counters.shared += 1
            generation.follow(work, shared=True)
            return work
        # Again: many may have come since while this one was made into tokens.
        self._check_line(sequence.model)
        request.check_deadline(self._engine.first_token_seconds(sequence.model, len(sequence.prompt)))
        work = self._duplicates.begin(key, sequence)
        generation.follow(work, shared=False)
        return work

    def _check_line(self, model: str) -> None:
        retry_after_ms = self._engine.retry_after_ms(model)
        if retry_after_ms is not None:
            raise Overloaded(retry_after_ms=retry_after_ms)


def _is_repeatable(params: m.GenerateParams) -> bool:
    """Return whether another request with the same parameters must get the same tokens, and may."""
    return params.deduplicate and (params.temperature == 0 or params.seed is not None)


def _sampling(params: m.GenerateParams, vocabulary: int) -> Sampling:
    if params.top_k >= vocabulary:
        raise InvalidParams("topK", f"must be below the vocabulary's size, {vocabulary}; 0 switches it off")
    for token in params.logit_bias:
        if not 0 <= token < vocabulary:
            raise InvalidParams(f"logitBias.{token}", f"the vocabulary has {vocabulary} ids, from 0")
    return Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        seed=_seed(params),
    )


def _seed(params: m.GenerateParams) -> int:
    if params.temperature == 0:  # Greedy: no seed makes a difference, and none may look like one.
        return 0
    return int.from_bytes(os.urandom(6)) if params.seed is None else params.seed


def _cancelled_before_it_began(arrived_at: float, *, streamed: bool) -> m.GenerateResult:
    waited = (time.monotonic() - arrived_at) * 1000
    result = m.GenerateResult(
        finish_reason="cancelled",
        usage=m.Usage(prompt_tokens=0, completion_tokens=0),
        timings=m.Timings(queue_ms=waited, prefill_ms=0, ttft_ms=0, decode_ms=0, tokens_per_second=0),
    )
    if streamed:
        result.last_seq = result.text_bytes = 0
    else:
        result.text, result.tokens = "", []
    return result
