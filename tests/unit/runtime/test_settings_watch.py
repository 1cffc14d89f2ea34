import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from mlx_sidecar.config.layers import SettingsSource
from mlx_sidecar.config.settings import Settings
from mlx_sidecar.runtime import settings_watch
from mlx_sidecar.runtime.settings_watch import watch_settings

pytestmark = pytest.mark.anyio

PATIENCE_SECONDS = 10


class _Lines(logging.Handler):
    """What the watch has logged, as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self._send, self._receive = anyio.create_memory_object_stream[str](100)

    def emit(self, record: logging.LogRecord) -> None:
        self._send.send_nowait(record.getMessage())

    async def next(self) -> str:
        return await self._receive.receive()

    def close(self) -> None:
        self._send.close()
        self._receive.close()
        super().close()


class Watched:
    """A file that is being watched, and what came of it."""

    def __init__(self, path: Path, settings: Settings, log: _Lines) -> None:
        self.path = path
        self.settings = settings
        self._log = log
        self.applied: list[set[str]] = []

    async def write(self, text: str) -> str:
        """Write the file; return the line in the log that follows."""
        self.path.write_text(text)
        return await self._log.next()

    async def apply(self, changed: set[str]) -> None:
        self.applied.append(changed)

    async def remove(self) -> str:
        self.path.unlink()
        return await self._log.next()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_watch, "_POLL_SECONDS", 0.001)


@asynccontextmanager
async def watch(
    path: Path, text: str = "", environment: dict[str, str] | None = None, flags: dict[str, str] | None = None
) -> AsyncGenerator[Watched]:
    path.write_text(text)
    started = SettingsSource.of(environment or {}, flags, path).read()
    log = _Lines()
    it = Watched(path, started.settings, log)
    settings_watch.log.addHandler(log)
    settings_watch.log.setLevel(logging.INFO)
    try:
        with anyio.fail_after(PATIENCE_SECONDS):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch_settings, started, it.apply)
                yield it
                tasks.cancel_scope.cancel()
    finally:
        settings_watch.log.removeHandler(log)
        settings_watch.log.setLevel(logging.NOTSET)
        log.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runtime.yaml"


async def test_what_is_live_takes_effect_in_the_object_that_everybody_holds(path: Path) -> None:
    async with watch(path, "max_waiting: 7\n") as it:
        assert it.settings.max_waiting == 7
        line = await it.write("max_waiting: 10\nevict_models: false\n")
        assert line == "runtime.yaml changed: took effect: max_waiting 7 -> 10, evict_models true -> false"
        assert (it.settings.max_waiting, it.settings.evict_models) == (10, False)
        assert it.applied == [{"max_waiting", "evict_models"}]


async def test_what_is_not_live_waits_and_is_said_to(path: Path) -> None:
    async with watch(path) as it:
        line = await it.write("tokenizer_threads: 4\nmax_waiting: 10\n")
        assert line == (
            "runtime.yaml changed: took effect: max_waiting 1024 -> 10; "
            "waits for a restart: tokenizer_threads 2 -> 4"
        )
        assert it.settings.tokenizer_threads == 2
        line = await it.write("max_waiting: 10\n")
        assert line == "runtime.yaml changed: no setting is different"


async def test_a_key_that_a_later_layer_sets_is_said_to_be_overridden(path: Path) -> None:
    environment = {"MLX_SIDECAR_AGEING_MS": "5"}
    async with watch(path, environment=environment, flags={"max_waiting": "3"}) as it:
        line = await it.write("max_waiting: 10\nageing_ms: 10\n")
        assert line == (
            "runtime.yaml changed: max_waiting in the file is overridden by --max-waiting; "
            "ageing_ms in the file is overridden by MLX_SIDECAR_AGEING_MS"
        )
        assert (it.settings.max_waiting, it.settings.ageing_ms) == (3, 5)
        assert "overridden" not in await it.write("max_waiting: 10\nageing_ms: 10\nstall_ms: 9\n")


async def test_a_file_with_an_error_changes_nothing_and_the_next_one_is_followed(path: Path) -> None:
    async with watch(path, "max_waiting: 7\n") as it:
        for wrong in ("max_waiting: 10\nstall_ms: never\n", "max_waitng: 10\n", "[", "\x07"):
            line = await it.write(wrong)
            assert line.startswith(f"{path}:")
            assert line.endswith("Until then all settings stay as they are.")
            assert it.settings.max_waiting == 7
        assert it.applied == []
        await it.write("max_waiting: 10\n")
        assert it.settings.max_waiting == 10


async def test_a_file_that_goes_takes_its_settings_with_it_even_if_it_was_asked_for(path: Path) -> None:
    async with watch(path, "max_waiting: 7\n") as it:
        assert await it.remove() == "runtime.yaml changed: took effect: max_waiting 7 -> 1024"
        assert "1024 -> 8" in await it.write("max_waiting: 8\n")


async def test_an_edit_between_the_start_and_the_watch_is_noticed(path: Path) -> None:
    async with watch(path, "max_waiting: 7\n") as it:
        # The task has not had its first turn yet.
        assert "max_waiting 7 -> 8" in await it.write("max_waiting: 8\n")


async def fail(_: set[str]) -> None:
    raise AssertionError


async def test_where_no_folder_for_the_file_is_known_nothing_is_watched() -> None:
    started = SettingsSource(None, required=False, environment={}, flags={}).read()
    with anyio.fail_after(PATIENCE_SECONDS):
        await watch_settings(started, fail)
