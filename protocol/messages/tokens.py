"""tokenize and detokenize."""

from msgspec import UNSET, UnsetType

from .base import ModelName, Params, Result, Text, TokenIds
from .generate import Messages


class TokenizeParams(Params):
    """One of `text` and `messages`. `addSpecialTokens` is for a text; a chat template brings its own."""

    model: ModelName
    text: Text | UnsetType = UNSET
    messages: Messages | UnsetType = UNSET
    add_special_tokens: bool = True


class TokenizeResult(Result):
    """Ids in the order of the text."""

    tokens: list[int]


class DetokenizeParams(Params):
    """Ids to turn into text; special tokens are left out unless asked for."""

    model: ModelName
    tokens: TokenIds
    skip_special_tokens: bool = True


class DetokenizeResult(Result):
    """Text of the ids; bytes that are not UTF-8 appear as U+FFFD."""

    text: str
