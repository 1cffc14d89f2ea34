"""One model's text side: encode, decode, template, and what ends an answer.

The tokenizer of the `tokenizers` library is used directly, from `tokenizer.json`. A folder without that file
goes through transformers, which can build one and costs over a second to import.
"""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from mlx_sidecar.protocol.errors import Unsupported
from mlx_sidecar.protocol.messages import Message

from .chat_template import ChatTemplate
from .detokenizer import Detokenizer, byte_tokens

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
        # Remains of training in some tokenizer.json: they would cut or pad every prompt in silence.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = _template(folder, config)
        self._bos = _content(config.get("bos_token"))
        self._bytes = byte_tokens(self._tokenizer)
        self.eos_ids = _eos_ids(folder, config, self._tokenizer)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, with the tokens that the model wants around it if `special_tokens`.

        A text that begins with the beginning-of-sequence token itself does not get a second one.

        Raises:
            Unsupported: the tokenizer fails on this text.
        """
        if self._bos and text.startswith(self._bos):
            special_tokens = False
        # The batch calls, here and below, let other threads run; the plain ones hold the interpreter.
        with _panics_as(Unsupported("The model's tokenizer cannot work on this text. Send another one.")):
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

    def stream(self) -> Detokenizer:
        """Return a fresh incremental decoder."""
        return Detokenizer(self._tokenizer, self._bytes)


def _load(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if path.exists():
        problem = ValueError("its tokenizer.json cannot be read")
        try:
            with _panics_as(problem):
                return Tokenizer.from_file(str(path))
        except Exception as error:
            raise problem from error
    return _load_with_transformers(folder)


@contextmanager
def _panics_as(problem: Exception) -> Generator[None]:
    """Raise `problem` where Rust code panics, which is no Exception."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise problem from panic


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
        token = cast(dict[str, Any], token).get("content")
    return token if isinstance(token, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {path.name} is not valid JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"its {path.name} is not a JSON object")
    return cast(dict[str, Any], value)
