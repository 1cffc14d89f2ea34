"""Models and servers that many tests share."""

import json
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings
from support.tiny_model import make_tiny_model
from support.wire import Listening, Wire

DEMO_MODEL = "smollm2-135m"

# Nobody's own settings may change what is tested. An empty file is one that sets nothing.
os.environ["MLX_SIDECAR_CONFIG"] = os.devnull

# No deadline: a slow machine is not a defect. The same examples in every CI run, new ones everywhere else.
settings.register_profile("here", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("here")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with random weights."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def roomy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model whose context is so long that only a cancel ends an answer."""
    model = make_tiny_model(tmp_path_factory.mktemp("models") / "roomy")
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 1 << 20}))
    return model


@pytest.fixture
def model(tiny_model: Path) -> str:
    """The tiny model's name, which is its folder."""
    return str(tiny_model)


@pytest.fixture
def roomy(roomy_model: Path) -> str:
    """The roomy model's name, which is its folder."""
    return str(roomy_model)


@pytest.fixture
def socket_path() -> Generator[Path]:
    """Where a socket can be made: in a private folder, on a path that is short enough."""
    folder = Path(tempfile.mkdtemp(prefix="mlx-", dir="/tmp"))
    yield folder / "s"
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def tiny_server(tiny_model: Path) -> Generator[Wire]:
    """A server that has the tiny model loaded, under the name of its folder."""
    with Wire() as wire:
        wire.initialize()
        wire.result("load", model=str(tiny_model))
        yield wire


@pytest.fixture(scope="session")
def listening_server(tiny_model: Path, roomy_model: Path) -> Generator[Listening]:
    """A server for many clients that has the tiny and the roomy model loaded."""
    folder = Path(tempfile.mkdtemp(prefix="mlx-", dir="/tmp"))
    with Listening(folder / "s") as server:
        with server.connect() as guest:
            for model in (tiny_model, roomy_model):
                guest.result("load", model=str(model))
        yield server
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def demo_server() -> Generator[Wire]:
    """A server that has the demo model loaded."""
    with Wire() as wire:
        wire.initialize()
        wire.result("load", model=DEMO_MODEL)
        yield wire


@pytest.fixture
def anyio_backend() -> str:
    """The event loop that the server runs on."""
    return "asyncio"
