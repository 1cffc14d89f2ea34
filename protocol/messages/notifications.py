"""What has no answer."""

from typing import Annotated, Any

from msgspec import Meta

from ..jsonrpc import SAFE_INTEGER
from .base import Params, ProgressToken, Result
from .generate import GenerateProgress
from .models import LoadProgress, PullProgress

# Not a union: msgspec tells structs apart by a tag only, and every token would carry one.
ProgressValue = Annotated[
    Any,
    Meta(
        extra_json_schema={
            "anyOf": [
                {"$ref": f"#/components/schemas/{kind.__name__}"}
                for kind in (GenerateProgress, LoadProgress, PullProgress)
            ]
        },
    ),
]


class CancelParams(Params):
    """The id of the request to cancel; one that is not in flight is ignored."""

    id: int | str


class StreamAckParams(Params):
    """`seq` is the last that was dealt with; acks are absolute, so a lost one is healed by the next."""

    token: ProgressToken
    seq: Annotated[int, Meta(ge=0, le=SAFE_INTEGER)]


class ProgressParams(Result):
    """`token` is the `partialResultToken` of the request that this belongs to."""

    token: int | str
    value: ProgressValue
