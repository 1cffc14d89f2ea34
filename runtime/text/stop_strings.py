"""Stop strings, matched on the text of an answer and not on its tokens."""


class StopStrings:
    """Passes text through until a stop string is complete, and never lets out the beginning of one.

    The result does not depend on how the text is cut: the stop string that is complete first wins, and of
    two complete at the same place the longer.
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held: str = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Return the text that is safe to show, and whether a stop string was found behind it."""
        if not self._stops:
            return text, False
        text = self._held + text
        starts = ((stop, text.find(stop)) for stop in self._stops)
        # By their end, and at the same end by their start.
        found = [(start + len(stop), start) for stop, start in starts if start >= 0]
        if found:
            _, start = min(found)
            self._held = ""
            return text[:start], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """Return what was held back: the answer ended before it became a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
