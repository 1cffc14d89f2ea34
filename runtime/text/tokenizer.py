"""One model's text side: encode, decode, template, and what ends an answer.

The tokenizer of the `tokenizers` library is used directly, from `tokenizer.json`. A folder without that file
goes through transformers, which can build one and costs over a second to import.
"""

import codecs
import json
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from mlx_sidecar.protocol.errors import Unsupported
from mlx_sidecar.protocol.messages import Message

from .chat_template import ChatTemplate

_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class ModelTokenizer:
    """Text to ids and back, for one model. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer files of a model folder.

        Raises:
            ValueError: the files are missing or damaged; the message names the problem without paths.
        """
        config = _read_json(folder / "tokenizer_config.json")
        self._tokenizer = _load(folder)
        self._template = _template(folder, config)
        self._bos = _content(config.get("bos_token"))
        self._bytes = byte_tokens(self._tokenizer)
        self.eos_ids = _eos_ids(folder, config, self._tokenizer)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, with the tokens that the model wants around it if `special_tokens`.

        A text that begins with the beginning-of-sequence token itself does not get a second one.
        """
        if self._bos and text.startswith(self._bos):
            special_tokens = False
        # The batch calls, here and below, let other threads run; the plain ones hold the interpreter.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special_tokens)
        return encoding.ids

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Return the ids of the rendered messages; the template has already put the special tokens in.

        Raises:
            Unsupported: the model has no chat template.
            InvalidParams: the template refuses the messages.
        """
        if self._template is None:
            raise Unsupported("The model has no chat template. Send 'prompt' instead of 'messages'.")
        return self.encode(self._template.render(messages), special_tokens=False)

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        (text,) = self._tokenizer.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return text

    def stream(self) -> "Detokenizer":
        """Return a fresh incremental decoder."""
        return Detokenizer(self._tokenizer, self._bytes)


class Detokenizer:
    """Ids to text, one at a time. What is given out never changes later and never ends inside a character.

    Tokens that stand for single bytes (SentencePiece's byte fallback) are put together here. The library
    reads a run of them as a whole and takes back what it gave out when a later byte is wrong, so that its
    stream raises; here valid characters stay and wrong bytes become U+FFFD, as in SentencePiece itself.
    """

    def __init__(self, tokenizer: Tokenizer, byte_of: dict[int, bytes]) -> None:
        self._tokenizer = tokenizer
        self._byte_of = byte_of
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._stream = DecodeStream(skip_special_tokens=True)
        self._others: list[int] = []
        self._given = 0
        self._holding = False

    def feed(self, token: int) -> str:
        """Return the text that `token` completes; empty while a character is unfinished."""
        byte = self._byte_of.get(token)
        if byte is None:
            return self._bytes.decode(b"", final=True) + self._feed_other(token)
        if not self._others:
            # Text has begun, and the library must not take what follows for its beginning.
            self._feed_other(next(other for other, value in self._byte_of.items() if value == b"A"))
        return self._bytes.decode(byte)

    def finish(self) -> str:
        """Return held text that is complete; the bytes of a character that never was are dropped."""
        if not self._holding:
            return ""
        text = self._tokenizer.decode(self._others, skip_special_tokens=True)
        return text[self._given :].rstrip("\ufffd")

    def _feed_other(self, token: int) -> str:
        self._others.append(token)
        text = self._stream.step(self._tokenizer, token) or ""
        self._holding = not text
        self._given += len(text)
        return text


def byte_tokens(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Return the ids that stand for one byte each, if the tokenizer decodes `<0x41>` as "A"; else nothing."""
    names = {bytes([byte]): tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    letter = names[b"A"]
    if letter is None or tokenizer.decode([letter]) != "A":
        return {}
    return {token: byte for byte, token in names.items() if token is not None}


def _load(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:
            raise ValueError("its tokenizer.json cannot be read") from error
    return _load_with_transformers(folder)


def _load_with_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        slow: Any = cast(Any, AutoTokenizer).from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise ValueError("it has no tokenizer that can be read") from error
    backend = getattr(slow, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError("its tokenizer has no fast form")
    return backend


def _template(folder: Path, config: dict[str, Any]) -> ChatTemplate | None:
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    if isinstance(source, list):
        named = cast(list[dict[str, str]], source)
        source = next((entry["template"] for entry in named if entry.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    tokens = {role: _content(config.get(role)) for role in _SPECIAL_ROLES}
    return ChatTemplate(source, {role: token for role, token in tokens.items() if token is not None})


def _eos_ids(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """Collect every id that ends an answer; model makers spread them over three files."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        ids.update(cast(list[int], value) if isinstance(value, list) else [])
        ids.update([value] if isinstance(value, int) else [])
    token = _content(config.get("eos_token"))
    if token is not None and (position := tokenizer.token_to_id(token)) is not None:
        ids.add(position)
    return frozenset(ids)


def _content(token: Any) -> str | None:
    """Return the text of a special token, which older folders write as an object."""
    if isinstance(token, dict):
        return cast(dict[str, str], token).get("content")
    return token if isinstance(token, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"its {path.name} is not valid JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"its {path.name} is not a JSON object")
    return cast(dict[str, Any], value)
