"""How the process ended, as its parent sees it. A host does not start it again after 0, 2, 69 and 75.

Besides these: 128+n after signal n.
"""

CLEAN = 0
"""`shutdown` then `exit`, or the end of stdin."""

BROKEN_OFF = 1
"""`exit` without `shutdown`, a host that stopped reading, or LSP headers that cannot be followed."""

USAGE = 2
"""A wrong command line, or a socket that cannot be used."""

UNAVAILABLE = 69
"""MLX cannot run on this machine; whatever could be answered was."""

INTERNAL_ERROR = 70
"""The sidecar itself failed."""

OUT_OF_MEMORY = 71
"""There was no memory to go on."""

ALREADY_SERVED = 75
"""A live sidecar serves the socket; it was left alone."""
