import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sidecar.config.fields import FIELDS
from mlx_sidecar.config.settings import Preload
from mlx_sidecar.config.values import BadValueError, check, parse, plain, shown, unknown

HERE = Path("/here")


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("0", 0),
        ("-5", -5),
        ("1.5", 1.5),
        ("1e3", 1000.0),
    ],
)
def test_unquoted_text_means_what_it_does_in_json(text: str, meaning: Any) -> None:
    assert plain(text) == meaning
    assert type(plain(text)) is type(meaning)


@pytest.mark.parametrize(
    "text",
    ["yes", "no", "on", "off", "y", "~", "010", "0x1F", "0o17", "1_000", "1:30", ".5", "+5", ".inf", "NaN"],
)
def test_what_yaml_1_1_would_guess_is_text(text: str) -> None:
    assert plain(text) == text


@given(st.integers())
def test_whole_numbers_are_themselves(number: int) -> None:
    assert plain(str(number)) == number


@given(st.text())
def test_any_text_means_something(text: str) -> None:
    plain(text)


@pytest.mark.parametrize("key", ["max_waiting", "ageing_ms", "stall_ms", "max_connections"])
@given(
    value=st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.none(), st.lists(st.integers()))
)
def test_a_number_is_within_its_bounds_or_refused(key: str, value: Any) -> None:
    field = FIELDS[key]
    assert field.bounds is not None
    least, most = field.bounds
    if type(value) is int and least <= value <= most:
        assert check(field, value, HERE) == value
        return
    with pytest.raises(BadValueError, match=f"is not a whole number from {least} to {most}"):
        check(field, value, HERE)


def test_only_booleans_are_booleans() -> None:
    assert check(FIELDS["evict_models"], False, HERE) is False
    for wrong in (0, 1, "yes", "true", None):
        with pytest.raises(BadValueError, match="is not true or false"):
            check(FIELDS["evict_models"], wrong, HERE)


def test_a_choice_is_one_of_them() -> None:
    assert check(FIELDS["log_level"], "debug", HERE) == "debug"
    with pytest.raises(BadValueError, match='"DEBUG" is not one of debug, info, warning, error'):
        check(FIELDS["log_level"], "DEBUG", HERE)


def test_null_leaves_it_to_the_machine_where_it_may() -> None:
    assert check(FIELDS["memory_budget_bytes"], None, HERE) is None
    with pytest.raises(BadValueError, match="null is not a whole number from 1"):
        check(FIELDS["max_waiting"], None, HERE)
    with pytest.raises(BadValueError, match="or null"):
        check(FIELDS["memory_budget_bytes"], "much", HERE)


@pytest.mark.parametrize(
    ("text", "path"),
    [("/a/b", Path("/a/b")), ("b", HERE / "b"), ("~", Path.home()), ("~/b", Path.home() / "b")],
)
def test_a_path_starts_at_the_folder_it_is_written_in(text: str, path: Path) -> None:
    assert check(FIELDS["home"], text, HERE) == path


@pytest.mark.parametrize("wrong", ["", "a\0b", 5, True, ["a"], "~nobody-of-that-name/b"])
def test_what_is_no_path_is_refused(wrong: Any) -> None:
    with pytest.raises(BadValueError):
        check(FIELDS["home"], wrong, HERE)


def test_models_to_preload_are_structs() -> None:
    value = [{"model": "m", "pin": True, "ttl_ms": None}, {"model": "n"}]
    models = check(FIELDS["models_preload"], value, HERE)
    assert models == [Preload(model="m", pin=True, ttl_ms=None), Preload(model="n")]


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ([{"alias": "a"}], "[0]"),
        ([{"model": "m"}, {"model": 5}], "[1].model"),
        ([{"model": ""}], "[0].model"),
        ([{"model": "m", "dtype": "int3"}], "[0].dtype"),
        ([{"model": "m", "tl_ms": 5}], "[0]"),
        (["m"], "[0]"),
        ({"model": "m"}, ""),
    ],
)
def test_an_error_inside_a_list_says_where(value: Any, path: str) -> None:
    with pytest.raises(BadValueError) as caught:
        check(FIELDS["models_preload"], value, HERE)
    assert caught.value.path == path


def test_texts_of_variables_and_flags_are_taken_as_they_are_meant() -> None:
    assert parse(FIELDS["home"], "123") == "123"
    assert parse(FIELDS["max_sequences"], "null") is None
    assert parse(FIELDS["evict_models"], "false") is False
    assert parse(FIELDS["models_preload"], '[{"model":"m"}]') == [{"model": "m"}]
    with pytest.raises(BadValueError, match="is not JSON"):
        parse(FIELDS["models_preload"], "- m")


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists))
def test_a_value_is_shown_in_a_line(value: Any) -> None:
    assert re.fullmatch(r"[^\n]{1,61}", shown(value))


def test_a_name_that_is_nearly_right_gets_a_suggestion() -> None:
    assert unknown("max_waitng", list(FIELDS)) == "unknown. Did you mean max_waiting?"
    assert unknown("zzz", list(FIELDS)) == "unknown."
