"""An answer as it grows: ids in, final pieces of text with their ids out."""

from typing import TYPE_CHECKING, NamedTuple

from .stop_strings import StopStrings

if TYPE_CHECKING:
    from .detokenizer import Detokenizer


class Piece(NamedTuple):
    """Text that will not change, and the ids that it came from; either may run ahead of the other."""

    text: str
    tokens: list[int]


class Answer:
    """Turns ids into pieces. Ids wait with their text while a character or a stop string is unfinished."""

    def __init__(self, detokenizer: "Detokenizer", stops: list[str]) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._waiting: list[int] = []
        self.token_count = 0
        self.stopped = False

    def feed(self, token: int) -> Piece | None:
        """Return the piece that `token` completes. After a stop string `stopped` is true; feed no more."""
        self._waiting.append(token)
        self.token_count += 1
        text, self.stopped = self._stops.feed(self._detokenizer.feed(token))
        return self._take(text) if text or self.stopped else None

    def finish(self) -> Piece | None:
        """Return what was waiting when the tokens ended; None when there is nothing left to say."""
        if self.stopped:
            return None
        text, self.stopped = self._stops.feed(self._detokenizer.finish())
        if not self.stopped:
            text += self._stops.finish()
        return self._take(text) if text or self._waiting else None

    def _take(self, text: str) -> Piece:
        tokens, self._waiting = self._waiting, []
        return Piece(text, tokens)
