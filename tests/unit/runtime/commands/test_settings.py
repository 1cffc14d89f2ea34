import argparse
from pathlib import Path

import pytest

from mlx_sidecar.config.fields import FIELDS
from mlx_sidecar.runtime.commands.settings import add_flags, source_of


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    return parser


def test_every_setting_has_a_flag_and_its_help(parser: argparse.ArgumentParser) -> None:
    text = parser.format_help()
    assert [key for key, field in FIELDS.items() if f"{field.flag} " not in text] == []


def test_what_was_not_given_is_left_to_the_other_layers(parser: argparse.ArgumentParser) -> None:
    assert source_of(parser.parse_args([])).flags == {}
    given = source_of(parser.parse_args(["--max-waiting", "5", "--no-evict-models", "--config", "a.yaml"]))
    assert given.flags == {"max_waiting": "5", "evict_models": "false"}
    assert given.file == Path.cwd() / "a.yaml"


def test_a_flag_cannot_be_cut_short(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["--stall", "5"])
    assert "unrecognized arguments: --stall" in capsys.readouterr().err
