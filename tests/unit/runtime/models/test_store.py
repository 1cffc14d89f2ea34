import json
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from mlx_sidecar.runtime.models.store import ModelStore, is_store_name

SHA = "a" * 64
ADD_AND_DIE = """
import os, sys
from pathlib import Path
from mlx_sidecar.runtime.models.store import ModelStore
with ModelStore(Path(sys.argv[1])).adding("m", "sha") as folder:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    os._exit(9)
"""


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "home")


def add(store: ModelStore, name: str, content: str, sha256: str = SHA) -> None:
    with store.adding(name, sha256) as folder:
        folder.mkdir()
        (folder / "config.json").write_text(content)


def content(store: ModelStore, name: str) -> str:
    folder = store.find(name)
    assert folder is not None
    return (folder / "config.json").read_text()


def names(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "home/models").iterdir()}


@pytest.mark.parametrize("name", ["a", "SmolLM2-135M", "llama_3.2-1b.Q4", "0", "a" * 100])
def test_an_ordinary_name_is_one_of_the_store(name: str) -> None:
    assert is_store_name(name)


# The last but one is a Kelvin sign, which ignoring case takes for a k.
OUTSIDE = [
    "", ".", "..", "../up", "a/b", "a\\b", "/etc", "~", "~root", ".hidden", "-rf", "a b", "a\n", "a\x00",
    "a:b", "na\u00efve", "\u212aelvin", "a" * 101,
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_could_lead_out_or_astray_is_none_of_the_store(
    store: ModelStore, tmp_path: Path, name: str
) -> None:
    assert not is_store_name(name)
    assert store.find(name) is None
    with pytest.raises(ValueError, match="cannot be a model of the store"), store.adding(name, SHA):
        pytest.fail("the store gave a folder for it")
    assert not (tmp_path / "home").exists()


def test_a_folder_outside_is_not_found_through_a_name(store: ModelStore, tmp_path: Path) -> None:
    add(store, "inside", "{}")
    add(ModelStore(tmp_path), "outside", "{}")
    assert store.find("inside") is not None
    assert store.find("../../models/outside") is None


def test_a_model_is_there_once_its_block_has_ended(store: ModelStore, tmp_path: Path) -> None:
    with store.adding("m", SHA) as folder:
        folder.mkdir()
        assert store.find("m") is None
    assert store.find("m") == tmp_path / "home/models/m"
    assert names(tmp_path) == {"m"}


def fail_halfway(store: ModelStore, name: str) -> None:
    with store.adding(name, SHA) as folder:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt


def test_a_failure_in_the_middle_leaves_nothing(store: ModelStore, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_halfway(store, "m")
    assert store.find("m") is None
    assert names(tmp_path) == set()


def test_a_failure_in_the_middle_leaves_the_old_model(store: ModelStore, tmp_path: Path) -> None:
    add(store, "m", "old")
    with pytest.raises(KeyboardInterrupt):
        fail_halfway(store, "m")
    assert content(store, "m") == "old"
    assert store.is_current("m", SHA)
    assert names(tmp_path) == {"m"}


def test_a_block_that_wrote_nothing_adds_nothing(store: ModelStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), store.adding("m", SHA):
        pass
    assert store.find("m") is None
    assert names(tmp_path) == set()


def test_a_process_that_dies_in_the_middle_leaves_nothing_visible(store: ModelStore, tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", ADD_AND_DIE, str(tmp_path / "home")], check=False)
    assert died.returncode == 9
    assert store.find("m") is None
    assert [name for name in names(tmp_path) if is_store_name(name)] == []
    add(store, "m", "whole")
    assert content(store, "m") == "whole"


def test_what_a_process_that_died_left_goes_with_the_next_addition(store: ModelStore, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ADD_AND_DIE, str(tmp_path / "home")], check=False)
    assert len(names(tmp_path)) == 1
    add(store, "other", "{}")
    assert names(tmp_path) == {"other"}


def test_what_is_being_added_is_not_taken_for_left_over(store: ModelStore, tmp_path: Path) -> None:
    with store.adding("slow", SHA) as folder:
        folder.mkdir()
        add(ModelStore(tmp_path / "home"), "quick", "{}")
        (folder / "config.json").write_text("still here")
    assert content(store, "slow") == "still here"
    assert names(tmp_path) == {"slow", "quick"}


def test_the_names_are_those_of_complete_models_in_order(store: ModelStore, tmp_path: Path) -> None:
    assert store.names() == []
    add(store, "b", "{}")
    add(store, "a", "{}")
    (tmp_path / "home/models/half").mkdir()
    (tmp_path / "home/models/file").touch()
    assert store.names() == ["a", "b"]


def test_a_removed_model_is_gone_and_no_other(store: ModelStore, tmp_path: Path) -> None:
    add(store, "a", "{}")
    add(store, "b", "{}")
    store.remove("a")
    assert store.find("a") is None
    assert names(tmp_path) == {"b"}
    with pytest.raises(FileNotFoundError):
        store.remove("a")


def test_only_the_same_source_and_importer_are_current(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not store.is_current("m", SHA)
    add(store, "m", "{}")
    assert store.is_current("m", SHA)
    assert not store.is_current("m", "b" * 64)
    monkeypatch.setattr("mlx_sidecar.runtime.models.store.IMPORTER_VERSION", 1_000_000)
    assert not store.is_current("m", SHA)
    assert store.find("m") == tmp_path / "home/models/m"


@pytest.mark.parametrize("receipt", [b"", b"{}", b"\xff\xfe", json.dumps({"sourceSha256": SHA}).encode()])
def test_a_damaged_receipt_is_not_current(store: ModelStore, tmp_path: Path, receipt: bytes) -> None:
    add(store, "m", "{}")
    (tmp_path / "home/models/m/mlx-sidecar.json").write_bytes(receipt)
    assert not store.is_current("m", SHA)


def test_a_folder_without_receipt_is_no_model(store: ModelStore, tmp_path: Path) -> None:
    (tmp_path / "home/models/m").mkdir(parents=True)
    assert store.find("m") is None
    add(store, "m", "{}")
    assert content(store, "m") == "{}"


def test_adding_again_replaces_the_model_as_a_whole(store: ModelStore, tmp_path: Path) -> None:
    add(store, "m", "old")
    (tmp_path / "home/models/m/left-over").touch()
    add(store, "m", "new", "b" * 64)
    assert content(store, "m") == "new"
    assert not (tmp_path / "home/models/m/left-over").exists()
    assert store.is_current("m", "b" * 64)
    assert names(tmp_path) == {"m"}


def test_of_two_that_are_under_way_the_last_to_end_stays(store: ModelStore, tmp_path: Path) -> None:
    with ExitStack() as second:
        with store.adding("m", SHA) as folder:
            other = second.enter_context(store.adding("m", "b" * 64))
            folder.mkdir()
            other.mkdir()
        assert store.is_current("m", SHA)
    assert store.is_current("m", "b" * 64)
    assert names(tmp_path) == {"m"}


def test_many_adding_one_name_at_once_all_end_well(store: ModelStore, tmp_path: Path) -> None:
    writers, rounds = 6, 30
    together = threading.Barrier(writers)
    failures: list[BaseException] = []

    def keep_adding(number: int) -> None:
        try:
            for _ in range(rounds):
                with store.adding("m", SHA) as folder:
                    folder.mkdir()
                    for name in ("config.json", "tokenizer.json"):
                        (folder / name).write_text(str(number))
                    together.wait(60)
        except BaseException as error:
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=keep_adding, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert names(tmp_path) == {"m"}
    # Whole and of one writer.
    assert content(store, "m") == (tmp_path / "home/models/m/tokenizer.json").read_text()
