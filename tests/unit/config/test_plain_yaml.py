import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlx_sidecar.config.plain_yaml import entries
from mlx_sidecar.config.values import ConfigError

FILE = Path("/a/runtime.yaml")


def read(text: str) -> dict[str, tuple[Any, int]]:
    return {key: (entry.value, entry.line) for key, entry in entries(text, FILE).items()}


def test_keys_come_with_their_lines() -> None:
    text = "# why\nmax_waiting: 5\n\nlog_level: info # quiet\n"
    assert read(text) == {"max_waiting": (5, 2), "log_level": ("info", 4)}


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n", "\ufeff# a mark\n"])
def test_a_file_may_say_nothing(text: str) -> None:
    assert read(text.removeprefix("\ufeff")) == {}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("yes", "yes"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("0o17", "0o17"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("'5'", "5"),
        ('"true"', "true"),
        ("5", 5),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1, on, 'x']", [1, "on", "x"]),
        ("{a: 1}", {"a": 1}),
        ("|\n  5", "5"),
    ],
)
def test_values_mean_what_they_look_like(written: str, value: Any) -> None:
    assert read(f"key: {written}") == {"key": (value, 1)}


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a: it is set already on line 1"),
        ("a: {b: 1, b: 2}\n", 1, "b: it is set already"),
        ("a: 1\nb: &x 2\nc: *x\n", 2, "anchors and aliases"),
        ("a: 1\nb: *x\n", 2, "anchors and aliases"),
        ("a: !!python/object:os.system 1\n", 1, "tags are not supported"),
        ("a: !!int '5'\n", 1, "tags are not supported"),
        ("a: 1\n\tb: 2\n", 2, "tab"),
        ("a:\n\tb: 2\n", 2, "tab"),
        ("- a\n- b\n", 1, "lines of `key: value`"),
        ("max_waiting\n", 1, "lines of `key: value`"),
        ("a: [1, 2\nb: 2\n", 2, "expected"),
        ("a: 'never closed\n", 2, "end of stream"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("a: 1\n? [b]\n: 2\n", 2, "a key must be a name"),
        ("a: b: c\n", 1, "not allowed"),
        ("a: 1\nb: \x07\n", 2, "not allowed"),
        ("a: " + "[" * 30_000, 1, "nested too deeply"),
    ],
)
def test_what_is_not_plain_names_file_and_line(text: str, line: int, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value).startswith(f"{FILE}:{line}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_few_lines_cannot_stand_for_millions() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)
    )
    with pytest.raises(ConfigError, match="anchors"):
        read(bomb)


def test_parts_of_a_value_have_lines_too() -> None:
    entry = entries("models_preload:\n  - model: a\n  - model: b\n    dtype: int3\n", FILE)["models_preload"]
    assert entry.line_of("") == 1
    assert entry.line_of("[0].model") == 2
    assert entry.line_of("[1].dtype") == 4
    assert entry.line_of("[1].missing") == 3


@given(st.text())
def test_any_text_is_understood_or_refused(text: str) -> None:
    with suppress(ConfigError):
        read(text)


# The library writes YAML 1.1, in which `0E0` and `0o7` are texts that need no quotes.
TEXTS = st.text().filter(lambda text: re.match(r"[-+]?\.?\d", text) is None)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,10}", fullmatch=True),
        st.none() | st.booleans() | st.integers() | TEXTS | st.lists(TEXTS),
    )
)
def test_what_a_yaml_library_writes_is_read_as_it_was(document: dict[str, Any]) -> None:
    assert {key: value for key, (value, _) in read(yaml.safe_dump(document)).items()} == document
