"""Model folders that mean harm, or are damaged in ways that look like it, each made from the tiny model.

`HOSTILE` has a name, the kind of error that `load` must answer, and what turns a good folder into this one.
A folder that runs code makes the file `canary` beside it.
"""

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy as safetensors
from support.tiny_model import make_tiny_model

CANARY = "canary"

Spoil = Callable[[Path], object]
Entry = tuple[str, dict[str, Any]]


class Hostile(NamedTuple):
    """One kind of folder."""

    name: str
    kind: str
    spoil: Spoil

    def make(self, folder: Path) -> Path:
        """Write the folder and return it."""
        self.spoil(make_tiny_model(folder))
        return folder


def _code(name: str) -> Spoil:
    return lambda folder: (folder / name).write_text(f"open({str(folder.parent / CANARY)!r}, 'w')\n")


def _pickle(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        command = f"touch {folder.parent / CANARY}"
        (folder / name).write_bytes(b"cos\nsystem\n(S" + repr(command).encode() + b"\ntR.")

    return spoil


def _json(file: str, **members: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / file
        value: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(value | members))

    return spoil


def _config(**members: Any) -> Spoil:
    return _json("config.json", **members)


def _text(file: str, text: str | bytes) -> Spoil:
    return lambda folder: (folder / file).write_bytes(text.encode() if isinstance(text, str) else text)


def _both(*spoils: Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        for one in spoils:
            one(folder)

    return spoil


def _tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _weights(header: dict[str, Any] | bytes, body: bytes = b"", length: int | None = None) -> Spoil:
    """Replace the weights by a file of this header and body; `length` is what the file says of the header."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(data) if length is None else length)
    return lambda folder: (folder / "model.safetensors").write_bytes(start + data + body)


def _changed_weights(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _arrays(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        arrays: dict[str, Any] = dict(safetensors.load_file(path))
        change(arrays)
        safetensors.save_file(arrays, path)

    return spoil


def _second_shard(folder: Path) -> None:
    (folder / "model-2.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


def _link_out(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        target = folder.parent / f"outside-{name}"
        path = folder / name
        target.write_bytes(path.read_bytes() if path.exists() else b"{}")
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return spoil


def _instead(name: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def _bind(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        # By way of the descriptor: the whole path may be too long for an address.
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def _huge(path: Path) -> None:
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(300 * 1024 * 1024)


def _tokenizer(**members: Any) -> Spoil:
    return _json("tokenizer.json", **members)


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


GROWING = {"type": "Sequence", "normalizers": [_replace("a", "a" * 10) for _ in range(7)]}
OVERLAPPING = {f"t{number}": _tensor("U8", [1_000_000], 0, 1_000_000) for number in range(20_000)}
ONE = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
TWICE = b"{" + ONE + b"," + ONE + b"}"

_UNSAFE: dict[str, Spoil] = {
    "model file of its own": _both(_code("evil.py"), _config(model_file="evil.py")),
    "model file without the file": _config(model_file="../../evil.py"),
    "Python file beside": _code("modeling_tiny.py"),
    "Python file in capitals": _code("SETUP.PY"),
    "compiled Python file": _text("evil.pyc", b"\xa7\r\r\n"),
    "shared library": _text("evil.so", b"\x7fELF"),
    "pickled weights": _pickle("pytorch_model.bin"),
    "pickled checkpoint": _pickle("weights.pt"),
    "pickle of training": _pickle("training_args.pkl"),
    "auto_map": _both(_code("evil.py"), _config(auto_map={"AutoModel": "evil.Model"})),
    "auto_map of the hub": _config(auto_map={"AutoConfig": "evil/repo--evil.Config"}),
    "auto_map in a config within": _config(text_config={"deep": [{"auto_map": {"AutoModel": "x"}}]}),
    "auto_map of the tokenizer": _json("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
    "auto_map of the processor": _json("preprocessor_config.json", auto_map={"AutoProcessor": "evil.P"}),
    "attention from the hub": _config(_attn_implementation="evil/kernels"),
    "internal attention from the hub": _config(_attn_implementation_internal="evil/kernels:run"),
    "trust_remote_code": _config(trust_remote_code=True),
    "trust_remote_code for generation": _json("generation_config.json", trust_remote_code=True),
    "generation of its own": _json("generation_config.json", custom_generate="evil/repo"),
    "config that is a link out": _link_out("config.json"),
    "weights that are a link out": _link_out("model.safetensors"),
    "tokenizer that is a link out": _link_out("tokenizer.json"),
    "any file that is a link out": _link_out("notes.txt"),
    "link to the secrets of the user": _instead(
        "chat_template.jinja", lambda path: path.symlink_to("/etc/passwd")
    ),
    "index that leads out": _json("model.safetensors.index.json", weight_map={"a": "../outside.safetensors"}),
    "index with an absolute path": _json("model.safetensors.index.json", weight_map={"a": "/etc/passwd"}),
}

_INVALID: dict[str, Spoil] = {
    "weights that overlap": _weights({"a": _tensor("U8", [4], 0, 4), "b": _tensor("U8", [4], 0, 4)}, b"1234"),
    "twenty thousand tensors in one place": _weights(OVERLAPPING, bytes(1_000_000)),
    "weights with a hole": _weights({"a": _tensor("U8", [2], 0, 2), "b": _tensor("U8", [2], 4, 6)}, b"12345"),
    "bytes behind the weights": _changed_weights(lambda data: data + b"tail"),
    "weights cut short": _changed_weights(lambda data: data[:-100]),
    "weights cut in the header": _changed_weights(lambda data: data[:200]),
    "empty weights": _text("model.safetensors", b""),
    "weights of seven bytes": _text("model.safetensors", b"1234567"),
    "header longer than the file": _weights({}, b"", 1 << 40),
    "header longer than any": _weights({}, b"", (1 << 64) - 1),
    "header of 128 MiB": _both(
        _weights({}, b"", 1 << 27), lambda folder: _huge(folder / "model.safetensors")
    ),
    "shape of 2^32": _weights({"a": _tensor("U8", [1 << 32], 0, 0)}),
    "shape that overflows": _weights({"a": _tensor("F32", [1 << 33, 1 << 33], 0, 4)}, b"1234"),
    "empty tensor of 2^40 columns": _weights({"a": _tensor("U8", [0, 1 << 40], 0, 0)}),
    "negative shape": _weights({"a": _tensor("U8", [-1], 0, 1)}, b"1"),
    "shape that is not a number": _weights(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"1"),
    "offsets that run backwards": _weights({"a": _tensor("U8", [4], 4, 0)}, b"1234"),
    "offsets behind the end": _weights({"a": _tensor("U8", [4], 100, 104)}, b"1234"),
    "two tensors of one name": _weights(TWICE, b"1"),
    "type that MLX cannot read": _weights({"a": _tensor("F64", [1], 0, 8)}, bytes(8)),
    "type that nobody knows": _weights({"a": _tensor("X7", [1], 0, 8)}, bytes(8)),
    "header nested without end": _weights(b'{"a":' + b"[" * 100_000, b""),
    "header that is a list": _weights(b"[]"),
    "header without tensors": _weights(b"{}"),
    "pickle with the name of weights": _pickle("model.safetensors"),
    "same tensors in two shards": _second_shard,
    "index with a missing shard": _json("model.safetensors.index.json", weight_map={"a": "gone.safetensors"}),
    "weights of another model": _arrays(lambda arrays: [arrays.pop(name) for name in list(arrays)[3:]]),
    "weights of the wrong shape": _arrays(
        lambda arrays: arrays.update({"model.norm.weight": np.zeros(7, "f4")})
    ),
    "weights of whole numbers": _arrays(
        lambda arrays: arrays.update({"model.norm.weight": np.zeros((2, 2), "i4")})
    ),
    "config nested without end": _text("config.json", '{"model_type":"llama","a":' * 100_000),
    "config nested too deep": _config(a=json.loads("[" * 70 + "]" * 70)),
    "config of 17 MiB": _text("config.json", b" " * (17 << 20)),
    "config that is no JSON": _text("config.json", "<html>"),
    "config that is a list": _text("config.json", "[]"),
    "config that is a folder": _instead("config.json", Path.mkdir),
    "config that is a pipe": _instead("config.json", os.mkfifo),
    "tokenizer that is a pipe": _instead("tokenizer.json", os.mkfifo),
    "weights that are a pipe": _instead("model-2.safetensors", os.mkfifo),
    "template that is a pipe": _instead("chat_template.jinja", os.mkfifo),
    "template that is a socket": _instead("chat_template.jinja", _bind),
    "weights that are a folder": _instead("model-2.safetensors", Path.mkdir),
    "link that leads nowhere": _instead("tokenizer.json", lambda path: path.symlink_to(path.parent / "gone")),
    "link to itself": _instead("merges.txt", lambda path: path.symlink_to(path)),
    "model_type that leads out": _config(model_type="../../evil"),
    "model_type of another package": _config(model_type="..os"),
    "model_type with a dot": _config(model_type="llama.evil"),
    "model_type that is no model": _config(model_type="cache"),
    "model_type that is the package": _config(model_type="__init__"),
    "model_type of a thousand letters": _config(model_type="a" * 1000),
    "model_type that is a number": _config(model_type=7),
    "a billion layers": _config(num_hidden_layers=10**9),
    "a thousand layers": _config(num_hidden_layers=1000),
    "a billion layers within": _config(text_config={"num_hidden_layers": 10**9}),
    "layers as text": _config(num_hidden_layers="2"),
    "less than no layers": _config(num_hidden_layers=-1),
    "a vocabulary of a billion": _config(vocab_size=10**9),
    "a vocabulary of 2^64": _config(vocab_size=2**64),
    "a hidden size of a billion": _config(hidden_size=10**9),
    "a hidden size of nothing": _config(hidden_size=0),
    "no heads": _config(num_attention_heads=0),
    "heads that do not divide": _config(num_attention_heads=3),
    "a billion heads": _config(num_attention_heads=10**9),
    "rope_theta as text": _config(rope_theta="10000"),
    "rope_theta as an object": _config(rope_theta={"a": 1}),
    "rope_scaling as text": _config(rope_scaling="linear"),
    "rope_scaling of no kind": _config(rope_scaling={"type": "evil", "factor": "x"}),
    "text_config as a list": _config(text_config=[1, 2]),
    "quantization as a list": _config(quantization=[4, 64]),
    "groups of none": _config(quantization={"group_size": 0, "bits": 4}),
    "bits of none": _config(quantization={"group_size": 64, "bits": 0}),
    "quantization of a mode unknown": _both(
        _config(quantization={"group_size": 64, "bits": 4, "mode": "evil"}),
        _arrays(lambda arrays: arrays.update({"lm_head.scales": np.zeros((271, 1), "f4")})),
    ),
    "quantization that lies": _both(
        _config(quantization={"group_size": 64, "bits": 4}),
        _arrays(lambda arrays: arrays.update({"lm_head.scales": np.zeros((1, 1), "f4")})),
    ),
    "no length of context": _config(max_position_embeddings=None),
    "an end token that is an object": _config(eos_token_id={"a": 1}),
    "end tokens that are text": _config(eos_token_id=["x", None]),
    "end tokens of generation that are text": _json("generation_config.json", eos_token_id="x"),
    "tokenizer that is no JSON": _text("tokenizer.json", "{"),
    "tokenizer of nothing": _text("tokenizer.json", "{}"),
    "tokenizer of 300 MiB": lambda folder: _huge(folder / "tokenizer.json"),
    "tokenizer that makes texts huge": _tokenizer(normalizer=GROWING),
    "tokenizer that tries without end": _tokenizer(pre_tokenizer=_split("(a+)+$")),
    "tokenizer with a pattern of a megabyte": _tokenizer(pre_tokenizer=_split("a?" * 500_000)),
    "tokenizer nested without end": _text("tokenizer.json", '{"normalizer":' + "[" * 100_000),
    "tokenizer settings that are a list": _text("tokenizer_config.json", "[]"),
    "template that is no template": _text("chat_template.jinja", "{% for %}"),
    "template of two megabytes": _text("chat_template.jinja", "x" * (2 << 20)),
    "template of a kind unknown": _json("tokenizer_config.json", chat_template=[{"name": "default"}]),
    "template list of numbers": _json("tokenizer_config.json", chat_template=[1]),
    "template that is not UTF-8": _text("chat_template.jinja", b"\xff\xfe"),
    "ten thousand files": lambda folder: [(folder / f"{number}.md").touch() for number in range(10_001)],
}  # fmt: skip

HOSTILE = [
    *(Hostile(name, "unsafe_model", spoil) for name, spoil in _UNSAFE.items()),
    *(Hostile(name, "invalid_model", spoil) for name, spoil in _INVALID.items()),
]
