"""`mlx-sidecar pull` and `mlx-sidecar import` as a person runs them, with a hub on the loopback interface."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy as safetensors
from support.gguf_files import GgufLlama, Type
from support.stub_hub import StubHub
from support.tiny_model import make_tiny_model
from support.wire import Wire

COMMAND = Path(sys.executable).parent / "mlx-sidecar"
FIND = """
import sys
from pathlib import Path
from mlx_sidecar.runtime.models.sources import find_model
from mlx_sidecar.runtime.models.store import ModelStore
print(find_model(sys.argv[1], ModelStore(Path(sys.argv[2]))))
"""
# Makes the process that imports, and no other, end as if a fault in native code had ended it.
CRASH = """
import os, signal, sys
if any("gguf_import" in argument for argument in sys.orig_argv):
    os.write(1, b'{"stage": "tensors re')
    os.kill(os.getpid(), signal.SIGSEGV)
"""
# Prints what is not JSON, as native code may, on the stream that progress comes over.
CHATTER = """
import os, sys
if any("gguf_import" in argument for argument in sys.orig_argv):
    os.write(1, b'warning: \\xff\\n[1, 2]\\n')
"""


@dataclass
class Person:
    """Somebody at a terminal, with folders of their own."""

    home: Path
    hf_home: Path
    hub: StubHub
    folder: Path

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run_any(COMMAND, *arguments, **environment)

    def start(self, *arguments: str | Path) -> "subprocess.Popen[bytes]":
        """Run a command and do not wait for it."""
        pipe, command = subprocess.PIPE, (COMMAND, *arguments)
        return subprocess.Popen(
            command, env=self.environment, cwd=self.folder, stdin=pipe, stdout=pipe, stderr=pipe
        )

    @property
    def environment(self) -> dict[str, str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
        }
        own = {
            "MLX_SIDECAR_HOME": str(self.home),
            "HF_HOME": str(self.hf_home),
            "HF_ENDPOINT": self.hub.url,
            "NO_PROXY": "127.0.0.1",
        }
        return inherited | own

    def run_any(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.environment | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def refusal(self, *arguments: str | Path, **environment: str) -> str:
        """Run what must fail, with nothing on stdout and one clear line at the end; return that line."""
        done = self.run(*arguments, **environment)
        assert done.returncode == 1, done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("mlx-sidecar: ")
        assert done.stderr.count("mlx-sidecar: ") == 1
        return last.removeprefix("mlx-sidecar: ")


@pytest.fixture
def hub() -> Generator[StubHub]:
    with StubHub() as hub:
        yield hub


@pytest.fixture
def person(tmp_path: Path, hub: StubHub) -> Person:
    (tmp_path / "desk").mkdir()
    return Person(tmp_path / "home", tmp_path / "hf", hub, tmp_path / "desk")


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = make_tiny_model(tmp_path_factory.mktemp("hub") / "tiny")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def published(hub: StubHub, model_files: dict[str, bytes]) -> dict[str, bytes]:
    """The repository acme/tiny, with files that must never be fetched beside those of the model."""
    unwanted = {
        "README.md": b"# Tiny",
        ".gitattributes": b"*.safetensors filter=lfs",
        "modeling_tiny.py": b"raise SystemExit('code from the hub ran')",
        "pytorch_model.bin": b"\x80\x04a pickle",
        "tf_model.h5": b"\x89HDF",
        "onnx/model.onnx": b"\x08",
        "consolidated.safetensors": b"another layout",
    }
    hub.add("acme/tiny", model_files | unwanted)
    return model_files


@pytest.fixture
def long_weights(hub: StubHub, model_files: dict[str, bytes]) -> bytes:
    """The weights of acme/long: longer than the pieces that the hub's library writes."""
    arrays = dict(safetensors.load(model_files["model.safetensors"]))
    weights = safetensors.save(arrays | {"more": np.arange(3 * 1024 * 1024, dtype="f4")})
    hub.add("acme/long", model_files | {"model.safetensors": weights})
    return weights


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_a_hub_model_comes_whole_and_without_code_or_pickles(
    person: Person, hub: StubHub, published: dict[str, bytes]
) -> None:
    done = person.run("pull", "acme/tiny")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.removesuffix("\n"))
    assert folder.is_relative_to(person.hf_home)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == published
    assert sorted(hub.downloads()) == sorted(published)
    assert not any("modeling_tiny" in path or "pytorch_model" in path for _, path in hub.requests)
    assert done.stderr.splitlines()[-1] == "acme/tiny is ready"


def test_a_pulled_model_is_found_by_its_hub_id(
    person: Person, hub: StubHub, published: dict[str, bytes]
) -> None:
    pulled = person.run("pull", "acme/tiny")
    asked = len(hub.requests)
    found = person.run_any(sys.executable, "-c", FIND, "acme/tiny", person.home)
    assert published
    assert found.stdout == pulled.stdout, found.stderr
    assert len(hub.requests) == asked


def test_a_second_pull_fetches_nothing_again(
    person: Person, hub: StubHub, published: dict[str, bytes]
) -> None:
    first = person.run("pull", "acme/tiny")
    second = person.run("pull", "acme/tiny")
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert len(hub.downloads()) == len(published)


def test_a_second_pull_fetches_what_is_new(person: Person, hub: StubHub, published: dict[str, bytes]) -> None:
    person.run("pull", "acme/tiny")
    before = len(hub.downloads())
    changed = json.dumps(json.loads(published["config.json"]) | {"rope_theta": 5.0}).encode()
    hub.add("acme/tiny", published | {"config.json": changed})
    folder = Path(person.run("pull", "acme/tiny").stdout.strip())
    assert hub.downloads()[before:] == ["config.json"]
    assert (folder / "config.json").read_bytes() == changed
    assert (folder / "model.safetensors").read_bytes() == published["model.safetensors"]


def test_a_connection_that_ends_early_is_taken_up_where_it_stopped(
    person: Person, hub: StubHub, long_weights: bytes
) -> None:
    hub.drop_once("model.safetensors", 11 * 1024 * 1024)
    done = person.run("pull", "acme/long")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == long_weights
    assert hub.downloads().count("model.safetensors") == 2
    assert len(hub.ranges) == 1
    assert hub.ranges != ["bytes=0-"]


def test_ctrl_c_ends_a_pull_at_once_and_the_next_one_makes_it_whole(
    person: Person, hub: StubHub, long_weights: bytes
) -> None:
    hub.hold("model.safetensors", 11 * 1024 * 1024)
    with person.start("pull", "acme/long") as pull:
        assert hub.held.wait(60)
        pull.send_signal(signal.SIGINT)
        assert pull.wait(60) == 130
        assert pull.stderr is not None
        said = pull.stderr.read().decode()
    assert "Traceback" not in said
    assert "stopped; files that are complete stay" in said
    lost = person.run_any(sys.executable, "-c", FIND, "acme/long", person.home)
    assert "ModelNotFound" in lost.stderr
    hub.release()
    done = person.run("pull", "acme/long")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == long_weights
    assert not list(person.hf_home.rglob("*.incomplete"))


def test_a_model_that_does_not_fit_on_the_disk_is_not_begun(
    person: Person, hub: StubHub, published: dict[str, bytes]
) -> None:
    assert published
    hub.linked_sizes["model.safetensors"] = 10**15
    message = person.refusal("pull", "acme/tiny")
    assert message.startswith("the disk has too little room: 100000000")
    assert hub.downloads() == []


def test_progress_and_result_are_json_for_a_program(person: Person, long_weights: bytes) -> None:
    done = person.run("pull", "--json", "acme/long")
    assert done.returncode == 0, done.stderr
    *progress, result = map(json.loads, done.stdout.splitlines())
    folder = next((person.hf_home / "hub/models--acme--long/snapshots").iterdir())
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert result == {"result": {"model": "acme/long", "bytes": total, "revision": folder.name}}
    fetching = [line["progress"] for line in progress if line["progress"]["phase"] == "fetching"]
    assert {line["totalBytes"] for line in fetching} == {total}
    done_bytes = [line["doneBytes"] for line in fetching]
    assert done_bytes == sorted(set(done_bytes))
    assert (done_bytes[0], done_bytes[-1]) == (0, total)
    checked = {"phase": "checking", "doneBytes": total, "totalBytes": total, "remainingMs": 0.0}
    assert progress[-1]["progress"] == checked
    assert len(long_weights) < total


def test_a_failure_is_json_for_a_program_without_paths_or_words_of_libraries(
    person: Person, hub: StubHub, published: dict[str, bytes]
) -> None:
    assert published
    hub.drop_once("model.safetensors", 30_000, reset=True)
    done = person.run("pull", "--json", "acme/tiny")
    assert done.returncode == 1
    message = "acme/tiny could not be downloaded; files that are complete stay, so try again"
    assert json.loads(done.stdout.splitlines()[-1]) == {"error": {"kind": "pull_failed", "message": message}}
    assert "acme/tiny could not be downloaded (" in done.stderr.splitlines()[-1]


def test_a_connection_that_is_reset_is_said_and_the_next_pull_makes_it_whole(
    person: Person, hub: StubHub, published: dict[str, bytes]
) -> None:
    hub.drop_once("model.safetensors", 30_000, reset=True)
    assert "acme/tiny could not be downloaded" in person.refusal("pull", "acme/tiny")
    lost = person.run_any(sys.executable, "-c", FIND, "acme/tiny", person.home)
    assert "ModelNotFound" in lost.stderr
    done = person.run("pull", "acme/tiny")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == published["model.safetensors"]
    assert hub.downloads().count("model.safetensors") == 2


def test_offline_mode_is_content_with_a_complete_copy(
    person: Person, hub: StubHub, published: dict[str, bytes]
) -> None:
    first = person.run("pull", "acme/tiny")
    asked = len(hub.requests)
    offline = person.run("pull", "acme/tiny", HF_HUB_OFFLINE="1")
    assert published
    assert (offline.returncode, offline.stdout) == (0, first.stdout)
    assert len(hub.requests) == asked


@pytest.mark.parametrize("gone", ["everything", "config.json"])
def test_offline_mode_without_a_complete_copy_is_said(
    person: Person, hub: StubHub, published: dict[str, bytes], gone: str
) -> None:
    if gone != "everything":
        (Path(person.run("pull", "acme/tiny").stdout.strip()) / gone).unlink()
    asked = len(hub.requests)
    message = person.refusal("pull", "acme/tiny", HF_HUB_OFFLINE="1")
    assert published
    assert "acme/tiny is not complete in the hub's cache" in message
    assert "offline mode" in message
    assert len(hub.requests) == asked


def test_a_hub_that_cannot_be_reached_is_said(person: Person, hub: StubHub) -> None:
    hub.stop()
    assert "the hub cannot be reached" in person.refusal("pull", "acme/tiny")


def test_an_unknown_repository_is_said(person: Person) -> None:
    assert "the hub has no repository acme/nothing" in person.refusal("pull", "acme/nothing")
    assert "the hub has no repository acme/nothing" in person.refusal("pull", "acme/nothing", HF_TOKEN="hf_x")


def test_a_gated_repository_is_said(person: Person, hub: StubHub, model_files: dict[str, bytes]) -> None:
    hub.add("acme/gated", model_files, gated=True)
    for token in ({}, {"HF_TOKEN": "hf_x"}):
        assert "acme/gated needs its licence accepted" in person.refusal("pull", "acme/gated", **token)
    assert hub.downloads() == []


def test_a_revision_is_fetched_by_name_and_an_unknown_one_is_said(
    person: Person, hub: StubHub, published: dict[str, bytes]
) -> None:
    hub.repos["acme/tiny"].revisions.add("v1")
    assert "acme/tiny has no revision v2" in person.refusal("pull", "acme/tiny", "--revision", "v2")
    for revision in ("v1", hub.repos["acme/tiny"].commit):
        done = person.run("pull", "acme/tiny", "--revision", revision)
        assert done.returncode == 0, done.stderr
        assert names(Path(done.stdout.strip())) == set(published)


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../up", "", "-x/y"])
def test_a_name_that_is_neither_is_said_with_the_known_ones(person: Person, hub: StubHub, name: str) -> None:
    message = person.refusal("pull", "--", name)
    assert repr(name) in message
    assert "smollm2-135m" in message
    assert hub.requests == []


@pytest.mark.parametrize("name", ["acme/a--b", "acme/x.git"])
def test_a_name_that_the_hub_forbids_is_said(person: Person, hub: StubHub, name: str) -> None:
    assert f"{name} could not be downloaded" in person.refusal("pull", name)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"README.md": b"# Nothing else"}, "no config.json"),
        ({"config.json": b'{"model_type": "llama"}', "pytorch_model.bin": b"x"}, "no model*.safetensors"),
        ({"config.json": b"<html>", "model.safetensors": b"x"}, "not valid JSON"),
    ],
)
def test_a_repository_that_is_no_model_is_said(
    person: Person, hub: StubHub, files: dict[str, bytes], problem: str
) -> None:
    hub.add("acme/odd", files)
    assert problem in person.refusal("pull", "acme/odd")


def test_the_catalog_model_is_not_fetched_a_second_time(person: Person, hub: StubHub) -> None:
    # In the home that everybody uses: the model is a large download, which `make test` has made by now.
    place = {
        name: value for name, value in os.environ.items() if name in ("MLX_SIDECAR_HOME", "XDG_CACHE_HOME")
    }
    if "MLX_SIDECAR_HOME" not in place:
        place["MLX_SIDECAR_HOME"] = ""
    done = person.run("pull", "smollm2-135m", **place)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "smollm2-135m is there already\n"
    assert (Path(done.stdout.strip()) / "model.safetensors").is_file()
    assert hub.requests == []


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GgufLlama(type=Type.Q4_0).write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_file_becomes_a_model_of_the_store(person: Person, gguf: Path) -> None:
    done = person.run("import", gguf, "mine")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.removesuffix("\n"))
    assert folder == person.home / "models/mine"
    assert {"config.json", "model.safetensors", "tokenizer.json"} < names(folder)
    assert names(person.home / "models") == {"mine"}
    found = person.run_any(sys.executable, "-c", FIND, "mine", person.home)
    assert found.stdout == done.stdout
    assert done.stderr.splitlines()[0] == "tensors read: 0 of 21"
    assert done.stderr.splitlines()[-1] == "mine is ready"


def test_a_second_import_of_the_same_file_does_nothing(person: Person, gguf: Path) -> None:
    first = person.run("import", gguf, "mine")
    marker = person.home / "models/mine/marker"
    marker.touch()
    second = person.run("import", gguf, "mine")
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert marker.exists()


def test_another_file_replaces_the_model_of_that_name(person: Person, gguf: Path, tmp_path: Path) -> None:
    person.run("import", gguf, "mine")
    done = person.run("import", GgufLlama(layers=1).write(tmp_path / "other.gguf"), "mine")
    assert done.returncode == 0, done.stderr
    assert json.loads((person.home / "models/mine/config.json").read_text())["num_hidden_layers"] == 1
    assert names(person.home / "models") == {"mine"}


def test_a_damaged_file_is_said_and_leaves_the_model_that_was_there(
    person: Person, gguf: Path, tmp_path: Path
) -> None:
    person.run("import", gguf, "mine")
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:-100])
    message = person.refusal("import", tmp_path / "cut.gguf", "mine")
    assert message.startswith("cut.gguf cannot be imported: ")
    assert "incomplete" in message
    assert person.run("import", gguf, "mine").stderr == ""
    assert names(person.home / "models") == {"mine"}


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all"])
def test_a_file_of_something_else_is_said(person: Person, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert person.refusal("import", tmp_path / "file", "mine").startswith("file cannot be imported: ")
    assert names(person.home / "models") == set()


def test_a_path_without_a_file_is_said(person: Person, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.gguf", tmp_path):
        assert f"there is no file {path}" in person.refusal("import", path, "mine")


@pytest.mark.parametrize("name", ["../mine", "/mine", "", "a b", ".mine"])
def test_a_name_that_the_store_cannot_hold_is_said(person: Person, gguf: Path, name: str) -> None:
    assert f"{name!r} cannot be a model's name" in person.refusal("import", gguf, name)
    assert not person.home.exists()


def test_a_home_that_cannot_be_written_is_said(person: Person, gguf: Path) -> None:
    person.home.write_text("a file where the folder should be")
    assert str(person.home) in person.refusal("import", gguf, "mine")


def test_a_full_disk_is_said_and_leaves_nothing(person: Person, gguf: Path) -> None:
    # The limit on a file's size is where a disk that is full can be had without filling one.
    command = 'ulimit -f 40; exec "$@"'
    done = person.run_any("sh", "-c", command, "sh", COMMAND, "import", gguf, "mine")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "cannot be written; is the disk full?" in done.stderr.splitlines()[-1]
    assert names(person.home / "models") == set()


def test_an_import_that_crashes_is_said_and_leaves_nothing(
    person: Person, gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    message = person.refusal("import", gguf, "mine", PYTHONPATH=str(tmp_path))
    assert message.startswith("tiny.gguf cannot be imported: the import crashed (Segmentation fault")
    assert names(person.home / "models") == set()


def test_an_import_that_fails_by_a_defect_shows_it(person: Person, gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        CRASH.replace("os.kill(os.getpid(), signal.SIGSEGV)", "os._exit(3)")
    )
    message = person.refusal("import", gguf, "mine", PYTHONPATH=str(tmp_path))
    assert message == "tiny.gguf cannot be imported: the import failed, and its reason stands above"


def test_what_native_code_prints_does_not_disturb_an_import(
    person: Person, gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(CHATTER)
    done = person.run("import", gguf, "mine", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "tensors read: 0 of 21"


def test_modules_in_the_folder_that_one_is_in_are_not_run(person: Person, gguf: Path) -> None:
    for name in ("struct.py", "numpy.py", "mlx.py", "tokenizers.py"):
        (person.folder / name).write_text("raise SystemExit('a file of the working folder ran')")
    done = person.run("import", gguf, "mine")
    assert done.returncode == 0, done.stderr


def test_a_client_pulls_a_model_and_loads_it(
    person: Person, hub: StubHub, published: dict[str, bytes]
) -> None:
    total = sum(map(len, published.values()))
    with Wire(env=person.environment) as wire:
        wire.initialize()
        pulled = wire.result("pull", model="acme/tiny", partialResultToken="p")
        assert pulled == {"model": "acme/tiny", "bytes": total, "revision": hub.repos["acme/tiny"].commit}
        progress = wire.progress("p")
        assert [part["seq"] for part in progress] == sorted({part["seq"] for part in progress})
        assert progress[-1]["phase"] == "checking"
        assert wire.result("load", model="acme/tiny")["state"] == "ready"
        refused = wire.error("pull", model="acme/nothing")
        assert refused["data"] == {"kind": "pull_failed", "retryable": False, "model": "acme/nothing"}


def test_a_client_that_cancels_a_pull_is_told_so(person: Person, hub: StubHub, long_weights: bytes) -> None:
    hub.hold("model.safetensors", len(long_weights) // 2)
    with Wire(env=person.environment) as wire:
        wire.initialize()
        asked = wire.send("pull", model="acme/long")
        assert hub.held.wait(60)
        wire.notify("$/cancelRequest", id=asked)
        assert wire.response(asked)["error"]["data"]["kind"] == "cancelled"
        assert wire.error("load", model="acme/long")["data"]["kind"] == "model_not_found"
