"""What all messages are made of. What has a title is a type with a name in the schema too."""

from typing import Annotated

from msgspec import Meta, Struct

from ..jsonrpc import SAFE_INTEGER

PROTOCOL_VERSION = 1

Text = Annotated[str, Meta(max_length=16 * 1024 * 1024)]
ModelName = Annotated[str, Meta(min_length=1, max_length=4096)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(max_length=4 * 1024 * 1024)]
ProgressToken = Annotated[
    Annotated[int, Meta(ge=-SAFE_INTEGER, le=SAFE_INTEGER)] | Annotated[str, Meta(max_length=256)],
    Meta(description="Names a stream: a request that has one is answered by `$/progress` with it."),
]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]


class Params(Struct, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """Base of what a client sends."""


class Result(Struct, rename="camel", kw_only=True, omit_defaults=True):
    """Base of what the server sends; clients ignore members they do not know."""


class NoParams(Params):
    """A method without parameters."""
