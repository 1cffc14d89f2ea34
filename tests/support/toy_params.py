"""What the toy server's methods take, and how to find the parameter that is wrong."""

from collections.abc import Callable
from typing import Any, cast

SAFE_INTEGER = 2**53 - 1

Check = Callable[[Any], str | None]
"""Returns None for a good value, else where in it the mistake is: "" for the value itself."""


def integer(low: float, high: float = 2**31 - 1) -> Check:
    """Check for an integer within bounds."""
    return lambda value: None if type(value) is int and low <= value <= high else ""


def number(low: float, high: float) -> Check:
    """Check for a number within bounds."""
    return lambda value: None if type(value) in (int, float) and low <= value <= high else ""


def kind(*types: type) -> Check:
    """Check for a value of one of `types`."""
    return lambda value: None if type(value) in types else ""


def choice(*values: str) -> Check:
    """Check for one of `values`."""
    return lambda value: None if value in values else ""


def items(item: Check) -> Check:
    """Check for a list whose values pass `item`."""

    def check(value: Any) -> str | None:
        if not isinstance(value, list):
            return ""
        places = ((at, item(one)) for at, one in enumerate(cast(list[Any], value)))
        return next((f"[{at}]{path}" for at, path in places if path is not None), None)

    return check


def members(**checks: Check) -> Check:
    """Check for an object with these members and no others. A name with `_` behind it must be there."""
    known = {name.rstrip("_"): check for name, check in checks.items()}
    required = [name[:-1] for name in checks if name.endswith("_")]

    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return ""
        given = cast(dict[str, Any], value)
        for name in [*required, *given]:
            path = known[name](given[name]) if name in given and name in known else ""
            if path is not None:
                return f".{name}{path}"
        return None

    return check


def name(value: Any) -> str | None:
    """Check for a name."""
    return None if isinstance(value, str) and 0 < len(value) <= 256 else ""


def nullable(check: Check) -> Check:
    """Check for null, or what passes `check`."""
    return lambda value: None if value is None else check(value)


_TOKEN = kind(int, str)
_TOKENS = items(integer(0))
_MESSAGES = items(members(role_=choice("system", "user", "assistant", "tool"), content_=kind(str)))
_PROMPTS: dict[str, Check] = {"messages": _MESSAGES, "tokens": _TOKENS, "prompt": kind(str)}

PARAMS: dict[str, Check] = {
    "initialize": members(
        protocolVersion_=kind(int),
        clientInfo=members(name_=kind(str), version=kind(str)),
        processId=nullable(integer(1, SAFE_INTEGER)),
        capabilities=kind(dict),
        flowControl=members(windowBytes_=integer(1, SAFE_INTEGER)),
    ),
    **dict.fromkeys(("ping", "server/info", "rpc.discover", "models", "stats", "shutdown"), members()),
    "load": members(
        model_=kind(str),
        revision=name,
        alias=name,
        dtype=choice("auto", "stored", "float32", "float16", "bfloat16"),
        pin=kind(bool),
        ttlMs=nullable(integer(0, SAFE_INTEGER)),
        partialResultToken=_TOKEN,
    ),
    "reload": members(model_=kind(str), partialResultToken=_TOKEN),
    "unload": members(model_=kind(str), force=kind(bool)),
    "alias": members(alias_=name, model_=nullable(kind(str))),
    "pull": members(model_=kind(str), revision=name, partialResultToken=_TOKEN),
    "loadAdapter": members(model_=kind(str), adapter_=name, path_=kind(str)),
    "unloadAdapter": members(model_=kind(str), adapter_=name, force=kind(bool)),
    "tokenize": members(model_=kind(str), text=kind(str), messages=_MESSAGES, addSpecialTokens=kind(bool)),
    "detokenize": members(model_=kind(str), tokens_=_TOKENS),
    "generate": members(
        model_=kind(str),
        maxTokens=integer(1),
        temperature=number(0, 100),
        topP=number(0, 1),
        seed=integer(0, SAFE_INTEGER),
        stop=items(kind(str)),
        stopTokenIds=_TOKENS,
        logitBias=kind(dict),
        logProbs=nullable(integer(0, 20)),
        adapter=name,
        priority=choice("critical", "high", "normal", "low"),
        deadlineMs=integer(1),
        deduplicate=kind(bool),
        partialResultToken=_TOKEN,
        **_PROMPTS,
    ),
}
"""Checks of the params of every method, by its name."""
