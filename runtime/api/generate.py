"""generate."""

import os
import time
from collections.abc import Awaitable

import anyio
from msgspec import UNSET, UnsetType

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import ContextOverflow, InvalidParams

from ..engine.sequence import Sampling, Sequence
from ..engine.thread import InferenceThread
from ..models.loaded import LoadedModel
from ..models.registry import ModelRegistry
from ..pool import Pool
from ..server.connection import Call
from ..telemetry.counters import Counters
from ..text.answer import Answer
from .generation import Generation
from .tokens import check_ids, encode, only_one


class GenerateApi:
    """From a request to a sequence, and from its end to a result."""

    def __init__(
        self, registry: ModelRegistry, engine: InferenceThread, pool: Pool, counters: Counters
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._pool = pool
        self._counters = counters

    def generate(self, params: m.GenerateParams, call: Call) -> Awaitable[m.GenerateResult]:
        """Answer a prompt, streamed if the request has a `partialResultToken`.

        Raises:
            InvalidParams, ModelNotLoaded, ContextOverflow, Unsupported, InternalError.
        """
        only_one("messages", {"messages": params.messages, "prompt": params.prompt, "tokens": params.tokens})
        if not isinstance(params.partial_result_token, UnsetType):
            call.open_stream(params.partial_result_token)
        # From now on a cancel ends in a result. Until there is a sequence it stops the waiting.
        waiting = anyio.CancelScope()
        call.on_cancel = waiting.cancel
        return self._generate(params, call, waiting, time.monotonic())

    async def _generate(
        self, params: m.GenerateParams, call: Call, waiting: anyio.CancelScope, arrived_at: float
    ) -> m.GenerateResult:
        self._counters.started += 1
        result = None
        try:
            with waiting:
                model = await self._registry.ready(params.model)
                with model.in_use():
                    prompt = await self._prompt(params, model)
                    if model.forced_out:  # While the prompt was worked out: there is no sequence to end.
                        waiting.cancel()
                    result = await self._answer(params, call, model, prompt, arrived_at)
        except Exception:
            self._counters.failed += 1
            raise
        if result is None:
            result = _cancelled_before_it_began(arrived_at, streamed=call.stream is not None)
        self._counters.count(result)
        return result

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
        self, params: m.GenerateParams, call: Call, model: LoadedModel, prompt: list[int], arrived_at: float
    ) -> m.GenerateResult:
        stops = [params.stop] if isinstance(params.stop, str) else params.stop
        generation = Generation(
            Answer(model.tokenizer.stream(), stops),
            arrived_at,
            None if call.stream is None else call.progress,
            self._engine.cancel,
        )
        sequence = Sequence(
            model=model.name,
            prompt=prompt,
            max_tokens=min(params.max_tokens, model.facts.context_length - len(prompt)),
            sampling=_sampling(params, model.facts.vocabulary),
            stop_token_ids=model.tokenizer.eos_ids | frozenset(params.stop_token_ids),
            on_emission=generation.on_emission,
        )
        # Whoever was cancelled while waiting never becomes a sequence.
        await anyio.lowlevel.checkpoint_if_cancelled()
        call.on_cancel = lambda: self._engine.cancel(sequence)
        call.on_overflow = lambda error: generation.fail(sequence, error)
        model.sequences.add(sequence)
        try:
            self._engine.submit(sequence)
            await generation.finished()
        finally:
            model.sequences.discard(sequence)
            # Does nothing to a sequence that has ended; ends one whose request is being torn down.
            self._engine.cancel(sequence)
        return generation.result(sequence)


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
        seed=int.from_bytes(os.urandom(6)) if params.seed is None else params.seed,
    )


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
