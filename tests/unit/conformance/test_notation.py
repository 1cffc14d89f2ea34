import pytest

from mlx_sidecar.conformance.notation import (
    NotationError,
    as_variable,
    blank_variables,
    build,
    parse_pieces,
    verbatim,
)

VARIABLES = {"n": b"12", "model": as_variable('a "b" \\ é'), "case": b"\xff"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("'abc'", b"abc"),
        (r"'\x00\xff\n\r\t\\\''", b"\x00\xff\n\r\t\\'"),
        ("'é\"'", 'é"'.encode()),
        ("'ab'*3 'c'", b"abababc"),
        ("'x'*${n}", b"x" * 12),
        ("'x'*${n}/5", b"xx"),
        ("'x'*${n}-10", b"xx"),
        ("'x'*0 ''", b""),
        ("'[${case}]'", b"[\xff]"),
        ('\'{"m":"${model}"}\'', b'{"m":"a \\"b\\" \\\\ \\u00e9"}'),
    ],
)
def test_literals_stand_for_bytes(line: str, expected: bytes) -> None:
    assert build(parse_pieces(line), VARIABLES) == expected


@pytest.mark.parametrize("line", ["abc", "'abc", "'a''b'", "'a'*", "'a'*x", r"'\q'", "'a'*2/", "'a' b"])
def test_what_is_not_a_literal_is_refused(line: str) -> None:
    with pytest.raises(NotationError):
        parse_pieces(line)


def test_a_variable_without_a_value_is_refused() -> None:
    with pytest.raises(NotationError, match="nobody"):
        build(verbatim("${nobody}"), VARIABLES)


def test_a_saved_string_stands_without_its_quotes_and_the_rest_as_json() -> None:
    assert as_variable('a"b') == b'a\\"b'
    assert as_variable([1, "é", None]) == b'[1, "\\u00e9", null]'
    assert as_variable(True) == b"true"


def test_variables_can_be_blanked_for_a_look_at_the_json_around_them() -> None:
    assert blank_variables('{"id":${n},"m":"${model}"}') == '{"id":0,"m":"0"}'
