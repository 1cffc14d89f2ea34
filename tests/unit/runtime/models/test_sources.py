import json
from pathlib import Path

import pytest

from mlx_sidecar.protocol.errors import InvalidModel, ModelNotFound, UnsafeModel
from mlx_sidecar.runtime.models.folder_check import check_folder
from mlx_sidecar.runtime.models.sources import find_model
from mlx_sidecar.runtime.models.store import ModelStore

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"model_type": "llama"}


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "home")


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; the hub's library has read the environment by now, so its constant is set."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def cache_model(cache: Path, name: str, *, listed: list[str] | None = None) -> Path:
    """Lay a model out as the hub's library does; `listed` is what its repository holds in all."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(COMMIT)
    if listed is not None:
        (place / "trees").mkdir()
        files = {path: {"size": 1, "blob_id": "0" * 40} for path in listed}
        (place / f"trees/{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    return make_folder(place / "snapshots" / COMMIT)


def test_a_name_of_the_store_leads_to_its_folder(store: ModelStore, tmp_path: Path) -> None:
    with store.adding("tiny", "sha") as folder:
        make_folder(folder)
    assert find_model("tiny", store) == tmp_path / "home/models/tiny"


def test_an_absolute_path_leads_to_that_folder(store: ModelStore, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "anywhere/my model")
    assert find_model(str(folder), store) == folder


def test_a_path_from_the_home_folder_is_absolute(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "me/models/tiny")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert find_model("~/models/tiny", store) == folder


@pytest.mark.parametrize("name", ["folder", "./folder", "acme/folder", "./acme/folder", "../folder", "."])
def test_a_relative_path_leads_nowhere(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for folder in ("here", "here/folder", "here/acme/folder", "folder"):
        make_folder(tmp_path / folder)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ModelNotFound):
        find_model(name, store)


def test_a_hub_id_leads_to_its_snapshot_in_the_cache(store: ModelStore, hub_cache: Path) -> None:
    folder = cache_model(hub_cache, "acme/tiny")
    assert find_model("acme/tiny", store) == folder


def test_files_that_are_never_fetched_are_not_missed(store: ModelStore, hub_cache: Path) -> None:
    listed = [
        "config.json",
        "model.safetensors",
        "README.md",
        ".gitattributes",
        "modeling_x.py",
        "pytorch_model.bin",
    ]
    folder = cache_model(hub_cache, "acme/tiny", listed=listed)
    assert find_model("acme/tiny", store) == folder


def test_a_snapshot_that_lacks_weights_is_not_there(store: ModelStore, hub_cache: Path) -> None:
    listed = ["config.json", "model.safetensors", "model-00002-of-00002.safetensors"]
    cache_model(hub_cache, "acme/tiny", listed=listed)
    with pytest.raises(ModelNotFound):
        find_model("acme/tiny", store)


ABSENT = [
    "tiny", "acme/tiny", "a/b/c", "", "/nowhere/at/all", "~nobody-of-this-name/x", "../home", "x" * 5000,
    "acme/a--b", "acme/a..b", "acme/x.git", "acme/tiny-", "https://hub/acme/tiny", "a\x00b", "/a\x00b",
]  # fmt: skip


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_on_this_machine_is_not_found(store: ModelStore, name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        find_model(name, store)
    assert caught.value.data == {"model": name[:200]}
    assert "mlx-sidecar pull" in caught.value.message


def test_a_model_of_the_store_wins_over_nothing_else_of_its_name(store: ModelStore, tmp_path: Path) -> None:
    make_folder(tmp_path / "home/models/unfinished")
    with pytest.raises(ModelNotFound):
        find_model("unfinished", store)


DEEP = b"[" * 200_000


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"\x80", "not valid JSON"),
        (DEEP, "not valid JSON"),
        (b'{"model_type": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'"llama"', "not a JSON object"),
        (b"{}", "does not name a model_type"),
        (b'{"model_type": 7}', "does not name a model_type"),
        (b'{"model_type": null}', "does not name a model_type"),
        (b" " * (16 * 1024 * 1024 + 1), "too large"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_a_damaged_config_is_an_invalid_model_that_says_so(
    tmp_path: Path, config: bytes, problem: str
) -> None:
    folder = make_folder(tmp_path / "secret/place")
    (folder / "config.json").write_bytes(config)
    with pytest.raises(InvalidModel) as caught:
        check_folder("tiny", folder)
    assert problem in caught.value.message
    assert "'tiny'" in caught.value.message
    assert str(tmp_path) not in caught.value.message
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("gone", "problem"), [("config.json", "no config.json"), ("model.safetensors", r"no model\*.safetensors")]
)
def test_a_folder_that_lacks_a_file_is_an_invalid_model_that_says_which(
    store: ModelStore, hub_cache: Path, gone: str, problem: str
) -> None:
    folder = cache_model(hub_cache, "acme/tiny")
    (folder / gone).unlink()
    with pytest.raises(InvalidModel, match=problem) as caught:
        find_model("acme/tiny", store)
    assert str(hub_cache) not in caught.value.message


def test_other_formats_of_weights_do_not_count(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(InvalidModel, match="other weight formats are not loaded"):
        check_folder("tiny", folder)


def test_a_pickle_beside_the_weights_is_named_with_what_to_do(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(UnsafeModel, match=r"'pytorch_model\.bin' is a pickle.*; move that file elsewhere"):
        check_folder("tiny", folder)


def test_a_revision_leads_to_its_own_snapshot(store: ModelStore, hub_cache: Path) -> None:
    cache_model(hub_cache, "acme/tiny")
    other = make_folder(hub_cache / "models--acme--tiny/snapshots" / ("f" * 40))
    (hub_cache / "models--acme--tiny/refs/v2").write_text("f" * 40)
    assert find_model("acme/tiny", store, "v2") == find_model("acme/tiny", store, "f" * 40) == other
    assert find_model("acme/tiny", store, "main") == find_model("acme/tiny", store) != other


# The last is a file whose content would be taken for a commit.
@pytest.mark.parametrize(
    "revision", ["v3", "e" * 40, "", "..", "../../..", "a//b", "/etc", "a\x00b", "../secret"]
)
def test_a_revision_that_is_not_in_the_cache_is_not_found(
    store: ModelStore, hub_cache: Path, revision: str
) -> None:
    snapshot = cache_model(hub_cache, "acme/tiny")
    (hub_cache / "models--acme--tiny/secret").write_text(snapshot.name)
    with pytest.raises(ModelNotFound):
        find_model("acme/tiny", store, revision)


def test_only_models_of_the_hub_have_revisions(store: ModelStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="only models of the hub have revisions"):
        find_model(str(make_folder(tmp_path / "mine")), store, "main")


def test_files_of_the_cache_may_be_links_into_where_it_keeps_their_contents(
    store: ModelStore, hub_cache: Path
) -> None:
    folder = cache_model(hub_cache, "acme/tiny")
    blobs, shared = hub_cache / "models--acme--tiny/blobs", hub_cache / "blobs/ab"
    for kept in (blobs, shared):
        kept.mkdir(parents=True)
    (folder / "config.json").rename(blobs / "1")
    (folder / "config.json").symlink_to("../../blobs/1")
    (folder / "model.safetensors").rename(shared / "2")
    (folder / "model.safetensors").symlink_to(shared / "2")
    assert find_model("acme/tiny", store) == folder


def test_a_link_from_one_model_of_the_cache_to_another_is_unsafe(store: ModelStore, hub_cache: Path) -> None:
    folder, other = cache_model(hub_cache, "acme/tiny"), cache_model(hub_cache, "acme/private")
    (folder / "tokenizer_config.json").symlink_to(other / "config.json")
    with pytest.raises(UnsafeModel, match="a link that leads out of the folder"):
        find_model("acme/tiny", store)


def test_links_within_a_folder_and_a_link_to_it_are_fine(store: ModelStore, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "real")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "alias").symlink_to(folder)
    assert find_model(str(tmp_path / "alias"), store) == tmp_path / "alias"


@pytest.mark.parametrize(
    "members",
    [
        {"auto_map": None},
        {"auto_map": {}},
        {"trust_remote_code": False},
        {"_attn_implementation_autoset": True},
        {"rope_scaling": {"type": "llama3", "factor": 8.0}, "rope_theta": 5e5},
        {"num_hidden_layers": 126, "intermediate_size": [64, 128], "head_dim": None},
        {
            "quantization": {
                "group_size": 64,
                "bits": 4,
                "model.embed": {"group_size": 32, "bits": 8},
                "x": False,
            }
        },
        {"eos_token_id": [1, 2]},
    ],
)
def test_settings_that_ask_for_nothing_wrong_pass(tmp_path: Path, members: dict[str, object]) -> None:
    folder = make_folder(tmp_path)
    (folder / "config.json").write_text(json.dumps(CONFIG | members))
    assert check_folder("tiny", folder) == CONFIG | members


def test_notes_pictures_and_folders_beside_a_model_do_no_harm(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for name in ("README.md", "picture.png", "notes.json", "LICENSE"):
        (folder / name).write_text("not JSON")
    (folder / "original").mkdir()
    check_folder("tiny", folder)
