import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gguf import GGML_QUANT_SIZES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gguf_files import GgufLlama, Type

from mlx_sidecar.runtime.models.gguf_header import READABLE_TYPES, GgufError, read_header

U32, F32, STRING, ARRAY, U64, FLOAT64 = 4, 6, 8, 9, 10, 12
Q4_0, Q8_0, Q4_K = 2, 8, 12


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return string(name) + shape + struct.pack("<IQ", kind, offset)


def header(
    *, tensors: list[bytes] | None = None, metadata: list[bytes] | None = None, version: int = 3
) -> bytes:
    tensors, metadata = tensors or [], metadata or []
    start = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    return start + b"".join(metadata) + b"".join(tensors)


def padded(head: bytes, data: int, alignment: int = 32) -> bytes:
    return head + bytes(-len(head) % alignment) + bytes(data)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def refusal(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    with pytest.raises(GgufError) as caught:
        read_header(file)
    return str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of the gguf package with all that occurs in real ones, and its data at the very end."""
    model = GgufLlama(type=Type.Q8_0, types={"output.weight": Type.F16})
    model.metadata |= {"general.name": "größe", "a.flag": True, "a.scale": 0.5, "a.list": [1, 2, 3]}
    return model.write(tmp_path_factory.mktemp("gguf") / "whole.gguf").read_bytes()


def test_a_file_of_the_gguf_package_is_read_in_full(file: Path, whole: bytes) -> None:
    file.write_bytes(whole)
    model = GgufLlama(type=Type.Q8_0, types={"output.weight": Type.F16})
    read = read_header(file)
    found = {tensor.name: (tensor.type, tensor.nbytes) for tensor in read.tensors}
    assert found == {name: (model.type_of(name).name, array.nbytes) for name, array in model.tensors.items()}
    assert {tensor.shape for tensor in read.tensors if tensor.name == "blk.0.ffn_up.weight"} == {(96, 64)}
    for part in read.tensors:
        start = read.data_start + part.offset
        assert whole[start : start + part.nbytes] == model.tensors[part.name].tobytes()
    assert read.metadata["general.architecture"] == "llama"
    assert (read.metadata["general.name"], read.metadata["a.flag"]) == ("größe", True)
    assert (read.metadata["a.scale"], read.metadata["a.list"]) == (0.5, [1, 2, 3])
    assert read.metadata["tokenizer.ggml.tokens"] == model.metadata["tokenizer.ggml.tokens"]


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_tensor_data_starts_where_the_alignment_says(file: Path, alignment: int) -> None:
    model = GgufLlama()
    model.metadata["general.alignment"] = alignment
    content = model.write(file).read_bytes()
    read = read_header(file)
    part = next(part for part in read.tensors if part.name == "output_norm.weight")
    start = read.data_start + part.offset
    assert read.data_start % alignment == 0
    assert content[start : start + part.nbytes] == model.tensors["output_norm.weight"].tobytes()


def test_version_2_is_read_like_version_3(file: Path) -> None:
    file.write_bytes(padded(header(version=2, tensors=[tensor(b"t.weight", [4])]), 16))
    assert read_header(file).tensors[0].shape == (4,)


def test_a_file_cut_off_anywhere_is_refused_as_incomplete(file: Path, whole: bytes) -> None:
    file.write_bytes(whole)
    data_start = read_header(file).data_start
    # Every point up to the end of the first long entries, then a sample, and the last byte.
    for cut in [*range(4, 1500), *range(1500, data_start, 61), data_start, len(whole) // 2, len(whole) - 1]:
        assert "incomplete" in refusal(file, whole[:cut]), cut


@pytest.mark.parametrize(
    "content", [b"", b"GGU", b"GGML" + bytes(40), b"PK\x03\x04" + bytes(40), b"FUGG" * 10]
)
def test_other_files_are_refused(file: Path, content: bytes) -> None:
    assert any(word in refusal(file, content) for word in ("not a GGUF file", "incomplete"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_damage_is_refused_or_read_but_never_crashes(file: Path, whole: bytes, data: st.DataObject) -> None:
    file.write_bytes(whole)
    data_start = read_header(file).data_start
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        # At the ends of the header are its counts and its tensors; between them mostly text.
        position = data.draw(st.integers(4, 300) | st.integers(data_start - 1500, data_start - 1))
        damaged[position] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    file.write_bytes(damaged)
    with suppress(GgufError):
        read = read_header(file)
        assert all(read.data_start + part.offset + part.nbytes <= len(whole) for part in read.tensors)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_noise_after_the_magic_never_crashes(file: Path, content: bytes) -> None:
    file.write_bytes(b"GGUF" + struct.pack("<I", 3) + content)
    with suppress(GgufError):
        read_header(file)


@pytest.mark.parametrize("version", [0, 1, 4, 50_331_648])
def test_other_versions_are_refused_by_number(file: Path, version: int) -> None:
    assert f"version {version} " in refusal(file, header(version=version) + bytes(64))


HUGE = struct.pack("<Q", 1 << 62)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"GGUF\x03\0\0\0" + HUGE + bytes(8), "tensors"),
        (b"GGUF\x03\0\0\0" + bytes(8) + HUGE, "metadata entries"),
        (b"GGUF\x03\0\0\0" + struct.pack("<QQ", 0, 1) + HUGE, "bytes in a string"),
        (header(metadata=[entry(b"k", STRING, HUGE)]), "bytes in a string"),
        (header(metadata=[entry(b"k", ARRAY, struct.pack("<I", U64) + HUGE)]), "items in an array"),
        (header(metadata=[entry(b"k", ARRAY, struct.pack("<I", STRING) + HUGE)]), "items in an array"),
        (header(tensors=[string(b"t") + b"\xff\xff\xff\xff"]), "dimensions"),
        (header(tensors=[tensor(b"n" * 65, [4])]), "bytes in a string"),
    ],
)  # fmt: skip
def test_absurd_counts_are_refused_before_anything_is_read(file: Path, content: bytes, what: str) -> None:
    message = refusal(file, content + bytes(64))
    assert what in message
    assert "the limit is" in message


def test_a_count_within_limits_but_beyond_the_file_is_refused(file: Path) -> None:
    counted = struct.pack("<IQ", F32, 3_000_000)
    assert "incomplete" in refusal(file, header(metadata=[entry(b"k", ARRAY, counted)]) + bytes(100))


def test_two_tensors_of_one_name_are_refused(file: Path) -> None:
    content = padded(header(tensors=[tensor(b"t", [4]), tensor(b"t", [4], offset=32)]), 64)
    assert "two tensors have the same name" in refusal(file, content)


def test_two_metadata_entries_of_one_name_are_refused(file: Path) -> None:
    twice = entry(b"general.alignment", U32, struct.pack("<I", 32))
    assert "two metadata entries have the same name" in refusal(file, header(metadata=[twice, twice]))


@pytest.mark.parametrize(
    ("dimensions", "kind", "offset", "data"),
    [
        ([8], 0, 0, 31),
        ([8], 0, 32, 63),
        ([8], 0, (1 << 64) - 32, 1000),
        ([256, 2], Q4_K, 0, 287),
        ([32], Q8_0, 0, 33),
    ],
)
def test_a_tensor_past_the_end_of_the_file_is_refused_by_name(
    file: Path, dimensions: list[int], kind: int, offset: int, data: int
) -> None:
    content = padded(header(tensors=[tensor(b"late.weight", dimensions, kind, offset)]), data)
    assert "'late.weight'" in refusal(file, content)
    # With the byte that was missing it is whole, where an offset can be reached at all.
    if offset < 1 << 32:
        file.write_bytes(content + b"\0")
        assert read_header(file).tensors[0].name == "late.weight"


@pytest.mark.parametrize(
    ("dimensions", "kind"),
    [([], 0), ([0], 0), ([4, 0], 0), ([0, 4], 0), ([48], Q4_0), ([128, 2], Q4_K), ([1 << 40, 1 << 20], 0)],
)
def test_a_shape_that_its_type_cannot_have_is_refused_by_name(
    file: Path, dimensions: list[int], kind: int
) -> None:
    message = refusal(file, padded(header(tensors=[tensor(b"odd.weight", dimensions, kind)]), 4096))
    assert "'odd.weight'" in message
    assert "shape" in message


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (6, "Q5_0"),
        (7, "Q5_1"),
        (10, "Q2_K"),
        (11, "Q3_K"),
        (13, "Q5_K"),
        (23, "IQ4_XS"),
        (30, "BF16"),
        (39, "MXFP4"),
        (4, "number 4"),
        (9999, "number 9999"),
    ],
)
def test_a_type_that_cannot_be_carried_over_is_refused_with_the_tensor(
    file: Path, number: int, name: str
) -> None:
    message = refusal(file, padded(header(tensors=[tensor(b"blk.3.ffn_up.weight", [256], number)]), 4096))
    assert f"tensor 'blk.3.ffn_up.weight' has type {name}," in message
    assert "F32, F16, Q4_0, Q4_1, Q8_0, Q4_K, Q6_K" in message


@pytest.mark.parametrize("kind", Type)
def test_a_type_goes_by_the_name_that_the_gguf_package_gives_it(file: Path, kind: Type) -> None:
    content = padded(header(tensors=[tensor(b"t.weight", [256], kind.value)]), 4096)
    if kind.value in READABLE_TYPES:
        file.write_bytes(content)
        assert [(part.type, part.nbytes) for part in read_header(file).tensors] == [
            (kind.name, 256 // GGML_QUANT_SIZES[kind][0] * GGML_QUANT_SIZES[kind][1])
        ]
    else:
        message = refusal(file, content)
        assert f"type {kind.name}," in message or f"number {kind.value}," in message


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        (13, bytes(8), "unknown type 13"),
        (ARRAY, struct.pack("<IQ", 99, 1) + bytes(8), "items of type 99"),
        (ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(32), "items of type 9"),
        (FLOAT64, struct.pack("<d", 1.5), "float64"),
        (ARRAY, struct.pack("<IQd", FLOAT64, 1, 1.5), "items of type 12"),
    ],
)
def test_a_value_that_cannot_be_read_is_refused(file: Path, kind: int, value: bytes, problem: str) -> None:
    assert problem in refusal(file, header(metadata=[entry(b"k", kind, value)]) + bytes(64))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (U32, struct.pack("<I", 0)),
        (U32, struct.pack("<I", 1 << 31)),
        (5, struct.pack("<i", -32)),
        (F32, struct.pack("<f", float("nan"))),
        (STRING, string(b"32")),
        (ARRAY, struct.pack("<IQI", U32, 1, 32)),
    ],
)
def test_an_alignment_that_makes_no_sense_is_refused(file: Path, kind: int, value: bytes) -> None:
    metadata: list[Any] = [entry(b"general.alignment", kind, value)]
    assert "general.alignment makes no sense" in refusal(file, padded(header(metadata=metadata), 64))


def test_text_that_is_not_utf8_is_read_with_replacements(file: Path) -> None:
    file.write_bytes(header(metadata=[entry(b"k", STRING, string(b"a\xffb"))]))
    assert read_header(file).metadata == {"k": "a\ufffdb"}
