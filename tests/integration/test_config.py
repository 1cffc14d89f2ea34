"""Settings, as whoever starts the process sees them: four layers, and a file that changes meanwhile."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_model import END, make_tokenizer
from support.wire import COMMAND, PATIENCE_SECONDS, Wire

NO_END = {str(make_tokenizer().token_to_id(END)): -1000}
ENDLESS: dict[str, Any] = {"tokens": [1], "maxTokens": 10**6, "logitBias": NO_END, "deduplicate": False}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "runtime.yaml"


def config(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    place = {name: value for name, value in os.environ.items() if not name.startswith("MLX_SIDECAR_")}
    place |= {"COLUMNS": "80", "XDG_CONFIG_HOME": "/none"} | (env or {})
    command = [COMMAND, "config", *map(str, arguments)]
    return subprocess.run(
        command, env=place, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )


def log_when(wire: Wire, text: str) -> str:
    """Wait until the log says something, and return the log."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while text not in (log := wire.stderr.decode()):
        assert time.monotonic() < deadline, log
        wire.result("ping")
    return log


# mlx-sidecar config


def test_config_says_of_every_layer_what_it_sets(file: Path) -> None:
    file.write_text("max_waiting: 1\nageing_ms: 1\n\nstall_ms: 1\n")
    env = {"MLX_SIDECAR_AGEING_MS": "2", "MLX_SIDECAR_STALL_MS": "2", "MLX_SIDECAR_CONFIG": str(file)}
    done = config("--json", "--stall-ms", "3", env=env)
    document = json.loads(done.stdout)
    assert document["file"] == str(file)
    found = {key: (entry["value"], entry["origin"]) for key, entry in document["settings"].items()}
    assert found["max_connections"] == (256, "default")
    assert found["max_waiting"] == (1, "runtime.yaml:1")
    assert found["ageing_ms"] == (2, "MLX_SIDECAR_AGEING_MS")
    assert found["stall_ms"] == (3, "--stall-ms")


def test_config_fits_a_terminal_and_a_long_path_stays_in_one_piece(file: Path) -> None:
    home = f"/{'long/' * 20}home"
    file.write_text(f"home: {home}\nmodels_preload: [{{model: a}}, {{model: b, pin: true}}]\n")
    for more in ([], ["--explain"]):
        lines = config("--config", file, *more).stdout.splitlines()[1:]
        assert [line.strip() for line in lines if len(line) > 80] == [home]
        assert '[{"model":"a"},{"model":"b","pin":true}]' in "\n".join(lines)
    assert any("Requests in line" in line for line in lines)


def test_what_config_prints_by_default_is_a_file_to_begin_with(file: Path) -> None:
    file.write_text(config("--default").stdout)
    settings = json.loads(config("--config", file, "--json").stdout)["settings"]
    plain = json.loads(config("--json").stdout)["settings"]
    assert {key: entry["value"] for key, entry in settings.items()} == {
        key: entry["value"] for key, entry in plain.items()
    }
    assert yaml.safe_load(file.read_text()).keys() == plain.keys()


# What is wrong


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# mine\nmax_waitng: 5\n", "2: max_waitng: unknown. Did you mean max_waiting?"),
        ("max_waiting: many\n", '1: max_waiting: "many" is not a whole number'),
        ("max_waiting: 1\nmax_waiting: 2\n", "2: max_waiting: it is set already on line 1"),
        ("a: &a [*a]\n", "1: anchors and aliases are not supported"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "config"])
def test_a_broken_file_ends_the_command_with_a_line_that_says_where(
    command: str, text: str, line: str, file: Path
) -> None:
    file.write_text(text)
    arguments = [COMMAND, command, "--config", str(file)]
    done = subprocess.run(
        arguments, input="", capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.stderr.startswith(f"mlx-sidecar: {file}:{line}")
    assert done.stderr.count("\n") == 1
    assert (done.stdout, done.returncode) == ("", 2)


def test_mistakes_in_variables_and_flags_are_errors_too() -> None:
    for done in (
        config(env={"MLX_SIDECAR_MAX_WAITNG": "5"}),
        config(env={"MLX_SIDECAR_MAX_WAITING": "five"}),
        config("--max-waiting", "five"),
        config("--config", "/no/such/file.yaml"),
    ):
        assert done.returncode == 2
        assert done.stderr.startswith("mlx-sidecar: ")
        assert done.stderr.count("\n") == 1


# While it is served


def test_a_changed_file_takes_effect_in_a_running_server(file: Path, roomy: str) -> None:
    file.write_text("max_sequences: 1\n")
    with Wire("--config", file) as wire:
        wire.initialize()
        wire.result("load", model=roomy)
        for _ in range(3):
            wire.send("generate", model=roomy, **ENDLESS)
        wire.stats_when(lambda stats: sum(stats["engine"]["waiting"].values()) == 2)
        file.write_text("max_sequences: 2\nmax_waiting: 2\n")
        log = log_when(wire, "runtime.yaml changed: ")
        assert "took effect: max_waiting 1024 -> 2; waits for a restart: max_sequences 1 -> 2\n" in log
        assert wire.error("generate", model=roomy, **ENDLESS)["data"]["kind"] == "overloaded"

        file.write_text("max_waiting: none\n")
        log = log_when(wire, f"{file}:1: max_waiting: ")
        assert wire.error("generate", model=roomy, **ENDLESS)["data"]["kind"] == "overloaded"

        file.unlink()
        log_when(wire, "took effect: max_waiting 2 -> 1024")
        wire.send("generate", model=roomy, **ENDLESS)
        wire.stats_when(lambda stats: sum(stats["engine"]["waiting"].values()) == 3)


def test_a_file_that_comes_later_is_followed_and_may_change_the_log(tmp_path: Path) -> None:
    with Wire(env={"XDG_CONFIG_HOME": str(tmp_path), "MLX_SIDECAR_CONFIG": ""}) as wire:
        wire.initialize()
        folder = tmp_path / "mlx-sidecar"
        folder.mkdir()
        (folder / "runtime.yaml").write_text("log_format: json\n")
        log = log_when(wire, '"message": "runtime.yaml changed: took effect: log_format')
        assert json.loads(log.splitlines()[-1])["level"] == "info"


def test_a_log_that_was_silent_can_be_made_to_speak(file: Path) -> None:
    file.write_text("log_level: error\n")
    with Wire("--config", file) as wire:
        wire.initialize()
        assert wire.result("ping")["state"] in ("starting", "ready")
        assert wire.stderr == b""
        file.write_text("log_level: info\n")
        log_when(wire, 'took effect: log_level "error" -> "info"')


def test_flags_and_variables_stay_before_a_file_that_changes(file: Path) -> None:
    file.write_text("")
    with Wire("--config", file, "--max-waiting", "5", env={"MLX_SIDECAR_AGEING_MS": "5"}) as wire:
        wire.initialize()
        file.write_text("max_waiting: 9\nageing_ms: 9\n")
        log = log_when(wire, "runtime.yaml changed: ")
        assert "max_waiting in the file is overridden by --max-waiting" in log
        assert "ageing_ms in the file is overridden by MLX_SIDECAR_AGEING_MS" in log
