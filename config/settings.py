"""The settings of one sidecar process: every default, its unit and its reason."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Bytes = Annotated[int, Meta(ge=1, le=2**53 - 1)]
BytesOrNone = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Milliseconds = Annotated[int, Meta(ge=0, le=10**12)]
