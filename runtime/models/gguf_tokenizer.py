"""A `tokenizers` tokenizer out of GGUF metadata: byte-level BPE and SentencePiece-style BPE.

Sources: the GGUF specification for the keys; for the merge order of SentencePiece vocabularies (which store
scores, not merges) the rule that a merge ranks by the score of the piece it makes.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .gguf_header import GgufError

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Metadata = dict[str, Any]
ItemT = TypeVar("ItemT")


def build_tokenizer(metadata: Metadata) -> tuple[Tokenizer, Metadata]:
    """Return the tokenizer and its `tokenizer_config.json`.

    Raises:
        GgufError: the metadata is incomplete or names a kind of tokenizer that cannot be rebuilt exactly.
    """
    tokens = _items(metadata, "tokens", str)
    kind = metadata.get("tokenizer.ggml.model")
    if not tokens:
        raise GgufError("the file has no tokenizer")
    if len(set(tokens)) != len(tokens):
        raise GgufError("the vocabulary has the same token twice")
    types = _items(metadata, "token_type", int) or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise GgufError("the vocabulary has no type for every token")
    if kind == "gpt2":
        tokenizer = _byte_level(tokens, metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece(tokens, types, metadata)
    else:
        raise GgufError(f"its tokenizer is of kind {kind!r}; only 'gpt2' and 'llama' can be rebuilt")
    _add_tokens(tokenizer, tokens, types)
    _add_template(tokenizer, tokens, metadata)
    return tokenizer, _config(tokens, metadata)


def token_id(metadata: Metadata, role: str) -> int | None:
    """Return the id that the file gives for `role`, such as "bos", if it names one.

    Raises:
        GgufError: the vocabulary has no such id.
    """
    position = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if position is None:
        return None
    if not isinstance(position, int) or not 0 <= position < len(metadata["tokenizer.ggml.tokens"]):
        raise GgufError(f"tokenizer.ggml.{role}_token_id is not an id of its vocabulary")
    return position


def _items(metadata: Metadata, key: str, kind: type[ItemT]) -> list[ItemT]:
    items = metadata.get(f"tokenizer.ggml.{key}", [])
    if not isinstance(items, list) or not all(isinstance(item, kind) for item in cast(list[Any], items)):
        raise GgufError(f"tokenizer.ggml.{key} is not a list of {kind.__name__}")
    return cast(list[ItemT], items)


def _byte_level(tokens: list[str], metadata: Metadata) -> Tokenizer:
    pre = str(metadata.get("tokenizer.ggml.pre"))
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise GgufError(f"its pre-tokenizer is {pre!r}; known ones are {known}")
    merges = [cast(tuple[str, str], merge.partition(" ")[::2]) for merge in _items(metadata, "merges", str)]
    vocabulary = {token: position for position, token in enumerate(tokens)}
    # Not by subtracting sets: that would go through the whole vocabulary for each merge.
    if not all(part in vocabulary for left, right in merges for part in (left, right, left + right)):
        raise GgufError("the list of merges is damaged")
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": _llama3,
}


def _sentencepiece(tokens: list[str], types: list[int], metadata: Metadata) -> Tokenizer:
    scores = _items(metadata, "scores", float)
    if len(scores) != len(tokens):
        raise GgufError("the vocabulary has no score for every token")
    vocabulary = {token: position for position, token in enumerate(tokens)}
    # Only text is merged: a control, byte or unknown piece never comes from the characters of its name.
    ranks = {
        token: -score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL
    }
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(ranks, vocabulary),
            unk_token=tokens[token_id(metadata, "unknown") or 0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(ranks: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, rank in ranks.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ranks and right in ranks:
                ranked.append((rank, vocabulary[left], vocabulary[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    plain = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if tokenizer.get_vocab_size() != len(tokens):
        raise GgufError("the rebuilt tokenizer has another number of tokens than the file")


def _add_template(tokenizer: Tokenizer, tokens: list[str], metadata: Metadata) -> None:
    # llama.cpp's default where the key is absent: SentencePiece models start with BOS, the others do not.
    wants_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama")
    wants_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    ids = {name: token_id(metadata, name) for name in ("bos", "eos")}
    wanted = [name for name, wants in (("bos", wants_bos), ("eos", wants_eos)) if wants]
    if any(ids[name] is None for name in wanted):
        raise GgufError("the tokenizer asks for a BOS or EOS token that the file does not name")
    if not wanted:
        return
    pieces = {name: tokens[ids[name] or 0] for name in wanted}
    single = [*(["bos"] if "bos" in wanted else []), "$A", *(["eos"] if "eos" in wanted else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[pieces.get(name, name) for name in single],
        special_tokens=[(pieces[name], ids[name]) for name in wanted],
    )


def _config(tokens: list[str], metadata: Metadata) -> Metadata:
    config: Metadata = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata['general.architecture']}.context_length"),
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        position = token_id(metadata, key)
        if position is not None:
            config[f"{role}_token"] = tokens[position]
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return config
