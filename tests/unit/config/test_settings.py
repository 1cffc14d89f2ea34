from pathlib import Path

from mlx_sidecar.config.settings import default_home


def test_models_live_in_the_cache_folder_of_the_platform() -> None:
    assert default_home({}, "linux") == Path.home() / ".cache" / "mlx-sidecar"
    assert default_home({}, "darwin") == Path.home() / "Library" / "Caches" / "mlx-sidecar"


def test_the_cache_folder_can_be_moved() -> None:
    assert default_home({"XDG_CACHE_HOME": "/somewhere"}, "linux") == Path("/somewhere/mlx-sidecar")


def test_mlx_sidecar_home_wins_and_becomes_absolute() -> None:
    environment = {"MLX_SIDECAR_HOME": "models", "XDG_CACHE_HOME": "/somewhere"}
    assert default_home(environment, "linux") == Path.cwd() / "models"
