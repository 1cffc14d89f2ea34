from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mlx_sidecar.runtime.text.stop_strings import StopStrings


def run(stops: list[str], *pieces: str) -> tuple[list[str], bool]:
    matcher = StopStrings(stops)
    shown: list[str] = []
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        shown.append(text)
        if stopped:
            return shown, True
    return [*shown, matcher.finish()], False


def test_without_stop_strings_text_passes_through_at_once() -> None:
    assert run([], "a", "b") == (["a", "b", ""], False)


def test_text_before_a_stop_string_is_shown_and_nothing_of_it() -> None:
    assert run(["END"], "one END two") == (["one "], True)


def test_a_stop_string_across_pieces_is_found_and_its_beginning_never_shown() -> None:
    assert run(["END"], "one E", "N", "D two") == (["one ", "", ""], True)


def test_a_false_start_is_shown_as_soon_as_it_is_known_to_be_one() -> None:
    assert run(["END"], "a E", "X") == (["a ", "EX", ""], False)


def test_a_beginning_that_never_became_a_stop_string_is_shown_at_the_end() -> None:
    assert run(["END"], "a EN") == (["a ", "EN"], False)


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert run(["abc", "b"], "xabc") == (["xa"], True)


def test_of_two_stop_strings_that_end_together_the_longer_wins() -> None:
    assert run(["c", "bc"], "abc") == (["a"], True)


def test_overlapping_beginnings_are_kept_apart() -> None:
    assert run(["aab"], "a", "a", "a", "b") == (["", "", "a", ""], True)


def first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The meaning, character by character: the answer ends as soon as it ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(len(stop) for stop in found)], True
    return text, False


@given(
    st.text(alphabet="abc", max_size=30),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_the_cuts_between_pieces_make_no_difference(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges)]
    shown, stopped = run(stops, *pieces)
    assert ("".join(shown), stopped) == first_stop(text, stops)
