from typing import Any

import pytest

from mlx_sidecar.conformance.matchers import Matcher, PatternError, check_pattern


def mismatch(pattern: Any, value: Any) -> str | None:
    return Matcher({"t": ("aé", [1, 2])}).mismatch(pattern, value)


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        (1, 1),
        ("a", "a"),
        (None, None),
        ([1, [2]], [1, [2]]),
        ({"a": 1}, {"a": 1, "more": 2}),
        ({"a": 1, "$closed": True}, {"a": 1}),
        ({"a": "$absent"}, {}),
        ({"a": {"b": "$any"}}, {"a": {"b": None}}),
        (1.5, 1.5),
        (2.0, 2),
        ("$string", ""),
        ("$integer", -3),
        ("$number", 0.5),
        ("$boolean", False),
        ("$object", {}),
        ("$array", []),
        ("$range:1..3", 1),
        ("$range:1..3", 3),
        ("$range:-0.5..", 1e9),
        ("$range:..0", -1),
        ("$contains:mid", "amidst"),
        ('$one-of:[null, "a", [1]]', [1]),
        ("$text-of:t", "aé"),
        ("$tokens-of:t", [1, 2]),
        (["$some", 2, "$string"], [1, 2, "x"]),
        (["$each", "$integer"], [1, 2, 3]),
        (["$any-order", {"id": 1}, {"id": 2}], [{"id": 2}, {"id": 1}]),
        ("$/progress", "$/progress"),
        ("$1", "$1"),
    ],
)
def test_a_value_that_is_like_its_pattern(pattern: Any, value: Any) -> None:
    assert mismatch(pattern, value) is None


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        (1, 1.0),
        (1, True),
        (1, "1"),
        (0, False),
        (None, 0),
        (1.5, "1.5"),
        (2.0, True),
        ([1], [1, 2]),
        ([1], 1),
        ({"a": None}, {}),
        ({"a": 1}, [1]),
        ({"a": 1, "$closed": True}, {"a": 1, "b": 2}),
        ({"a": "$absent"}, {"a": None}),
        ({"a": "$any"}, {}),
        ("$string", 1),
        ("$integer", 1.0),
        ("$integer", True),
        ("$number", "1"),
        ("$number", True),
        ("$boolean", 0),
        ("$object", []),
        ("$array", {}),
        ("$range:1..3", 0),
        ("$range:1..3", 4),
        ("$range:1..", "1"),
        ("$contains:mid", "mi"),
        ("$contains:1", 1),
        ("$one-of:[1, null]", 1.0),
        ("$text-of:t", "a"),
        ("$text-of:unknown", "a"),
        ("$tokens-of:t", [2, 1]),
        (["$some", 2, 2], [1, 2]),
        (["$each", "$integer"], []),
        (["$each", "$integer"], [1, "2"]),
        (["$any-order", 1], [1, 1]),
        (["$any-order", 1, 2], [1, 1]),
        ("$/progress", "$/other"),
    ],
)
def test_a_value_that_is_not(pattern: Any, value: Any) -> None:
    assert mismatch(pattern, value) is not None


def test_the_place_of_a_difference_is_told() -> None:
    problem = mismatch({"a": [1, {"b": "$integer"}]}, {"a": [1, {"b": "x"}]})
    assert problem == 'a[1].b: expected $integer, got "x"'
    assert mismatch({"a": 1}, {}) == "a: expected 1, got nothing"


def test_values_are_saved_only_by_a_comparison_that_succeeds() -> None:
    matcher = Matcher()
    assert matcher.mismatch({"a": "$integer>first", "b": ["$any>second"]}, {"a": 1, "b": [None]}) is None
    assert matcher.saves == {"first": 1, "second": None}
    assert matcher.mismatch({"a": "$integer>first", "b": 2}, {"a": 5, "b": 3}) is not None
    assert matcher.mismatch("$any", 0) is None
    assert matcher.saves == {}


@pytest.mark.parametrize(
    "pattern", ["$integr", "$range", "$range:a..b", "$string:x", {"a": ["$none-of:[1]"]}, ["$some", "$no"]]
)
def test_a_matcher_that_does_not_exist_is_a_mistake_of_the_transcript(pattern: Any) -> None:
    with pytest.raises(PatternError):
        check_pattern(pattern)
