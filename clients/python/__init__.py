"""The Python client: starts a sidecar, or several, and speaks to them. Works on asyncio and on trio.

Lives here: the process, the connection, and one method per request, over the types of `protocol`.
Does not live here: anything of the server; this package imports `protocol` only.
"""

from .errors import SidecarExited, SidecarNotStarted, SidecarRequestError
from .generation import Generation
from .sidecar import Sidecar

__all__ = ["Generation", "Sidecar", "SidecarExited", "SidecarNotStarted", "SidecarRequestError"]
