"""The README's examples, run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SCRIPTS = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}


def example(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.S)
    (found,) = [block for block in blocks if containing in block]
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=100)
    return done.stdout


@pytest.mark.parametrize("containing", ["async with Sidecar.spawn", "with SyncSidecar.spawn"])
def test_the_python_examples_print_an_answer(containing: str) -> None:
    assert "Paris" in run(sys.executable, "-c", example("python", containing))


def test_the_typescript_example_prints_an_answer() -> None:
    # Inside the package its own name leads to its build.
    build = ROOT / "clients" / "typescript" / "dist"
    if not build.exists():
        pytest.skip("the TypeScript client has not been built")
    script = build / "readme.mjs"
    script.write_text(example("ts", "Sidecar.spawn"))
    assert "Paris" in run("node", str(script))


def test_the_shell_example_prints_an_answer() -> None:
    answers = run("sh", "-c", example("sh", "serve --eof-grace-ms")).splitlines()
    assert len(answers) == 3
    assert '"finishReason":"length"' in answers[2]
