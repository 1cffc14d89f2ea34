import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy as safetensors
from support.tiny_model import make_tiny_model

from mlx_sidecar.protocol.errors import InvalidModel
from mlx_sidecar.runtime.models.weight_files import read_headers, stamp, weight_facts, weight_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny", dtype="float16")


def test_the_facts_are_those_of_what_was_written(folder: Path) -> None:
    written = safetensors.load_file(folder / "model.safetensors")
    facts = weight_facts("tiny", folder)
    total = sum(array.nbytes for array in written.values())
    assert facts == (len(written), {"F16": total}, total, [folder / "model.safetensors"])
    headers = read_headers("tiny", folder)
    assert {name: tensor.shape for name, tensor in headers.items()} == {
        name: array.shape for name, array in written.items()
    }


def test_shards_and_types_are_added_up(folder: Path) -> None:
    extra = {"extra": np.zeros((3, 4), "u4"), "more": np.zeros(5, "i1")}
    safetensors.save_file(extra, folder / "model-00002-of-00002.safetensors")
    alone = weight_facts("tiny", make_tiny_model(folder.parent / "other", dtype="float16"))
    both = weight_facts("tiny", folder)
    assert both.bytes_by_dtype == alone.bytes_by_dtype | {"U32": 48, "I8": 5}
    assert (both.tensors, both.total_bytes) == (alone.tensors + 2, alone.total_bytes + 53)
    assert [path.name for path in both.files] == ["model-00002-of-00002.safetensors", "model.safetensors"]


def test_the_data_are_not_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    # As long as it says, but on the disk there is a hole instead of data.
    path.write_bytes(data[: 8 + length])
    os.truncate(path, len(data))
    assert weight_facts("tiny", folder).total_bytes == len(data) - 8 - length


def test_the_weight_files_are_those_that_mlx_lm_reads_in_order(tmp_path: Path) -> None:
    for name in ("model-2.safetensors", "model-1.safetensors", "adapter.safetensors", "a_model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "model.bin").touch()
    assert [path.name for path in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize(
    ("member", "value", "problem"),
    [
        ("num_hidden_layers", 100, "num_hidden_layers 100, and its weights have 21 tensors"),
        ("vocab_size", 100_000, "vocab_size 100000, and none of its tensors is as large"),
    ],
)
def test_a_config_that_claims_more_than_the_weights_have_is_refused(
    folder: Path, member: str, value: int, problem: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {member: value}))
    with pytest.raises(InvalidModel, match=problem):
        weight_facts("tiny", folder)


def test_a_stamp_stays_as_long_as_the_files_do(folder: Path) -> None:
    first = stamp(folder)
    (folder / "README.md").write_text("read by nobody")
    assert stamp(folder) == first


def test_a_stamp_tells_of_every_change(folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    seen = {stamp(folder)}
    os.utime(weights, ns=(1, 1))
    seen.add(stamp(folder))
    config.write_text(config.read_text() + " ")
    seen.add(stamp(folder))
    copy = folder.parent / "copy"
    copy.write_bytes(weights.read_bytes())
    os.utime(copy, ns=(1, 1))
    copy.replace(weights)
    seen.add(stamp(folder))
    (folder / "chat_template.jinja").touch()
    seen.add(stamp(folder))
    (folder / "tokenizer.json").unlink()
    seen.add(stamp(folder))
    assert len(seen) == 6


def test_a_folder_that_is_gone_has_no_stamp(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        stamp(tmp_path / "gone")
