"""`runtime.yaml`: every setting with its default, its unit and its reason, made from the struct."""

from .fields import FIELDS

_HEAD = """\
# Every setting of mlx-sidecar with its default. A file of your own needs only what you change. It is
# ~/.config/mlx-sidecar/runtime.yaml, on macOS ~/Library/Application Support/mlx-sidecar/runtime.yaml, or
# where --config or MLX_SIDECAR_CONFIG says. Variables (MLX_SIDECAR_MAX_WAITING=9) and flags (--max-waiting 9)
# override it. What is live takes effect when the file is saved, the rest when the sidecar starts again.
"""


def text() -> str:
    """Return the file."""
    parts = [_HEAD]
    for field in FIELDS.values():
        when = "live" if field.live else "restart"
        parts.append(f"# {field.description} ({when})\n{field.key}: {field.written}\n")
    return "\n".join(parts)
