"""load, reload, unload, alias, models, and the adapters."""

from collections.abc import Awaitable

from msgspec import UnsetType

from mlx_sidecar.protocol import messages as m

from ..models.progress import Tell
from ..models.registry import ModelRegistry
from ..server.connection import Call


class ModelsApi:
    """What is in memory, and what should be."""

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry

    def load(self, params: m.LoadParams, call: Call) -> Awaitable[m.LoadResult]:
        """Load a model, evaluate all of its weights and warm it up."""
        return self._registry.load(params, _tell(params.partial_result_token, call))

    def reload(self, params: m.ReloadParams, call: Call) -> Awaitable[m.LoadResult]:
        """Load a model anew beside the one that serves."""
        return self._registry.reload(params, _tell(params.partial_result_token, call))

    def unload(self, params: m.UnloadParams, _: Call) -> Awaitable[m.UnloadResult]:
        """Unload a model once nothing uses it."""
        return self._registry.unload(params)

    def alias(self, params: m.AliasParams, _: Call) -> m.AliasResult:
        """Let another name stand for a model."""
        return self._registry.alias(params)

    def models(self, _: m.NoParams, __: Call) -> m.ModelsResult:
        """List the models that were loaded."""
        return m.ModelsResult(models=self._registry.infos())

    def load_adapter(self, params: m.LoadAdapterParams, _: Call) -> Awaitable[m.LoadAdapterResult]:
        """Load an adapter beside its model."""
        return self._registry.load_adapter(params)

    def unload_adapter(self, params: m.UnloadAdapterParams, _: Call) -> Awaitable[m.UnloadAdapterResult]:
        """Unload an adapter once nothing uses it."""
        return self._registry.unload_adapter(params)


def _tell(token: int | str | UnsetType, call: Call) -> Tell | None:
    if isinstance(token, UnsetType):
        return None
    call.open_stream(token)
    return call.progress
