import re

from mlx_sidecar.runtime.models.catalog import CATALOG
from mlx_sidecar.runtime.models.store import is_store_name


def test_every_model_goes_by_a_name_of_the_store() -> None:
    assert CATALOG
    for name, model in CATALOG.items():
        assert name == model.name
        assert is_store_name(name)


def test_every_package_and_file_is_pinned_by_a_whole_hash() -> None:
    for model in CATALOG.values():
        for sha256 in (model.package_sha256, model.file_sha256):
            assert re.fullmatch(r"[0-9a-f]{64}", sha256)
        assert re.fullmatch(r"\d+(\.\d+)*", model.version)
        assert model.member.endswith(".gguf")
        assert not model.member.startswith("/")
        assert ".." not in model.member
