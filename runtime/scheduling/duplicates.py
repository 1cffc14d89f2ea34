"""Identical work is done once: requests that must get the same tokens follow one sequence.

Used on the event loop only. Each follower has a stream, stop strings, a deadline and an end of its own; the
sequence is cancelled when nobody follows it any more. Who comes late is given at once what has been produced.

A sequence keeps the priority and the owner of the first who asked for it. That is enough: once it is decoded,
every step takes it along, whatever its priority. Before that a more urgent request does not follow it, but
gets a sequence of its own, which those who come later follow instead.
"""

from array import array
from collections.abc import Callable, Hashable
from functools import partial
from typing import Protocol

import msgspec
from msgspec import structs

from ..engine.sequence import Emission, LogProbs, Sequence

MAX_REPLAY_TOKENS = 4096
"""A token costs the event loop some microseconds, also in a replay. Further behind a request runs alone."""


class Follower(Protocol):
    """A request, as far as its tokens are concerned."""

    def replay(self, tokens: list[int], log_probs: list[LogProbs]) -> None:
        """Take what had been produced before this one came; `log_probs` is empty if nobody asked for them."""
        ...

    def on_emission(self, emission: Emission) -> None:
        """Take what happened to the sequence in one step."""
        ...


class Work:
    """A sequence, and everybody who follows it. `on_closed` is called once nobody may join any more."""

    def __init__(
        self, sequence: Sequence, cancel: Callable[[Sequence], None], on_closed: Callable[["Work"], None]
    ) -> None:
        self.sequence = sequence
        self._cancel = cancel
        self._on_closed = on_closed
        self._open = True
        self._tokens: list[int] = []
        self._log_probs: list[LogProbs] = []
        self._followers: list[Follower] = []
        sequence.on_emission = self._on_emission

    def close(self) -> None:
        """Let nobody join who has not, and keep nothing for them."""
        self._open = False
        self._tokens, self._log_probs = [], []
        self._on_closed(self)

    def suits(self, sequence: Sequence) -> bool:
        """Return whether following this is as good for a request as `sequence` would be."""
        return bool(self._tokens) or sequence.priority >= self.sequence.priority

    def join(self, follower: Follower) -> None:
        """Give `follower` the tokens so far, and from now on every emission."""
        self._followers.append(follower)
        if self._tokens:
            follower.replay(self._tokens, self._log_probs)

    def leave(self, follower: Follower) -> bool:
        """Give `follower` no more, and end the sequence if it was the last; return whether nobody is left."""
        if follower in self._followers:
            # A new list: this may happen while the old one is gone through.
            self._followers = [other for other in self._followers if other is not follower]
            if not self._followers:
                self._end()
        return not self._followers

    def leave_in_order(self, follower: Follower) -> bool:
        """As `leave`, but the last is still given what the engine says to the end; return whether it is."""
        if self._followers == [follower]:
            self._end()
            return True
        self.leave(follower)
        return False

    def _end(self) -> None:
        self.close()
        self._cancel(self.sequence)

    def _on_emission(self, emission: Emission) -> None:
        if self._open and emission.token is not None:
            self._tokens.append(emission.token)
            if emission.log_probs is not None:
                self._log_probs.append(emission.log_probs)
            if len(self._tokens) > MAX_REPLAY_TOKENS:
                self.close()
        followers = self._followers
        if emission.finish is not None:
            self._followers = []
            self.close()
        for follower in followers:
            follower.on_emission(emission)


class Duplicates:
    """The work under way, by what it produces. `submit` and `cancel` are the engine's."""

    def __init__(self, submit: Callable[[Sequence], None], cancel: Callable[[Sequence], None]) -> None:
        self._submit = submit
        self._cancel = cancel
        self._works: dict[Hashable, Work] = {}

    def find(self, key: Hashable, sequence: Sequence) -> Work | None:
        """Return the work with that key, if following it is as good as running `sequence`."""
        work = self._works.get(key)
        return work if work is not None and work.suits(sequence) else None

    def begin(self, key: Hashable, sequence: Sequence) -> Work:
        """Run `sequence`, and let others follow it who have the same key; nobody does if it is None."""
        work = Work(sequence, self._cancel, partial(self._forget, key))
        if key is None:
            work.close()
        else:
            self._works[key] = work
        self._submit(sequence)
        return work

    def _forget(self, key: Hashable, work: Work) -> None:
        if self._works.get(key) is work:
            del self._works[key]


def key_of(sequence: Sequence) -> Hashable:
    """Return what decides on the tokens of a sequence whose sampling is greedy or has a chosen seed.

    The names of model and adapter stand for them: neither is unloaded as long as a request follows anything.
    """
    bias = dict(sorted(sequence.sampling.logit_bias.items()))
    return (
        sequence.model,
        sequence.adapter,
        array("i", sequence.prompt).tobytes(),
        msgspec.json.encode(structs.replace(sequence.sampling, logit_bias=bias)),
        sequence.max_tokens,
        sequence.stop_token_ids,
        sequence.log_probs,
    )
