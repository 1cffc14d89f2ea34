import argparse
import sys
from pathlib import Path

import pytest

from mlx_sidecar.conformance import command
from mlx_sidecar.conformance.arguments import add_arguments

TOY = Path(__file__).parents[2] / "support" / "toy_server.py"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def run(*arguments: str, broken: str | None = None) -> int:
    server = [sys.executable, "-ESs", str(TOY)] + ([broken] if broken else [])
    return main(["--only", "jsonrpc/unknown-method", "--framing", "ndjson", *arguments, "--", *server])


def test_a_server_that_keeps_its_promises_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert "2 ok, 0 failed, 0 skipped" in capsys.readouterr().out


def test_one_that_does_not_is_1_and_the_difference_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--bytewise", broken="unknown-method-is-invalid") == 1
    out = capsys.readouterr().out
    assert "error.code: expected -32601, got -32600" in out
    assert "0 ok, 1 failed, 0 skipped" in out


@pytest.mark.parametrize(
    "arguments", [[], ["--socket", "/a", "--", "b"], ["--only", "no-such-thing", "--", "true"]]
)
def test_arguments_that_name_nothing_to_test_are_2(arguments: list[str]) -> None:
    assert main(arguments) == 2
