"""tokenize, detokenize, and the ids of a prompt."""

from msgspec import UNSET, UnsetType

from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import InvalidParams

from ..models.loaded import LoadedModel
from ..models.registry import ModelRegistry
from ..pool import Pool
from ..server.connection import Call


class TokensApi:
    """Text to ids and back, off the event loop."""

    def __init__(self, registry: ModelRegistry, pool: Pool) -> None:
        self._registry = registry
        self._pool = pool

    async def tokenize(self, params: m.TokenizeParams, _: Call) -> m.TokenizeResult:
        """Return the ids of a text or of rendered messages."""
        only_one("text", {"text": params.text, "messages": params.messages})
        model = await self._registry.known(params.model)
        tokens = await self._pool.run(encode, model, params.messages, params.text, params.add_special_tokens)
        return m.TokenizeResult(tokens=tokens)

    async def detokenize(self, params: m.DetokenizeParams, _: Call) -> m.DetokenizeResult:
        """Return the text of ids."""
        model = await self._registry.known(params.model)
        check_ids(params.tokens, model)
        text = await self._pool.run(
            lambda: model.tokenizer.decode(params.tokens, skip_special_tokens=params.skip_special_tokens)
        )
        return m.DetokenizeResult(text=text)


def only_one(first: str, choices: dict[str, object]) -> None:
    """Raise InvalidParams unless exactly one of `choices` was sent; `first` is named when none was."""
    given = [name for name, value in choices.items() if value is not UNSET]
    names = " or ".join(f"'{name}'" for name in choices)
    if not given:
        raise InvalidParams(first, f"is required: send {names}")
    if len(given) > 1:
        raise InvalidParams(given[1], f"send only one of {names}")


def check_ids(tokens: list[int], model: LoadedModel) -> None:
    """Raise InvalidParams for the first id that the model's vocabulary does not have."""
    size = model.facts.vocabulary
    if tokens and max(tokens) >= size:
        position = next(index for index, token in enumerate(tokens) if token >= size)
        raise InvalidParams(f"tokens[{position}]", f"the vocabulary has {size} ids, from 0 to {size - 1}")


def encode(
    model: LoadedModel,
    messages: list[m.Message] | UnsetType,
    text: str | UnsetType,
    special_tokens: bool = True,
) -> list[int]:
    """Return the ids of whichever of the two is set; slow for long texts, so call it in the pool."""
    if isinstance(text, str):
        return model.tokenizer.encode(text, special_tokens=special_tokens)
    assert isinstance(messages, list)
    return model.tokenizer.encode_chat(messages)
