import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_model import make_tiny_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing

from mlx_sidecar.protocol.errors import Unsupported
from mlx_sidecar.protocol.messages import Message
from mlx_sidecar.runtime.text.detokenizer import Detokenizer, byte_tokens
from mlx_sidecar.runtime.text.tokenizer import ModelTokenizer

TOKENIZER = make_tokenizer()
IDS = st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=60)


def stream(ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER, byte_tokens(TOKENIZER))
    return [*(detokenizer.feed(token) for token in ids), detokenizer.finish()]


@given(IDS)
def test_streamed_text_is_the_text_of_all_ids_less_an_unfinished_character(ids: list[int]) -> None:
    assert "".join(stream(ids)).rstrip("\ufffd") == TOKENIZER.decode(ids).rstrip("\ufffd")


@given(IDS)
def test_what_was_given_out_is_a_beginning_of_what_follows(ids: list[int]) -> None:
    for end in range(len(ids)):
        given_out = "".join(stream(ids[:end])[:-1])
        assert TOKENIZER.decode(ids).startswith(given_out)


@given(st.text(max_size=20))
def test_any_text_survives_the_way_there_and_back(text: str) -> None:
    assert "".join(stream(TOKENIZER.encode(text).ids)) == text


def test_a_character_in_several_tokens_is_given_out_whole() -> None:
    ids = TOKENIZER.encode("a🙂b").ids
    assert len(ids) > 3
    assert [piece for piece in stream(ids) if piece] == ["a", "🙂", "b"]


def test_a_special_token_inside_a_character_does_not_break_it() -> None:
    start, *rest = TOKENIZER.encode("🙂").ids
    end: int = TOKENIZER.encode("<|end|>").ids[0]
    ids = [start, end, *rest]
    assert "".join(stream(ids)) == "🙂"


def test_the_replacement_character_itself_is_a_character() -> None:
    assert "".join(stream(TOKENIZER.encode("a\ufffd").ids)) == "a\ufffd"


def test_an_unfinished_character_at_the_end_is_never_given_out() -> None:
    ids = TOKENIZER.encode("a🙂").ids
    assert "".join(stream(ids[:-1])) == "a"


def test_special_tokens_are_not_text() -> None:
    ids = TOKENIZER.encode("a<|end|>b").ids
    assert "".join(stream(ids)) == "ab"


def make_byte_fallback_tokenizer() -> Tokenizer:
    """A tokenizer in the manner of SentencePiece: words with "▁" for a space, single bytes for the rest."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "é", "▁🙂"]
    vocabulary = {word: position for position, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_FALLBACK = make_byte_fallback_tokenizer()


def stream_bytes(ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(BYTE_FALLBACK, byte_tokens(BYTE_FALLBACK))
    return [*(detokenizer.feed(token) for token in ids), detokenizer.finish()]


def meaning(ids: list[int]) -> str:
    """The bytes that the tokens stand for, read as UTF-8, without the space that begins every text."""
    names = [BYTE_FALLBACK.id_to_token(token) for token in ids]
    pieces = [
        bytes([int(name[3:5], 16)]) if name.startswith("<0x") else name.replace("▁", " ").encode()
        for name in names
        if name is not None
    ]
    text = b"".join(pieces).decode("utf-8", "replace")
    return text[1:] if names and names[0] is not None and names[0].startswith("▁") else text


@given(st.lists(st.integers(1, BYTE_FALLBACK.get_vocab_size() - 1), max_size=30))
def test_bytes_in_any_order_never_fail_and_valid_characters_stay(ids: list[int]) -> None:
    assert "".join(stream_bytes(ids)).rstrip("\ufffd") == meaning(ids).rstrip("\ufffd")


@given(st.text(max_size=20))
def test_text_out_of_single_bytes_is_given_out_character_by_character(text: str) -> None:
    ids = [BYTE_FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    pieces = stream_bytes([token for token in ids if token is not None])
    assert [piece for piece in pieces if piece] == list(text)


def test_an_unfinished_character_out_of_single_bytes_is_never_given_out() -> None:
    ids = [BYTE_FALLBACK.token_to_id(name) for name in ("a", "<0xF0>", "<0x9F>", "<0x99>")]
    assert stream_bytes([token for token in ids if token is not None]) == ["a", "", "", "", ""]


def test_a_folder_gives_encode_decode_template_and_ends(tiny_model: Path) -> None:
    tokenizer = ModelTokenizer(tiny_model)
    ids = tokenizer.encode_chat([Message(role="user", content="hello world")])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>hello world<|end|><|assistant|>"
    assert tokenizer.decode(ids) == "hello world"
    assert tokenizer.eos_ids == {TOKENIZER.token_to_id("<|end|>")}


def test_a_prompt_gets_one_beginning_whether_it_brings_it_or_not(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    with_bos = make_tokenizer()
    bos = with_bos.token_to_id("<|system|>")
    with_bos.post_processor = TemplateProcessing(single="<|system|> $A", special_tokens=[("<|system|>", bos)])
    with_bos.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|system|>"}}))
    tokenizer = ModelTokenizer(folder)
    assert tokenizer.encode("he") == tokenizer.encode("<|system|>he") == [bos, *TOKENIZER.encode("he").ids]
    assert tokenizer.encode("he", special_tokens=False) == TOKENIZER.encode("he").ids


def test_ends_are_collected_from_every_file_that_names_them(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    end = TOKENIZER.token_to_id("<|end|>")
    assert ModelTokenizer(folder).eos_ids == {3, 4, end}


def test_a_template_file_wins_over_the_one_in_the_config(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    ids = ModelTokenizer(folder).encode_chat([Message(role="user", content="he")])
    assert ModelTokenizer(folder).decode(ids) == "he!"


def test_a_model_without_template_takes_no_messages(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(Unsupported, match="no chat template"):
        ModelTokenizer(folder).encode_chat([Message(role="user", content="he")])


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_other_threads_run_while_a_long_text_is_worked_on(tiny_model: Path, direction: str) -> None:
    tokenizer = ModelTokenizer(tiny_model)
    text = "hello world " * 100_000
    ids = tokenizer.encode(text)
    work = threading.Thread(target=tokenizer.encode if direction == "encode" else tokenizer.decode,
                            args=[text if direction == "encode" else ids])  # fmt: skip
    turns = 0
    work.start()
    while work.is_alive():
        turns += 1
        work.join(0.0001)
    # Held throughout, the interpreter would come back to this loop once or twice.
    assert turns > 20


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "not json"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}'),
    ],
)
def test_damaged_files_are_named_without_their_path(tmp_path: Path, name: str, content: str) -> None:
    folder = make_tiny_model(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match="its ") as caught:
        ModelTokenizer(folder)
    assert str(tmp_path) not in str(caught.value)
