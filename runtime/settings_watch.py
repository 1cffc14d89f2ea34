"""Follows the settings file while the sidecar runs: what is live takes effect, and the log says so."""

import logging
from collections.abc import Awaitable, Callable, Iterator

import anyio
from anyio import to_thread

from mlx_sidecar.config.fields import FIELDS
from mlx_sidecar.config.layers import Effective, SettingsSource
from mlx_sidecar.config.settings import Settings
from mlx_sidecar.config.values import ConfigError, shown
from mlx_sidecar.config.watch import WatchedFile

log = logging.getLogger("settings")

_POLL_SECONDS = 1.0


async def watch_settings(started: Effective, apply: Callable[[set[str]], Awaitable[None]]) -> None:
    """Follow the file for ever: set live values in `started.settings`, then wait for `apply` with their keys.

    A file that cannot be followed is logged and changes nothing.
    """
    source, running, last = started.source, started.settings, started
    if source.file is None:
        return
    watched = WatchedFile(source.file, started.seen)
    while True:
        await anyio.sleep(_POLL_SECONDS)
        if watched.poll() and (now := await _read(source)) is not None:
            news = "; ".join(_news(running, last, now)) or "no setting is different"
            changed = _set_live(running, now.settings)
            last = now
            await apply(changed)
            log.info("%s changed: %s", source.file.name, news)


async def _read(source: SettingsSource) -> Effective | None:
    try:
        return await to_thread.run_sync(lambda: source.read(removable=True), abandon_on_cancel=True)
    except ConfigError as error:
        log.warning("%s Until then all settings stay as they are.", error)
        return None


def _set_live(running: Settings, wanted: Settings) -> set[str]:
    changed = {key for key in _different(running, wanted) if FIELDS[key].live}
    for key in changed:
        setattr(running, key, getattr(wanted, key))
    return changed


def _different(one: Settings, other: Settings) -> list[str]:
    return [key for key in FIELDS if getattr(one, key) != getattr(other, key)]


def _news(running: Settings, last: Effective, now: Effective) -> Iterator[str]:
    different = _different(running, now.settings)
    if live := [key for key in different if FIELDS[key].live]:
        yield f"took effect: {', '.join(_step(key, running, now.settings) for key in live)}"
    if fixed := [key for key in different if not FIELDS[key].live]:
        yield f"waits for a restart: {', '.join(_step(key, running, now.settings) for key in fixed)}"
    for key, origin in now.origins.items():
        edited = key in now.in_file and now.in_file[key] != last.in_file.get(key)
        if edited and FIELDS[key].names(origin):
            yield f"{key} in the file is overridden by {origin}"


def _step(key: str, before: Settings, after: Settings) -> str:
    return f"{key} {shown(getattr(before, key))} -> {shown(getattr(after, key))}"
