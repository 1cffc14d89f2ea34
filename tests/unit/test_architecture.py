"""The rules of the house that a reader could break without noticing."""

import ast
import json
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from mlx_sidecar.protocol.version import VERSION

ROOT = Path(__file__).parents[2]
ROOMS = {
    "protocol": "mlx_sidecar.protocol",
    "config": "mlx_sidecar.config",
    "native": "mlx_sidecar.native",
    "runtime": "mlx_sidecar.runtime",
    "clients/python": "mlx_sidecar.client",
    "tests/conformance": "mlx_sidecar.conformance",
}
MAY_IMPORT: dict[str, set[str]] = {
    "protocol": set(),
    "config": set(),
    "native": set(),
    "runtime": {"protocol", "config", "native", "tests/conformance"},
    "clients/python": {"protocol"},
    "tests/conformance": {"protocol"},
}
MAY_IMPORT_MLX = ("runtime/engine", "runtime/models", "runtime/cache")
MODULES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Every module that a file names in an absolute import."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


def room_of(path: Path) -> str:
    return next(room for room in ROOMS if (ROOT / room) in path.parents)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    allowed = {ROOMS[room] for room in MAY_IMPORT[room_of(path)]}
    ours = {name for name in imports(path) if name.startswith("mlx_sidecar")}
    assert all(any(name.startswith(room) for room in allowed) for name in ours)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_a_folder_by_its_bare_name(path: Path) -> None:
    # It would work by accident from the repository root, and make a second copy of every class.
    assert not {name.split(".")[0] for name in imports(path)} & {"protocol", "config", "native", "runtime"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_rooms_of_the_inference_thread_import_mlx(path: Path) -> None:
    names = {name.split(".")[0] for name in imports(path)}
    if names & {"mlx", "mlx_lm"}:
        assert str(path.relative_to(ROOT)).startswith(MAY_IMPORT_MLX)


def test_the_list_of_packages_is_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent for path in MODULES}
    names = {
        ".".join([ROOMS[room], *folder.relative_to(ROOT / room).parts])
        for room in ROOMS
        for folder in folders
        if folder.is_relative_to(ROOT / room)
    }
    assert set(project["tool"]["setuptools"]["packages"]) == names


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=str)
def test_every_package_says_what_lives_in_it_and_what_does_not(folder: Path) -> None:
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    assert "Lives here: " in said
    assert "Does not live here: " in said


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_longer_than_600_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600


def test_every_package_has_the_same_version() -> None:
    npm = json.loads((ROOT / "clients/typescript/package.json").read_text())
    assert version("mlx-sidecar") == npm["version"] == VERSION
