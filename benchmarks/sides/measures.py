"""What is made of answers: rates, waits and gaps, and whether two sides say the same."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from .rounds import Answer


class Figures(dict[str, list[float]]):
    """Named figures of a part, one value for each round."""

    def add(self, name: str, value: float) -> None:
        """Add the value of one more round."""
        self.setdefault(name, []).append(value)


def sums(answers: Sequence[Answer]) -> dict[str, float]:
    """Return what one round of streams reached.

    `steady` counts from when every stream has begun to when the first has ended, and is absent where there is
    no such time. A gap lies between two parts of one stream: tokens that come together make no gap of zero.
    """
    arrivals = sorted(part for answer in answers for part in answer.parts)
    began, ended = min(answer.sent for answer in answers), arrivals[-1][0]
    start = max(answer.parts[0][0] for answer in answers)
    stop = min(answer.parts[-1][0] for answer in answers)
    steady = sum(tokens for at, tokens in arrivals if start < at <= stop)
    firsts = [answer.parts[0][0] - answer.sent for answer in answers]
    found = sorted(gap for answer in answers for gap in gaps(answer)) or [0.0]
    return {
        "total tokens/s": 1000 * sum(tokens for _, tokens in arrivals) / (ended - began),
        **({"steady tokens/s": 1000 * steady / (stop - start)} if steady else {}),
        "first token p50 ms": statistics.median(firsts),
        "first token worst ms": max(firsts),
        "gap p50 ms": statistics.median(found),
        "gap p99 ms": found[int(0.99 * (len(found) - 1))],
    }


def gaps(answer: Answer, begin: float = 0.0, end: float = float("inf")) -> list[float]:
    """Return the gaps between parts, in ms, that touch the time from `begin` to `end`."""
    times = [at for at, _ in answer.parts]
    return [later - earlier for earlier, later in pairwise(times) if later > begin and earlier < end]


def first_difference(ours: Answer, theirs: Answer, decode: Callable[[list[int]], str]) -> int | None:
    """Return where two answers first differ, in ids, or in text where the other side tells only that.

    `decode` makes text of our ids, special tokens included; None if the answers are the same.
    """
    if theirs.ids:
        return _first_difference(ours.ids, theirs.ids)
    # A streaming detokenizer of mlx-lm drops the space before the first word.
    return _first_difference(decode(ours.ids).lstrip(), (theirs.text or "").lstrip())


def _first_difference(ours: Sequence[object], theirs: Sequence[object]) -> int | None:
    if ours == theirs:
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((at for at, (mine, other) in pairs if mine != other), min(len(ours), len(theirs)))


def rounds(most: int, seconds: float) -> Iterator[int]:
    """Yield the numbers of at most `most` rounds, at least one, none that would likely outlast `seconds`."""
    began, longest = time.monotonic(), 0.0
    for number in range(most):
        round_began = time.monotonic()
        if number and round_began - began + longest > seconds:
            return
        yield number
        longest = max(longest, time.monotonic() - round_began)
