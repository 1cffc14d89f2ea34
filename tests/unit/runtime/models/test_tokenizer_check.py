import pytest

from mlx_sidecar.runtime.models.tokenizer_check import MAX_PATTERN, runs_away

# Of tokenizers that are in use.
ORDINARY = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}|\s*[\r\n]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+""",
    r" ?[^(\s|[.,!?])]+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r"(?:\p{L}|\p{N})+ ",
    r"[]a]+x",
    r"\p{L}++",
]
ENDLESS = [
    r"(a+)+$",
    r"(?:a*)*b",
    r"((a|b)+c?)+d",
    r"(x{2,}){3,}",
    r"(x{2,9999}){3,}",
    r"(?:[^\]]+)*",
    r"(?=(a+)+)b",
    "a" * (MAX_PATTERN + 1),
]


@pytest.mark.parametrize("pattern", ORDINARY)
def test_an_ordinary_pattern_passes(pattern: str) -> None:
    assert not runs_away(pattern)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_pattern_that_repeats_repetitions_does_not(pattern: str) -> None:
    assert runs_away(pattern)
