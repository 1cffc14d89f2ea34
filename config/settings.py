"""The settings of one sidecar process: every default, its unit and its reason."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
Dtype = Literal["auto", "stored", "float32", "float16", "bfloat16"]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Bytes = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Milliseconds = Annotated[int, Meta(ge=0, le=10**12)]
PositiveBytes = Annotated[int, Meta(ge=1, le=2**53 - 1)]
PositiveMilliseconds = Annotated[int, Meta(ge=1, le=10**12)]


def _live(description: str) -> Meta:
    """Describe a setting that takes effect while the sidecar runs."""
    return Meta(description=description, extra={"live": True})


def _fixed(description: str) -> Meta:
    """Describe a setting that waits for a restart."""
    return Meta(description=description, extra={"live": False})


class Preload(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A model that is loaded at start. The members are those of the parameters of `load`."""

    model: Name
    alias: Name | None = None
    revision: Name | None = None
    dtype: Dtype = "auto"
    pin: bool = False
    ttl_ms: Milliseconds | UnsetType | None = UNSET
    """As `model_ttl_ms`, which it is unless it is given."""


def default_home(environment: Mapping[str, str], platform: str = sys.platform) -> Path:
    """Return where models are kept: MLX_SIDECAR_HOME, or the platform's cache folder."""
    if home := environment.get("MLX_SIDECAR_HOME"):
        return Path(home).expanduser().absolute()
    if platform == "darwin":
        return Path("~/Library/Caches/mlx-sidecar").expanduser()
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "mlx-sidecar"


class Settings(Struct, kw_only=True):
    """Every default that a person may want to change; `description` says its unit and why.

    All parts hold the same object. It changes in place, on the event loop, when the file does: what is live
    is read where it is used.
    """

    home: Annotated[Path, _fixed("Folder of imported models. Null is the cache folder of the platform.")]

    log_level: Annotated[LogLevel, _live("Least severe line that goes to stderr.")] = "info"

    log_format: Annotated[LogFormat, _live("Lines for people, or one JSON object each.")] = "text"

    eof_grace_ms: Annotated[
        Milliseconds,
        _live("Milliseconds that requests may run after a client's last word: `serve < file` answers all."),
    ] = 5_000

    max_connections: Annotated[
        Count, _live("Clients of a listening server at a time. Each has a thread; a slow one, two.")
    ] = 256

    max_sequences: Annotated[
        Count | None,
        _fixed("Sequences of a model decoded together; each slows the others. Null is 256, on a CPU 64."),
    ] = None

    max_waiting: Annotated[
        Count, _live("Requests in line; one more is answered `overloaded`, with the time to try again.")
    ] = 1024

    ageing_ms: Annotated[
        PositiveMilliseconds,
        _live("Milliseconds after which a priority that is passed over rises one class: nobody starves."),
    ] = 10_000

    stall_ms: Annotated[
        PositiveMilliseconds,
        _live("Milliseconds that a step may take; then the process ends, to be started again."),
    ] = 120_000

    prefill_chunk_tokens: Annotated[
        Count,
        _fixed("Prompt tokens processed at once while nothing decodes; beside running streams fewer."),
    ] = 2048

    prefill_chunk_tokens_cpu: Annotated[
        Count, _fixed("The same on a CPU, for each prompt; up to eight of this length go together.")
    ] = 128

    tokenizer_threads: Annotated[
        Count, _fixed("Requests whose templates and tokens are worked out at a time, off the event loop.")
    ] = 2

    memory_budget_bytes: Annotated[
        PositiveBytes | None,
        _live("Bytes that weights and caches may take together. Null is nine tenths of what the device has."),
    ] = None

    wired_limit_bytes: Annotated[
        Bytes | None,
        _fixed("Bytes that Metal keeps from being paged out. Null is what the device recommends; 0 is off."),
    ] = None

    min_available_bytes: Annotated[
        Bytes,
        _live("Bytes left to the machine; with less we give up caches, idle models, then new requests."),
    ] = 256 * 1024 * 1024

    evict_models: Annotated[bool, _live("Whether idle models may leave memory to make room for another.")] = (
        True
    )

    model_ttl_ms: Annotated[
        Milliseconds | None,
        _live("Milliseconds unused after which a model leaves memory until it is asked for. Null is never."),
    ] = None

    models_preload: Annotated[
        list[Preload],
        _fixed("Models loaded at start, in order; of each: model, alias, revision, dtype, pin, ttl_ms."),
    ] = field(default_factory=list[Preload])

    predictive_preload: Annotated[
        bool, _live("Whether models that are asked for at a pattern come back ahead of the request.")
    ] = False
