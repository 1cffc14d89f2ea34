import re
from pathlib import Path

import yaml

from mlx_sidecar.config import yaml_text
from mlx_sidecar.config.fields import FIELDS
from mlx_sidecar.config.layers import DEFAULT, SettingsSource

ROOT = Path(__file__).parents[3]
FILE = ROOT / "config/runtime.yaml"


def test_the_checked_in_file_is_current() -> None:
    assert FILE.read_text() == yaml_text.text(), "It is stale. Run: make generate"


def test_it_says_what_holds_without_it() -> None:
    with_it = SettingsSource.of({}, file=FILE).read()
    without = SettingsSource.of({"XDG_CONFIG_HOME": "/none"}).read()
    assert with_it.settings == without.settings
    assert DEFAULT not in with_it.origins.values()
    assert set(without.origins.values()) == {DEFAULT}


def test_any_yaml_library_reads_the_same() -> None:
    assert yaml.safe_load(FILE.read_text()) == {key: field.default for key, field in FIELDS.items()}


def test_the_documentation_lists_every_setting_as_it_is() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    rows = [
        f"| `{key}` | `{field.written}` | {'at once' if field.live else 'restart'} | {field.description} |"
        for key, field in FIELDS.items()
    ]
    assert re.findall(r"^\| `[a-z_]+` \| .*$", page, re.M) == rows
