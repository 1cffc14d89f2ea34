"""pull."""

from collections.abc import Awaitable

from msgspec import UNSET, UnsetType

from mlx_sidecar.protocol import messages as m

from ..models.pulling import OnProgress, Pulls
from ..server.connection import Call


class PullApi:
    """What comes onto this machine."""

    def __init__(self, pulls: Pulls) -> None:
        self._pulls = pulls

    def pull(self, params: m.PullParams, call: Call) -> Awaitable[m.PullResult]:
        """Bring a model, with progress if the request has a `partialResultToken`.

        Raises:
            PullFailed, InvalidParams.
        """
        on_progress: OnProgress = lambda _: None  # noqa: E731
        if not isinstance(params.partial_result_token, UnsetType):
            call.open_stream(params.partial_result_token)
            on_progress = call.progress
        revision = None if params.revision is UNSET else params.revision
        return self._pulls.pull(params.model, revision, on_progress)
