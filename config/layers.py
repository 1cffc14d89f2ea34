"""The layers of settings and their order: defaults < file < environment < flags."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from .fields import FIELDS, PREFIX, Field
from .settings import Settings, default_home
from .values import BadValueError, ConfigError, check, parse, unknown
from .watch import Look, look, text_of

FILE_NAME = "runtime.yaml"
FILE_VARIABLE = f"{PREFIX}CONFIG"
OTHER_VARIABLES = (FILE_VARIABLE, f"{PREFIX}BLAS", f"{PREFIX}PULSE", f"{PREFIX}COMMAND")
"""Variables that are no settings. Any other that begins like ours is a mistake."""

DEFAULT = "default"


class Effective(Struct, frozen=True):
    """What holds, and where each value came from: `default`, `runtime.yaml:12`, a variable or a flag.

    `in_file` has the values that the file sets, also those that a later layer overrides; `seen` is the state
    that the file was in.
    """

    source: "SettingsSource"
    settings: Settings
    origins: dict[str, str]
    in_file: dict[str, Any]
    seen: Look


class SettingsSource(Struct, frozen=True):
    """Where settings are read from, as often as one likes.

    `flags` are texts by key. `file` is None where no folder for it is known; where it is `required` and not
    there, reading fails, else that is as good as an empty one.
    """

    file: Path | None
    required: bool
    environment: Mapping[str, str]
    flags: Mapping[str, str]

    @classmethod
    def of(
        cls, environment: Mapping[str, str], flags: Mapping[str, str] | None = None, file: Path | None = None
    ) -> "SettingsSource":
        """Return the source for a process: its file is `file`, else MLX_SIDECAR_CONFIG, else the user's."""
        text = environment.get(FILE_VARIABLE)
        named = file or (_expanded(text) or Path(text) if text else None)
        path = named.absolute() if named else default_file(environment)
        return cls(path, named is not None, dict(environment), dict(flags or {}))

    def read(self, *, removable: bool = False) -> Effective:
        """Return what holds now. A file that is `removable` may be missing even if it was asked for.

        Raises:
            ConfigError: a key is unknown, a value is not allowed, or the file cannot be read.
        """
        # Before it is read: what is written meanwhile is seen as a change.
        seen = look(self.file) if self.file else None
        layers = (
            self._from_file(required=self.required and not removable),
            self._from_environment(),
            self._from_flags(),
        )
        values: dict[str, Any] = {}
        origins = dict.fromkeys(FIELDS, DEFAULT)
        for layer in layers:
            for key, (value, origin) in layer.items():
                values[key], origins[key] = value, origin
        if values.get("home") is None:
            values["home"] = self._home()
        in_file = {key: value for key, (value, _) in layers[0].items()}
        return Effective(self, Settings(**values), origins, in_file, seen)

    def _from_file(self, *, required: bool) -> "Layer":
        text = text_of(self.file) if self.file else None
        if self.file is None or text is None:
            if required:
                raise ConfigError(f"{self.file}: there is no such file.")
            return {}
        # Here, because without a file nobody needs to wait for a YAML library.
        from .plain_yaml import entries

        layer: Layer = {}
        for key, entry in entries(text, self.file).items():
            place = f"{self.file}:{entry.line}: {key}"
            field = FIELDS.get(key)
            if field is None:
                raise ConfigError(f"{place}: {unknown(key, list(FIELDS))}{_SEE_ALL}")
            try:
                value = check(field, entry.value, self.file.parent)
            except BadValueError as error:
                place = f"{self.file}:{entry.line_of(error.path)}: {key}{error.path}"
                raise ConfigError(f"{place}: {error}.") from None
            layer[key] = value, f"{self.file.name}:{entry.line}"
        return layer

    def _from_environment(self) -> "Layer":
        known = {field.variable: field for field in FIELDS.values()}
        layer: Layer = {}
        for name, text in self.environment.items():
            # An empty variable is how a shell says that it is not set.
            if not name.startswith(PREFIX) or name in OTHER_VARIABLES or not text:
                continue
            if name not in known:
                raise ConfigError(f"{name}: {unknown(name, [*known, *OTHER_VARIABLES])}{_SEE_ALL}")
            layer[known[name].key] = _value(known[name], text, name), name
        return layer

    def _from_flags(self) -> "Layer":
        layer: Layer = {}
        for key, text in self.flags.items():
            field = FIELDS[key]
            name = field.negated_flag if field.kind is bool and text == "false" else field.flag
            layer[key] = _value(field, text, name), name
        return layer

    def _home(self) -> Path:
        try:
            return default_home(self.environment)
        except RuntimeError:
            raise ConfigError("home: no home folder is known. Set MLX_SIDECAR_HOME.") from None


Layer = dict[str, tuple[Any, str]]
"""Values and their origins by key."""

_SEE_ALL = " `mlx-sidecar config --default` lists all."


def default_file(environment: Mapping[str, str], platform: str = sys.platform) -> Path | None:
    """Return where a user's settings file is looked for; None if no home folder is known."""
    folder = "~/Library/Application Support"
    if platform != "darwin":
        folder = environment.get("XDG_CONFIG_HOME") or "~/.config"
    path = _expanded(folder)
    return path / "mlx-sidecar" / FILE_NAME if path else None


def _expanded(text: str) -> Path | None:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return None


def _value(field: Field, text: str, name: str) -> Any:
    try:
        return check(field, parse(field, text), Path())
    except BadValueError as error:
        raise ConfigError(f"{name}{error.path}: {error}.") from None
