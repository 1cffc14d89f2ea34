"""The models that the settings want in memory from the start."""

import logging

from msgspec import UNSET

from mlx_sidecar.config.settings import Preload, Settings
from mlx_sidecar.protocol import messages as m
from mlx_sidecar.protocol.errors import SidecarError

from .registry import ModelRegistry

log = logging.getLogger("models")


class Preloading:
    """Loads what `models_preload` lists, in its order."""

    def __init__(self, registry: ModelRegistry, settings: Settings) -> None:
        self._registry = registry
        self._wanted = list(settings.models_preload)

    async def run(self) -> None:
        """Load all of them; one that cannot be loaded does not keep the others out."""
        # All are known at once: requests that come early wait for their model.
        for loading in [(wanted, self._registry.load(_params(wanted))) for wanted in self._wanted]:
            wanted, work = loading
            try:
                await work
            except SidecarError as error:
                log.error("the preload of %s failed: %s", wanted.model, error.message)


def _params(wanted: Preload) -> m.LoadParams:
    return m.LoadParams(
        model=wanted.model,
        revision=UNSET if wanted.revision is None else wanted.revision,
        alias=UNSET if wanted.alias is None else wanted.alias,
        dtype=wanted.dtype,
        pin=wanted.pin,
        ttl_ms=wanted.ttl_ms,
    )
