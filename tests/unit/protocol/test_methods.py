import re
from pathlib import Path

import msgspec
import pytest

from mlx_sidecar.protocol import messages
from mlx_sidecar.protocol.methods import METHODS

ROOT = Path(__file__).parents[3]
TYPESCRIPT = (ROOT / "clients/typescript/src/protocol.ts").read_text()
STRUCTS = [
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type)
    and issubclass(kind, msgspec.Struct)
    and kind.__name__ not in ("Params", "Result")
]


def interface_members(name: str) -> set[str] | None:
    match = re.search(rf"^export interface {name} \{{\n(.*?)^\}}", TYPESCRIPT, re.S | re.M)
    return None if match is None else set(re.findall(r"^  (\w+)\??:", match[1], re.M))


def test_the_typescript_client_knows_every_method() -> None:
    table = interface_members("Methods")
    assert table == set(METHODS)


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda kind: kind.__name__)
def test_typescript_interfaces_have_the_members_of_their_structs(struct: type[msgspec.Struct]) -> None:
    members = interface_members(struct.__name__)
    if members is not None:
        assert members == {field.encode_name for field in msgspec.structs.fields(struct)}


def test_the_comparison_above_sees_the_main_messages() -> None:
    named = ["LoadParams", "LoadResult", "GenerateParams", "GenerateResult", "StatsResult", "ModelInfo"]
    assert all(interface_members(name) for name in named)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_refuses_unknown_parameters(method: str) -> None:
    assert METHODS[method].params.__struct_config__.forbid_unknown_fields
