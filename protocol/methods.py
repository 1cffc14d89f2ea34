"""The one table of methods: what each takes and gives."""

from typing import Any

from msgspec import Struct
from msgspec.json import Decoder

from . import messages as m


class Method(Struct, frozen=True):
    """A request method. `result` None means the answer is null."""

    name: str
    params: type[m.Params]
    result: type[m.Result] | None
    before_initialize: bool = False


class Notification(Struct, frozen=True):
    """A message without an answer."""

    name: str
    params: type[Struct]


METHODS = {
    method.name: method
    for method in (
        Method("initialize", m.InitializeParams, m.InitializeResult, before_initialize=True),
        Method("ping", m.NoParams, m.PingResult, before_initialize=True),
        Method("load", m.LoadParams, m.LoadResult),
        Method("unload", m.UnloadParams, m.UnloadResult),
        Method("models", m.NoParams, m.ModelsResult),
        Method("generate", m.GenerateParams, m.GenerateResult),
        Method("tokenize", m.TokenizeParams, m.TokenizeResult),
        Method("detokenize", m.DetokenizeParams, m.DetokenizeResult),
        Method("stats", m.NoParams, m.StatsResult),
        Method("shutdown", m.NoParams, None, before_initialize=True),
    )
}

CLIENT_NOTIFICATIONS = {
    notification.name: notification
    for notification in (Notification("$/cancelRequest", m.CancelParams), Notification("exit", m.NoParams))
}

SERVER_NOTIFICATIONS = {"$/progress": Notification("$/progress", m.ProgressParams)}

PARAMS_DECODERS: dict[str, Decoder[Any]] = {
    name: Decoder(entry.params) for name, entry in (METHODS | CLIENT_NOTIFICATIONS).items()
}
"""Building a decoder costs far more than using it, so each type has one."""
