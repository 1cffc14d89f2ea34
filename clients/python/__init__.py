"""The Python client: starts a sidecar, or connects to one, and speaks to it. With asyncio, trio, or neither.

Lives here: the process or socket, the connection, and one method per request, over the types of `protocol`.
Does not live here: anything of the server; this package imports `protocol` only.
"""

from .errors import SidecarDisconnected, SidecarError, SidecarExited, SidecarNotStarted, SidecarRequestError
from .generation import Generation
from .sidecar import Sidecar, Transport
from .sync import SyncGeneration, SyncSidecar

__all__ = [
    "Generation",
    "Sidecar",
    "SidecarDisconnected",
    "SidecarError",
    "SidecarExited",
    "SidecarNotStarted",
    "SidecarRequestError",
    "SyncGeneration",
    "SyncSidecar",
    "Transport",
]
