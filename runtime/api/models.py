"""load, unload, models."""

from collections.abc import Awaitable

from mlx_sidecar.protocol import messages as m

from ..models.registry import ModelRegistry
from ..server.connection import Call


class ModelsApi:
    """What is in memory."""

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry

    def load(self, params: m.LoadParams, _: Call) -> Awaitable[m.LoadResult]:
        """Load a model, evaluate all of its weights and warm it up."""
        return self._registry.load(params)

    async def unload(self, params: m.UnloadParams, _: Call) -> m.UnloadResult:
        """Unload a model once nothing uses it."""
        return await self._registry.unload(params)

    def models(self, _: m.NoParams, __: Call) -> m.ModelsResult:
        """List the models in memory."""
        return m.ModelsResult(models=self._registry.infos())
