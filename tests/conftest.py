"""Models and servers that many tests share."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings
from support.tiny_model import make_tiny_model
from support.wire import Wire

DEMO_MODEL = "smollm2-135m"

# No deadline: a slow machine is not a defect. The same examples in every CI run, new ones everywhere else.
settings.register_profile("here", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("here")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with random weights."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_server(tiny_model: Path) -> Generator[Wire]:
    """A server that has the tiny model loaded, under the name of its folder."""
    with Wire() as wire:
        wire.initialize()
        wire.result("load", model=str(tiny_model))
        yield wire


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
