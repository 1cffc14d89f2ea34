"""The settings of one sidecar process. Order of precedence: defaults < environment < flags."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from msgspec import Struct

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]


class Settings(Struct, frozen=True, kw_only=True):
    """Every default that a person may want to change."""

    home: Path
    """Folder of imported models, one sub-folder each in `models/`."""

    log_level: LogLevel = "info"
    """Least severe line that goes to stderr."""

    log_format: LogFormat = "text"
    """Lines for people, or one JSON object each."""

    eof_grace_seconds: float = 5.0
    """After its last word a client's requests may run this long, so `serve < file` gives every answer."""

    max_connections: int = 256
    """Clients of a listening server at a time. Each has a thread that reads; a slow one, one that writes."""

    max_sequences: int | None = None
    """Sequences of a model decoded together; more wait in line, as each makes a step slower for everybody.
    None is 256, on a CPU 64: there more are hardly faster and take memory."""

    max_waiting: int = 1024
    """Requests in the engine's line; one more is answered `overloaded`, with the time to try again."""

    ageing_seconds: float = 10.0
    """A priority that is passed over for so long rises by one class, so that nothing waits for ever."""

    memory_budget_bytes: int | None = None
    """What weights and caches may take together; None is nine tenths of what the device has."""

    stall_seconds: float = 120.0
    """A step that takes longer is a standstill: every request fails, and the process ends to be restarted."""

    prefill_chunk_tokens: int = 2048
    """Prompt tokens processed at once while nothing decodes; beside running streams fewer, for their pace."""

    prefill_chunk_tokens_cpu: int = 128
    """The same on a CPU: the length of a chunk. Up to eight prompts of this length go together."""

    tokenizer_threads: int = 2
    """Requests whose templates and tokens are worked out at the same time, off the event loop."""


def default_home(environment: Mapping[str, str], platform: str = sys.platform) -> Path:
    """Return where models are kept: MLX_SIDECAR_HOME, or the platform's cache folder."""
    if home := environment.get("MLX_SIDECAR_HOME"):
        return Path(home).expanduser().absolute()
    if platform == "darwin":
        return Path("~/Library/Caches/mlx-sidecar").expanduser()
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "mlx-sidecar"
