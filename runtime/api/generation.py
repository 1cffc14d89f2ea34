"""One answer under way: the engine's emissions in, progress out, and the result at the end.

Everything here runs on the event loop, called once for each token, so it does no more than it must.
"""

import logging
import time
from collections.abc import Callable

import anyio

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import InternalError, SidecarError

from ..engine.sequence import Emission, FinishReason, Sequence
from ..text.answer import Answer, Piece

log = logging.getLogger("api")

GiveProgress = Callable[[m.GenerateProgress], None]


class Generation:
    """Follows one sequence from its first emission to its last.

    `give` sends progress; without it the pieces are kept for the result. `cancel` is called when a stop
    string ends the answer before the engine does.
    """

    def __init__(
        self, answer: Answer, arrived_at: float, give: GiveProgress | None, cancel: Callable[[Sequence], None]
    ) -> None:
        self._answer = answer
        self._arrived_at = arrived_at
        self._give = give
        self._cancel = cancel
        self._pieces: list[Piece] = []
        self._seq = 0
        self._text_bytes = 0
        self._failure: SidecarError = InternalError()
        self._finish: FinishReason | None = None
        self._done = anyio.Event()

    async def finished(self) -> None:
        """Wait for the end of the answer."""
        await self._done.wait()

    def on_emission(self, emission: Emission) -> None:
        """Take what happened to the sequence in one step."""
        if self._finish is not None:
            return
        try:
            self._take(emission)
        except BaseException:  # A panic in Rust is no Exception.
            log.exception("an answer could not be turned into text")
            self._cancel(emission.sequence)
            self._end("failed")

    def fail(self, sequence: Sequence, error: SidecarError) -> None:
        """End the answer with `error`, unless it has ended."""
        if self._finish is None:
            self._failure = error
            self._cancel(sequence)
            self._end("failed")

    def result(self, sequence: Sequence) -> m.GenerateResult:
        """Return the answer's end.

        Raises:
            InternalError: the engine failed under it.
            SidecarError: what `fail` was given.
        """
        if self._finish is None or self._finish == "failed":
            raise self._failure
        result = m.GenerateResult(
            finish_reason=self._finish,
            usage=m.Usage(prompt_tokens=len(sequence.prompt), completion_tokens=self._answer.token_count),
            timings=self._timings(sequence),
        )
        if self._give is None:
            result.text = "".join(piece.text for piece in self._pieces)
            result.tokens = [token for piece in self._pieces for token in piece.tokens]
        else:
            result.last_seq = self._seq
            result.text_bytes = self._text_bytes
        return result

    def _take(self, emission: Emission) -> None:
        if emission.token is not None:
            self._say(self._answer.feed(emission.token))
            if self._answer.stopped:
                self._cancel(emission.sequence)
                self._end("stop")
                return
        if emission.finish is not None:
            self._say(self._answer.finish())
            self._end("stop" if self._answer.stopped else emission.finish)

    def _say(self, piece: Piece | None) -> None:
        if piece is None:
            return
        self._seq += 1
        if self._give is None:
            self._pieces.append(piece)
        else:
            self._text_bytes += len(piece.text.encode())
            self._give(m.GenerateProgress(seq=self._seq, text=piece.text, tokens=piece.tokens))

    def _end(self, finish: FinishReason) -> None:
        self._finish = finish
        self._done.set()

    def _timings(self, sequence: Sequence) -> m.Timings:
        now = time.monotonic()
        end = sequence.finished_at or now
        started = sequence.started_at or end
        first = sequence.first_token_at or end
        decode = end - first
        steps = self._answer.token_count - 1
        return m.Timings(
            queue_ms=_ms(started - sequence.submitted_at),
            prefill_ms=_ms(first - started),
            ttft_ms=_ms(first - self._arrived_at),
            decode_ms=_ms(decode),
            tokens_per_second=round(steps / decode, 3) if steps > 0 and decode > 0 else 0.0,
        )


def _ms(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1000, 3)
