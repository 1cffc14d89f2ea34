"""One answer under way: the engine's emissions in, progress out, and the result at the end.

Everything here runs on the event loop, called once for each token, so it does no more than it must.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import anyio
from msgspec import UNSET, UnsetType

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import InternalError, SidecarError

from ..engine.sequence import Emission, FinishReason, LogProbs
from ..scheduling.duplicates import Work
from ..text.answer import Answer, Piece

T = TypeVar("T")
GiveProgress = Callable[[m.GenerateProgress], None]

log = logging.getLogger("api")


class Generation:
    """Turns what some work produces into one request's answer. Others may follow the same work.

    `give` sends progress; without it the pieces are kept for the result. A stop string, a cancel and a
    failure of its own end the answer before the work is done.
    """

    def __init__(
        self, answer: Answer, arrived_at: float, give: GiveProgress | None, *, log_probs: bool = False
    ) -> None:
        self._answer = answer
        self._log_probs: deque[LogProbs] | None = deque() if log_probs else None
        self._arrived_at = arrived_at
        self._asked_at = time.monotonic()
        self._give = give
        self._work: Work | None = None
        self._shared = False
        self._replayed = 0
        self._pieces: list[Piece] = []
        self._seq = 0
        self._text_bytes = 0
        self._failure: SidecarError = InternalError()
        self._finish: FinishReason | None = None
        self._done = anyio.Event()

    def follow(self, work: Work, *, shared: bool) -> None:
        """Take what `work` has produced, as one part, and then what it produces.

        `shared` says that the work was not begun for this answer.
        """
        self._work, self._shared = work, shared
        work.join(self)

    @property
    def started(self) -> bool:
        """Whether the engine has spent any time on it."""
        return self._work is not None and self._work.sequence.started_at is not None

    async def finished(self) -> None:
        """Wait for the end of the answer."""
        await self._done.wait()

    def replay(self, tokens: list[int], log_probs: list[LogProbs]) -> None:
        """Take what had been produced before."""
        self._replayed = len(tokens)
        if self._log_probs is not None:
            self._log_probs += log_probs
        self._guarded(self._take_all, tokens)

    def on_emission(self, emission: Emission) -> None:
        """Take what happened to the sequence in one step."""
        if self._finish is None:
            self._guarded(self._take, emission)

    def cancel(self) -> None:
        """End the answer: at once if others go on with the work, or else when the engine has ended it."""
        if self._finish is None and not self._following.leave_in_order(self):
            self._guarded(self._close, "cancelled")

    def fail(self, error: SidecarError) -> None:
        """End the answer with `error`, unless it has ended."""
        if self._finish is None:
            self._failure = error
            self._end("failed")

    def result(self) -> m.GenerateResult:
        """Return the answer's end.

        Raises:
            SidecarError: what `fail` was given, or what the engine says of the sequence.
            InternalError: a failure that nobody says more of.
        """
        if self._finish is None or self._finish == "failed":
            raise self._failure
        result = m.GenerateResult(
            finish_reason=self._finish,
            usage=m.Usage(
                prompt_tokens=len(self._following.sequence.prompt),
                completion_tokens=self._answer.token_count,
            ),
            timings=self._timings(),
            shared=self._shared,
        )
        if self._give is None:
            result.text = "".join(piece.text for piece in self._pieces)
            result.tokens = [token for piece in self._pieces for token in piece.tokens]
            result.log_probs = self._take_log_probs(len(result.tokens))
        else:
            result.last_seq = self._seq
            result.text_bytes = self._text_bytes
        return result

    @property
    def _following(self) -> Work:
        assert self._work is not None
        return self._work

    def _guarded(self, take: Callable[[T], None], what: T) -> None:
        try:
            take(what)
        except BaseException:  # A panic in Rust is no Exception.
            log.exception("an answer could not be turned into text")
            self._end("failed")

    def _take_all(self, tokens: list[int]) -> None:
        texts: list[str] = []
        said: list[int] = []
        for token in tokens:
            if (piece := self._answer.feed(token)) is not None:
                texts.append(piece.text)
                said += piece.tokens
            if self._answer.stopped:
                break
        if said:
            self._say(Piece("".join(texts), said))
        if self._answer.stopped:
            self._end("stop")

    def _take(self, emission: Emission) -> None:
        if self._log_probs is not None and emission.log_probs is not None:
            self._log_probs.append(emission.log_probs)
        if emission.token is not None:
            self._say(self._answer.feed(emission.token))
            if self._answer.stopped:
                self._end("stop")
                return
        if emission.finish is not None:
            self._failure = emission.sequence.failure or self._failure
            self._close(emission.finish)

    def _say(self, piece: Piece | None) -> None:
        if piece is None:
            return
        self._seq += 1
        if self._give is None:
            self._pieces.append(piece)
        else:
            self._text_bytes += len(piece.text.encode())
            part = m.GenerateProgress(seq=self._seq, text=piece.text, tokens=piece.tokens)
            if self._log_probs is not None:
                part.log_probs = self._take_log_probs(len(piece.tokens))
            self._give(part)

    def _take_log_probs(self, count: int) -> list[m.TokenLogProbs] | UnsetType:
        if self._log_probs is None:
            return UNSET
        return [_log_probs(self._log_probs.popleft()) for _ in range(count)]

    def _close(self, finish: FinishReason) -> None:
        self._say(self._answer.finish())
        self._end("stop" if self._answer.stopped else finish)

    def _end(self, finish: FinishReason) -> None:
        self._finish = finish
        self._following.leave(self)
        self._done.set()

    def _timings(self) -> m.Timings:
        sequence, asked = self._following.sequence, self._asked_at
        end = sequence.finished_at or time.monotonic()
        started = max(sequence.started_at or end, asked)
        first = max(sequence.first_token_at or end, asked)
        decode = end - first
        steps = self._answer.token_count - max(self._replayed, 1)
        return m.Timings(
            queue_ms=_ms(started - asked),
            prefill_ms=_ms(first - started),
            ttft_ms=_ms(first - self._arrived_at),
            decode_ms=_ms(decode),
            tokens_per_second=round(steps / decode, 3) if steps > 0 and decode > 0 else 0.0,
        )


def _log_probs(of: LogProbs) -> m.TokenLogProbs:
    top = [m.Candidate(token=token, log_prob=_finite(log_prob)) for token, log_prob in of.top]
    return m.TokenLogProbs(log_prob=_finite(of.of_token), top=top)


def _finite(log_prob: float) -> float | None:
    return None if log_prob == -math.inf else log_prob


def _ms(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1000, 3)
