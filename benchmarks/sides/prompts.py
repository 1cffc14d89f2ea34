"""Prompts that are the same as ids and as text; no two begin alike, so that no cache helps anybody."""

import json
import random
import re
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from .rounds import Request


class Prompt(NamedTuple):
    """Words of a model's vocabulary: as ids, and as the text that means these ids."""

    tokens: list[int]
    text: str

    def asking_for(self, max_tokens: int, *, after_tokens: int = 0) -> Request:
        """Return a request for a continuation of exactly this length."""
        return Request(self.tokens, self.text, max_tokens, after_tokens)


class Prompts:
    """An endless supply of prompts for one model, the same in every run."""

    def __init__(self, folder: Path) -> None:
        """Read the vocabulary of a byte-level tokenizer."""
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        vocabulary: dict[str, int] = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        self._words = sorted(id_ for token, id_ in vocabulary.items() if re.fullmatch("Ġ[a-z]{3,}", token))
        self._random = random.Random(0)
        self._random.shuffle(self._words)
        self._taken = 0

    def one(self, length: int) -> Prompt:
        """Return a new prompt of `length` tokens."""
        first = self._words[self._taken % len(self._words)]
        self._taken += 1
        tokens = [first, *self._random.choices(self._words, k=length - 1)]
        text: str = self._tokenizer.decode(tokens)
        if self._tokenizer.encode(text).ids != tokens:
            return self.one(length)
        return Prompt(tokens, text)

    def some(self, count: int, length: int) -> list[Prompt]:
        """Return `count` new prompts of `length` tokens."""
        return [self.one(length) for _ in range(count)]

    def ragged(self, count: int, shortest: int, longest: int) -> list[Prompt]:
        """Return `count` new prompts of many lengths, evenly spread and shuffled."""
        span = longest - shortest
        lengths = [shortest + span * number // max(count - 1, 1) for number in range(count)]
        self._random.shuffle(lengths)
        return [self.one(length) for length in lengths]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of ids, special tokens included."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False)
