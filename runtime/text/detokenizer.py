"""Ids to text, one at a time, for any tokenizer of the `tokenizers` library.

Most tokens stand for bytes: all of a byte-level vocabulary, and the single-byte tokens of SentencePiece's
byte fallback. Their bytes are put together here, by an incremental UTF-8 decoder. The library would read them
as text and cannot tell an unfinished character from U+FFFD; and it takes back what it gave out when a later
byte of a fallback run is wrong, so that its own stream raises. Here, as in SentencePiece itself, valid
characters stay and wrong bytes become U+FFFD. All other tokens go through the library's stream.
"""

import codecs
from typing import NamedTuple

from tokenizers import Tokenizer, decoders
from tokenizers.decoders import DecodeStream


class ByteTokens(NamedTuple):
    """Which ids stand for which bytes; `starter` is an id to begin with, where beginnings are special."""

    of: dict[int, bytes]
    starter: int | None = None


class Detokenizer:
    """What is given out never changes later and never ends inside a character. Special tokens are no text."""

    def __init__(self, tokenizer: Tokenizer, byte_tokens: ByteTokens) -> None:
        self._tokenizer = tokenizer
        self._byte_tokens = byte_tokens
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._stream = DecodeStream(skip_special_tokens=True)
        self._others: list[int] = []
        self._given = 0

    def feed(self, token: int) -> str:
        """Return the text that `token` completes; empty while a character is unfinished."""
        value = self._byte_tokens.of.get(token)
        if value is None:
            text = self._feed_other(token)
            # A special token is no text, and does not break up the character around it.
            return self._bytes.decode(b"", final=True) + text if text else ""
        if not self._others and self._byte_tokens.starter is not None:
            # Text has begun, and the library must not take what follows for its beginning.
            self._feed_other(self._byte_tokens.starter)
        return self._bytes.decode(value)

    def finish(self) -> str:
        """Return held text that is complete; the bytes of a character that never was are dropped."""
        text = self._tokenizer.decode(self._others, skip_special_tokens=True)
        return text[self._given :].rstrip("\ufffd")

    def _feed_other(self, token: int) -> str:
        self._others.append(token)
        text = self._stream.step(self._tokenizer, token) or ""
        self._given += len(text)
        return text


def byte_tokens(tokenizer: Tokenizer) -> ByteTokens:
    """Return the ids of `tokenizer` that stand for bytes; none for kinds that have no such tokens."""
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        return ByteTokens(_byte_level(tokenizer))
    names = {bytes([byte]): tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    letter = names[b"A"]
    if letter is None or tokenizer.decode([letter]) != "A":
        return ByteTokens({})
    return ByteTokens({token: byte for byte, token in names.items() if token is not None}, letter)


def _byte_level(tokenizer: Tokenizer) -> dict[int, bytes]:
    alphabet = _byte_level_alphabet()
    added = tokenizer.get_added_tokens_decoder()
    return {
        token: bytes(alphabet[character] for character in name)
        for name, token in tokenizer.get_vocab(with_added_tokens=False).items()
        if token not in added and all(character in alphabet for character in name)
    }


def _byte_level_alphabet() -> dict[str, int]:
    """Return character -> byte as GPT-2 writes them: printable ones as themselves, the others from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + position): byte for position, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted
