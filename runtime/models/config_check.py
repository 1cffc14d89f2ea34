"""Whether the settings of a model ask for code, and whether its sizes can be meant.

mlx-lm builds a network from config.json before it looks at the weights: a number of layers that is a lie
would keep it busy until memory ends.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from mlx_sidecar.protocol.errors import InvalidModel

from .bounded_json import children

MAX_LAYERS = 1024
MAX_PARTS = 65_536
"""Of experts or heads in one layer."""

# It becomes the name of a module: without dots it cannot leave mlx_lm.models.
_MODEL_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks)|depth")
_PARTS = re.compile(r"(num|n)_(\w+_)?(experts|heads|groups)")
_SIZES = re.compile(r"hidden_size|intermediate_size|vocab_size|head_dim|max_position_embeddings|n_embd")
_COUNTS = ((_LAYERS, MAX_LAYERS), (_PARTS, MAX_PARTS), (_SIZES, 2**31 - 1))
_NUMBERS = re.compile(r"rope_theta|partial_rotary_factor|(rms_|layer_)?norm_eps|layer_norm_epsilon")
_OBJECTS = re.compile(r"(text|vision|quantization)_config|rope_parameters|quantization")
# Zero would be divided by, in C++.
_CHOICES = {"group_size": (-1, 16, 32, 64, 128), "bits": (1, 2, 3, 4, 5, 6, 8)}
_VALUES_IN_AN_ELEMENT = 32
"""Of packed weights, at most."""

Shapes = Mapping[str, tuple[int, ...]]


def code_field(value: Any) -> str | None:
    """Return the name of a field, at any depth, that makes a library import or fetch code."""
    pending = [value]
    while pending:
        found = pending.pop()
        for name, inner in _object(found).items():
            if _asks_for_code(name, inner):
                return name[:100]
        pending += children(found)
    return None


def _asks_for_code(name: str, value: object) -> bool:
    if name in ("auto_map", "model_file", "trust_remote_code", "custom_generate"):
        return bool(value)
    # As a bool it only says that a choice was made; as text or an object it names what to fetch and run.
    return name.startswith("_attn_implementation") and not isinstance(value, bool | None)


def check_config(model: str, config: dict[str, Any]) -> None:
    """Check model_type, and every size that mlx-lm would build a network by.

    Raises:
        InvalidModel: one is missing, of the wrong type, or larger than any model's.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InvalidModel(model, "its config.json does not name a model_type")
    if _MODEL_TYPE.fullmatch(model_type) is None:
        raise InvalidModel(model, "its config.json has a model_type that no architecture has")
    for name, value in _fields(config):
        if (problem := _problem(name, value)) is not None:
            raise InvalidModel(model, f"its config.json has {name[:100]!r}, {problem}")


def check_end_tokens(model: str, file: str, settings: dict[str, Any]) -> None:
    """Check what ends an answer; `settings` are those of the file of that name.

    Raises:
        InvalidModel: it is no id, and no list of ids.
    """
    value = settings.get("eos_token_id")
    ids = cast("list[Any]", value) if isinstance(value, list) else [value]
    if value is not None and _not_a_count(ids, 2**31 - 1) is not None:
        raise InvalidModel(model, f"its {file} has an eos_token_id that is no token id")


def check_against_weights(model: str, config: dict[str, Any], shapes: Shapes) -> None:
    """Compare config.json with the tensors that there are.

    Raises:
        InvalidModel: it claims more layers than there are tensors, or rows and columns that no tensor has.
    """
    longest = max((max(shape, default=0) for shape in shapes.values()), default=0)
    for name, value in _fields(config):
        if not isinstance(value, int):
            continue
        if _LAYERS.fullmatch(name) and value > len(shapes):
            raise InvalidModel(
                model, f"its config.json says {name} {value}, and its weights have {len(shapes)} tensors"
            )
        if name in ("hidden_size", "vocab_size") and value > _VALUES_IN_AN_ELEMENT * longest:
            raise InvalidModel(
                model, f"its config.json says {name} {value}, and none of its tensors is as large as that"
            )


def _fields(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a config and of the configs within it; `quantization` has some for each layer."""
    for name, value in config.items():
        yield name, value
        if name.endswith("_config") or _OBJECTS.fullmatch(name):
            yield from _fields(_object(value))
        if name == "quantization":
            for layer in children(value):
                yield from _fields(_object(layer))


def _problem(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if _OBJECTS.fullmatch(name):
        return None if isinstance(value, dict) else "which is not an object"
    if name in _CHOICES:
        return None if value in _CHOICES[name] else f"which is none of {_CHOICES[name]}"
    # Some architectures have a number for each layer.
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    if _NUMBERS.fullmatch(name):
        return None if all(map(_is_number, values)) else "which is not a number"
    most = next((most for pattern, most in _COUNTS if pattern.fullmatch(name)), None)
    return None if most is None else _not_a_count(values, most)


def _not_a_count(values: list[Any], most: int) -> str | None:
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return "which is not an integer"
    return None if all(0 <= value <= most for value in values) else f"which is not between 0 and {most}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _object(value: Any) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}
