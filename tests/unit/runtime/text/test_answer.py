from hypothesis import given
from hypothesis import strategies as st
from support.tiny_model import make_tokenizer

from mlx_sidecar.runtime.text.answer import Answer, Piece
from mlx_sidecar.runtime.text.detokenizer import Detokenizer, byte_tokens

TOKENIZER = make_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def pieces(tokens: list[int], *stops: str) -> tuple[list[Piece], Answer]:
    answer = Answer(Detokenizer(TOKENIZER, byte_tokens(TOKENIZER)), list(stops))
    found: list[Piece | None] = []
    for token in tokens:
        found.append(answer.feed(token))
        if answer.stopped:
            break
    found.append(answer.finish())
    return [piece for piece in found if piece is not None], answer


def test_each_token_of_plain_text_is_a_piece() -> None:
    found, _ = pieces(ids("hello world"))
    assert [piece.text for piece in found] == ["hello", " world"]


def test_the_ids_of_a_character_in_parts_come_with_the_character() -> None:
    found, _ = pieces(ids("a🙂"))
    assert found == [Piece("a", ids("a")), Piece("🙂", ids("🙂"))]


def test_the_ids_of_a_stop_string_come_with_the_last_piece() -> None:
    found, answer = pieces(ids("xyz and more"), "yz")
    assert found == [Piece("x", ids("x")), Piece("", ids("yz"))]
    assert answer.stopped


def test_after_a_stop_string_there_is_nothing_left_to_say() -> None:
    _, answer = pieces(ids("yz"), "yz")
    assert answer.finish() is None


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40))
def test_every_id_is_told_once_and_in_order(tokens: list[int]) -> None:
    found, answer = pieces(tokens)
    assert [token for piece in found for token in piece.tokens] == tokens
    assert answer.token_count == len(tokens)


@given(st.text(alphabet="abé🙂", max_size=20))
def test_what_is_held_for_a_stop_string_comes_out_at_the_end(text: str) -> None:
    found, _ = pieces(ids(text), "ab🙂STOP")
    assert "".join(piece.text for piece in found) == text
