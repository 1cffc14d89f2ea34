import io
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from support.gguf_files import byte_level_metadata
from support.tiny_model import make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_sidecar.runtime.models.gguf_header import GgufError
from mlx_sidecar.runtime.models.gguf_tokenizer import build_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "I'll say it's theirs, they've won; DON'T you'RE",
    "Grüße aus München, 日本語のテキスト, привет, emoji 🙂🙂",
    "aaaa aaaa aaa banana bandana ababab abab cabab",
    "  two  spaces   and\ttabs\n\nand lines\r\n  end  ",
    "x = 12345 + 678; // code {} 1000000 2024 ½ ٣٤",
    "<s x> tags </s> s> <unk> unk> <0x0A> <0x0 A> 0A> 0x41",
    "q<0x0 r<0x0 t<0x0 u<0x0 qA> rA> tA> uA>",
] * 6
TEXTS = [
    *CORPUS[:8],
    "",
    " ",
    "   a",
    "a   ",
    "\n",
    " \n\n x\n",
    "١٢٣ 12 1234567 Ⅷ ²",
    "HELLO'S 'tis it's'll",
    "日本 🙂 e\u0301 \u200b \u00a0x",
    "a\x00b\x1f\u2028c",
    "▁ ▁▁x",
    "<|end|>",
    "q<|end|> r",
]  # fmt: skip
# Characters that the pieces are made of meet more merges than arbitrary ones do.
FAMILIAR = st.text(alphabet=st.sampled_from(sorted({*"".join(CORPUS), "▁", "\x00", "丏"})), max_size=40)
LLAMA3_REGEX = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
# As the tokenizer.json files of GPT-2, SmolLM2 and Llama 3 have them.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    },
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3_REGEX}, "behavior": "Isolated", "invert": False},
            BYTE_LEVEL | {"use_regex": False},
        ],
    },
}


@cache
def published(pre: str) -> Tokenizer:
    """A byte-level tokenizer as its makers would publish it, trained on the corpus."""
    blank = json.loads(Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe")).to_str())
    tokenizer = Tokenizer.from_str(json.dumps(blank | {"pre_tokenizer": PUBLISHED[pre]}))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return tokenizer


@cache
def rebuilt(pre: str) -> Tokenizer:
    return build_tokenizer(metadata_of(byte_level_metadata(published(pre), pre)))[0]


def metadata_of(tokenizer: dict[str, Any], **changes: object) -> dict[str, Any]:
    """Metadata of a whole file; a change to None takes the key away."""
    named = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    metadata = {"general.architecture": "llama", "llama.context_length": 64, **tokenizer, **named}
    return {key: value for key, value in metadata.items() if value is not None}


def byte_level(**changes: object) -> dict[str, Any]:
    return metadata_of(byte_level_metadata(make_tokenizer(), "gpt-2"), **changes)


@cache
def trained(*, prefix: bool, byte_fallback: bool = True) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE model with Llama's settings, trained on the corpus."""
    model = io.BytesIO()
    train: Callable[..., None] = sentencepiece.SentencePieceTrainer.train
    train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=460 if byte_fallback else 220,
        byte_fallback=byte_fallback,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_number=False,
        character_coverage=1.0,
        user_defined_symbols=["<sep>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(
    model: sentencepiece.SentencePieceProcessor, *, prefix: bool, **changes: object
) -> dict[str, Any]:
    """What llama.cpp's converter writes for a SentencePiece model."""
    count = model.get_piece_size()
    pieces = [model.id_to_piece(position) for position in range(count)]

    def kind(position: int) -> int:
        if pieces[position] == "<sep>":
            return 4
        kinds = {2: model.is_unknown, 3: model.is_control, 6: model.is_byte}
        return next((number for number, test in kinds.items() if test(position)), 1)

    tokenizer = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [model.get_score(position) for position in range(count)],
        "tokenizer.ggml.token_type": [kind(position) for position in range(count)],
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return metadata_of(tokenizer, **changes)


@cache
def from_sentencepiece(*, prefix: bool, byte_fallback: bool = True) -> Tokenizer:
    model = trained(prefix=prefix, byte_fallback=byte_fallback)
    return build_tokenizer(sentencepiece_metadata(model, prefix=prefix, add_bos_token=False))[0]


def refusal(metadata: dict[str, Any]) -> str:
    with pytest.raises(GgufError) as caught:
        build_tokenizer(metadata)
    return str(caught.value)


@pytest.mark.parametrize("pre", PUBLISHED)
def test_a_byte_level_tokenizer_gives_the_published_ids(pre: str) -> None:
    for text in TEXTS:
        assert rebuilt(pre).encode(text).ids == published(pre).encode(text).ids, text


@pytest.mark.parametrize("pre", PUBLISHED)
@given(text=st.text(max_size=40) | FAMILIAR)
def test_a_byte_level_tokenizer_gives_the_published_ids_for_any_text(pre: str, text: str) -> None:
    ids = rebuilt(pre).encode(text).ids
    assert ids == published(pre).encode(text).ids
    assert rebuilt(pre).decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [("gpt-2", ["1234"]), ("smollm", ["1", "2", "3", "4"]), ("llama-bpe", ["123", "4"])],
)
def test_the_same_vocabulary_is_cut_as_the_pre_tokenizer_says(pre: str, pieces: list[str]) -> None:
    metadata = byte_level(pre=pre, token_type=None)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "12", "123", "1234"]
    tokenizer, _ = build_tokenizer(metadata | {"tokenizer.ggml.merges": ["1 2", "12 3", "123 4"]})
    assert tokenizer.encode("1234").tokens == pieces


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("gpt-2", False)])
def test_only_llama3_takes_a_word_of_its_vocabulary_that_no_merges_lead_to(pre: str, whole: bool) -> None:
    metadata = byte_level(pre=pre)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "zebra"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    tokenizer, _ = build_tokenizer(metadata)
    assert tokenizer.encode("zebra").tokens == (["zebra"] if whole else list("zebra"))


@pytest.mark.parametrize("prefix", [True, False])
@given(text=st.text(max_size=40) | FAMILIAR)
@example(text="aaaaaaaaa")
@example(text="ababababab")
@example(text="<0x0A>")
@example(text="<unk> 0A> <0x0 A>")
@example(text="  ▁  ▁▁a ")
@example(text="\x00\x00🙂")
def test_sentencepiece_gives_the_same_ids_and_text(prefix: bool, text: str) -> None:
    reference, tokenizer = trained(prefix=prefix), from_sentencepiece(prefix=prefix)
    # The names of special tokens are the one intended difference: below.
    for name in ("<s>", "</s>", "<sep>"):
        text = text.replace(name, "")
    ids = tokenizer.encode(text).ids
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("prefix", [True, False])
def test_text_never_becomes_a_byte_whose_name_it_spells(prefix: bool) -> None:
    reference, tokenizer = trained(prefix=prefix), from_sentencepiece(prefix=prefix)
    ids = tokenizer.encode("q<0x0A>").ids
    assert [reference.id_to_piece(position) for position in ids][-2:] == ["<0x0", "A>"]
    assert ids == reference.encode("q<0x0A>")


def test_the_scores_decide_and_not_the_order_of_the_vocabulary() -> None:
    reference = trained(prefix=True)
    metadata = sentencepiece_metadata(reference, prefix=True, add_bos_token=False)
    for key in ("tokens", "scores", "token_type"):
        items = metadata[f"tokenizer.ggml.{key}"]
        # The special tokens keep their places.
        metadata[f"tokenizer.ggml.{key}"] = [*items[:3], *reversed(items[3:])]
    tokenizer, _ = build_tokenizer(metadata)
    for text in TEXTS[:8]:
        if "<s>" not in text and "</s>" not in text:
            assert tokenizer.encode(text).tokens == [reference.id_to_piece(i) for i in reference.encode(text)]


@given(text=FAMILIAR)
@example(text="丏丏丏x丏")
def test_sentencepiece_without_bytes_gives_one_unknown_for_a_run(text: str) -> None:
    ids = from_sentencepiece(prefix=True, byte_fallback=False).encode(text.replace("<sep>", "")).ids
    assert ids == trained(prefix=True, byte_fallback=False).encode(text.replace("<sep>", ""))


@given(st.lists(st.integers(3, 10_000), max_size=12))
def test_sentencepiece_gives_the_same_text_for_pieces_in_any_order(numbers: list[int]) -> None:
    reference = trained(prefix=True)
    # Bytes aside: where a run of them is not UTF-8 the libraries differ, as shown below.
    ids = [
        number for number in numbers if number < reference.get_piece_size() and not reference.is_byte(number)
    ]
    assert from_sentencepiece(prefix=True).decode(ids) == reference.decode(ids)


def test_bytes_that_are_no_character_become_one_replacement_each() -> None:
    # SentencePiece keeps the "A"; Hugging Face's decoder, which this is, gives up the run as a whole.
    tokenizer, reference = from_sentencepiece(prefix=False), trained(prefix=False)
    ids = [reference.piece_to_id(piece) for piece in ("<0xE0>", "<0x41>", "and")]
    assert tokenizer.decode(ids) == "\ufffd\ufffdand"
    assert reference.decode(ids) == "\ufffdAand"


def test_the_name_of_a_control_token_in_text_becomes_the_token() -> None:
    # As in Hugging Face's tokenizers; chat templates depend on it. SentencePiece itself spells the name out.
    tokenizer, reference = from_sentencepiece(prefix=False), trained(prefix=False)
    assert tokenizer.encode("<s>dog</s>").ids[:1] == [reference.bos_id()]
    assert tokenizer.encode("<s>dog</s>").ids[-1:] == [reference.eos_id()]
    assert tokenizer.decode(tokenizer.encode("<s>dog</s>").ids) == "dog"


def test_a_user_defined_token_stays_whole_and_is_text() -> None:
    tokenizer, reference = from_sentencepiece(prefix=False), trained(prefix=False)
    text = "dog<sep>fox<sep><sep> x"
    assert tokenizer.encode(text).ids == reference.encode(text)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_text_after_an_added_token_starts_with_a_space_again() -> None:
    # As in llama.cpp and Hugging Face's Llama tokenizer; SentencePiece puts one at the very start only.
    tokenizer, reference = from_sentencepiece(prefix=True), trained(prefix=True)
    assert tokenizer.encode("<sep>fox").ids == [reference.piece_to_id("<sep>"), *reference.encode("fox")]


@pytest.mark.parametrize(
    ("asked", "begins", "ends"),
    [
        ({}, True, False),
        ({"add_bos_token": True}, True, False),
        ({"add_bos_token": False}, False, False),
        ({"add_eos_token": True}, True, True),
        ({"add_bos_token": False, "add_eos_token": True}, False, True),
    ],
)
def test_sentencepiece_models_get_the_bos_and_eos_that_they_ask_for(
    asked: dict[str, Any], begins: bool, ends: bool
) -> None:
    reference = trained(prefix=True)
    tokenizer, _ = build_tokenizer(sentencepiece_metadata(reference, prefix=True, **asked))
    expected = [*[1] * begins, *reference.encode("the dog"), *[2] * ends]
    assert tokenizer.encode("the dog").ids == expected
    assert tokenizer.encode("the dog", add_special_tokens=False).ids == reference.encode("the dog")


def test_byte_level_models_get_no_bos_unless_they_ask() -> None:
    end = make_tokenizer().token_to_id("<|end|>")
    assert build_tokenizer(byte_level(bos_token_id=end))[0].encode("he").ids != []
    assert end not in build_tokenizer(byte_level(bos_token_id=end))[0].encode("he").ids
    asked, _ = build_tokenizer(byte_level(bos_token_id=end, add_bos_token=True, add_eos_token=True))
    assert asked.encode("he").ids[0] == asked.encode("he").ids[-1] == end


def test_a_bos_token_with_a_space_in_its_name_is_one_token() -> None:
    metadata = byte_level(bos_token_id=0, add_bos_token=True)
    metadata["tokenizer.ggml.tokens"] = ["<begin here>", *metadata["tokenizer.ggml.tokens"][1:]]
    tokenizer, _ = build_tokenizer(metadata | {"tokenizer.ggml.merges": []})
    assert tokenizer.encode("he").ids[0] == 0


def test_the_config_names_the_special_tokens_and_holds_the_template() -> None:
    metadata = sentencepiece_metadata(trained(prefix=True), prefix=True, padding_token_id=2)
    _, config = build_tokenizer(metadata | {"tokenizer.chat_template": "{{ messages }}"})
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 64,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "chat_template": "{{ messages }}",
    }


@pytest.mark.parametrize("role", ["bos", "eos", "unknown", "padding"])
@pytest.mark.parametrize("position", [10_000, -1, "1", 4_294_967_295])
def test_an_id_outside_the_vocabulary_is_refused_by_name(role: str, position: object) -> None:
    metadata = sentencepiece_metadata(trained(prefix=True), prefix=True, **{f"{role}_token_id": position})
    assert f"tokenizer.ggml.{role}_token_id" in refusal(metadata)


def test_an_unknown_pre_tokenizer_is_refused_by_name() -> None:
    message = refusal(byte_level(pre="deepseek-llm"))
    assert "'deepseek-llm'" in message
    assert "smollm" in message


def test_an_unknown_kind_of_tokenizer_is_refused_by_name() -> None:
    assert "'rwkv'" in refusal(byte_level(model="rwkv"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tokens": None}, "no tokenizer"),
        ({"tokens": []}, "no tokenizer"),
        ({"tokens": "abc"}, "tokens is not a list of str"),
        ({"tokens": [1, 2]}, "tokens is not a list of str"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "the same token twice"),
        ({"token_type": [1]}, "no type for every token"),
        ({"token_type": ["x"]}, "token_type is not a list of int"),
        ({"merges": ["hello"]}, "merges is damaged"),
        ({"merges": ["zz yy"]}, "merges is damaged"),
        ({"merges": ["h z"]}, "merges is damaged"),
        ({"merges": [7]}, "merges is not a list of str"),
        ({"pre": None}, "pre-tokenizer is 'None'"),
        ({"add_bos_token": True}, "asks for a BOS or EOS token"),
    ],
)
def test_a_damaged_byte_level_vocabulary_is_refused(changes: dict[str, Any], problem: str) -> None:
    assert problem in refusal(byte_level(**changes))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scores": None}, "no score for every token"),
        ({"scores": [0.0]}, "no score for every token"),
        ({"scores": ["x"]}, "scores is not a list of float"),
        ({"bos_token_id": None}, "asks for a BOS or EOS token"),
    ],
)
def test_a_damaged_sentencepiece_vocabulary_is_refused(changes: dict[str, Any], problem: str) -> None:
    assert problem in refusal(sentencepiece_metadata(trained(prefix=True), prefix=True, **changes))
