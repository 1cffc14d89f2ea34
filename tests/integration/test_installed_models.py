"""`mlx-sidecar list`, `rm` and `inspect` as a person and a program run them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import CHAT_TEMPLATE, CONTEXT_LENGTH, make_tiny_model

from mlx_sidecar.runtime.models.store import ModelStore

COMMAND = Path(sys.executable).parent / "mlx-sidecar"
COMMIT, OTHER = "a" * 40, "b" * 40


class Machine:
    """A home and a hub cache with models in them: `mine` in the store, acme/tiny in two revisions."""

    def __init__(self, folder: Path) -> None:
        self.home, self.cache = folder / "home", folder / "hub"
        with ModelStore(self.home).adding("mine", "sha") as made:
            make_tiny_model(made)
        self.snapshots = [self._snapshot(COMMIT, "main"), self._snapshot(OTHER, "v1")]

    def _snapshot(self, commit: str, ref: str) -> Path:
        repository = self.cache / "models--acme--tiny"
        folder = make_tiny_model(repository / "snapshots" / commit, dtype="float16")
        (repository / "blobs").mkdir(exist_ok=True)
        for path in list(folder.iterdir()):
            blob = path.rename(repository / "blobs" / f"{commit[0]}-{path.name}")
            path.symlink_to(Path("../../blobs") / blob.name)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
        return folder

    def run(self, *arguments: str | Path, answer: str = "") -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"MLX_SIDECAR_HOME": str(self.home), "HF_HUB_CACHE": str(self.cache)}
        return subprocess.run(
            (COMMAND, *arguments), env=environment, input=answer, capture_output=True, text=True, timeout=60
        )

    def listed(self) -> list[dict[str, Any]]:
        done = self.run("list", "--json")
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_list_has_the_models_of_store_and_cache_with_their_facts(machine: Machine) -> None:
    mine, first, second = machine.listed()
    assert (mine["model"], mine["source"], mine["dtype"]) == ("mine", "store", "float32")
    assert "commit" not in mine
    for found, commit, refs in ((first, COMMIT, ["main"]), (second, OTHER, ["v1"])):
        assert (found["model"], found["commit"], found["refs"]) == ("acme/tiny", commit, refs)
        assert (found["source"], found["architecture"], found["dtype"]) == ("hub", "llama", "float16")
        assert found["bytes"] == sum(path.stat().st_size for path in Path(found["folder"]).iterdir())
        assert "problem" not in found


def test_the_list_says_what_cannot_be_loaded_and_why(machine: Machine) -> None:
    (machine.snapshots[0] / "evil.py").touch()
    problems = [model.get("problem") for model in machine.listed()]
    assert problems[0] is problems[2] is None
    assert "'evil.py' is Python code" in str(problems[1])
    assert "'evil.py' is Python code" in machine.run("list").stdout


def test_the_list_for_people_has_a_line_for_each(machine: Machine) -> None:
    heading, *lines = machine.run("list").stdout.splitlines()
    assert heading.split()[0] == "MODEL"
    assert [line.split()[0] for line in lines] == ["mine", "acme/tiny", "acme/tiny"]
    assert all(line.endswith("yes") for line in lines)


def test_an_empty_machine_has_an_empty_list(tmp_path: Path) -> None:
    machine = Machine.__new__(Machine)
    machine.home, machine.cache = tmp_path / "home", tmp_path / "hub"
    assert machine.listed() == []


def test_what_is_removed_is_gone_and_the_rest_stays(machine: Machine) -> None:
    done = machine.run("rm", "mine", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["result"]
    assert result["model"] == "mine"
    assert result["freedBytes"] > 100_000
    assert [model["model"] for model in machine.listed()] == ["acme/tiny", "acme/tiny"]
    assert list((machine.home / "models").iterdir()) == []


@pytest.mark.parametrize("revision", ["v1", OTHER])
def test_one_revision_can_be_removed(machine: Machine, revision: str) -> None:
    assert machine.run("rm", "acme/tiny", "--revision", revision, "--yes").returncode == 0
    assert [model.get("commit") for model in machine.listed()] == [None, COMMIT]


def test_without_a_revision_all_are_removed(machine: Machine) -> None:
    assert machine.run("rm", "acme/tiny", "--yes").returncode == 0
    assert [model["model"] for model in machine.listed()] == ["mine"]
    assert not (machine.cache / "models--acme--tiny").exists()


@pytest.mark.parametrize("arguments", [("rm", "mine"), ("rm", "mine", "--json"), ("rm", "acme/tiny")])
def test_nothing_is_removed_without_a_yes(machine: Machine, arguments: tuple[str, ...]) -> None:
    # What comes through a pipe is no answer.
    done = machine.run(*arguments, answer="y\n")
    assert done.returncode == 1
    assert "--yes" in done.stderr
    assert len(machine.listed()) == 3


@pytest.mark.parametrize("name", ["nothing", "acme/nothing", "../mine", ".", ""])
def test_what_is_not_there_cannot_be_removed(machine: Machine, name: str) -> None:
    done = machine.run("rm", "--yes", "--json", "--", name)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["kind"] == "model_not_found"
    assert len(machine.listed()) == 3


def test_a_folder_of_the_user_is_never_removed(machine: Machine, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "own")
    done = machine.run("rm", str(folder), "--yes")
    assert done.returncode == 1
    assert "neither the store nor the hub's cache has" in done.stderr
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["mine", "acme/tiny", "FOLDER"])
def test_inspect_tells_what_a_model_is(machine: Machine, tmp_path: Path, name: str) -> None:
    model = str(make_tiny_model(tmp_path / "own")) if name == "FOLDER" else name
    done = machine.run("inspect", model, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)["result"]
    assert facts["model"] == model
    assert facts["architecture"] == "llama"
    assert facts["contextLength"] == CONTEXT_LENGTH
    assert facts["chatTemplate"] is bool(CHAT_TEMPLATE)
    width = 2 if facts["dtype"] == "float16" else 4
    assert facts["weightsBytes"] == facts["parameters"] * width
    assert facts["projectedBytes"] == facts["weightsBytes"] + CONTEXT_LENGTH * facts["kvBytesPerToken"]


def test_inspect_counts_what_the_server_counts(machine: Machine, tiny_server: Any, model: str) -> None:
    facts = json.loads(machine.run("inspect", model, "--json").stdout)["result"]
    (loaded,) = [line for line in tiny_server.result("models")["models"] if line["model"] == model]
    assert facts["parameters"] == loaded["parameters"]
    assert facts["contextLength"] == loaded["contextLength"]
    assert facts["kvBytesPerToken"] == loaded["kvBytesPerToken"]


def test_inspect_says_which_check_fails(machine: Machine, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "own")
    (folder / "model.safetensors").write_bytes(b"not weights")
    done = machine.run("inspect", folder, "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "invalid_model"
    assert "'model.safetensors' is damaged or incomplete" in error["message"]


def test_the_license_is_the_one_of_the_model_card(machine: Machine, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "own")
    (folder / "README.md").write_text("---\ntags: [a]\nlicense: mit\n---\nlicense: none of this\n")
    assert json.loads(machine.run("inspect", folder, "--json").stdout)["result"]["license"] == "mit"
