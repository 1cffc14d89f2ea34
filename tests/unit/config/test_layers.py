import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sidecar.config.fields import FIELDS
from mlx_sidecar.config.layers import OTHER_VARIABLES, Effective, SettingsSource, default_file
from mlx_sidecar.config.settings import Preload
from mlx_sidecar.config.values import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def read(
    file: Path, text: str, environment: dict[str, str] | None = None, flags: dict[str, str] | None = None
) -> Effective:
    file.write_text(text)
    return SettingsSource.of(environment or {}, flags, file).read()


def problem(file: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(file, text)
    return str(caught.value)


def test_each_layer_overrides_those_before_it(file: Path) -> None:
    text = "# mine\nmax_waiting: 1\nageing_ms: 1\nstall_ms: 1\n"
    environment = {"MLX_SIDECAR_AGEING_MS": "2", "MLX_SIDECAR_STALL_MS": "2"}
    it = read(file, text, environment, {"stall_ms": "3"})
    settings = it.settings
    assert (settings.max_connections, settings.max_waiting, settings.ageing_ms, settings.stall_ms) == (
        256,
        1,
        2,
        3,
    )
    assert it.origins["max_connections"] == "default"
    assert it.origins["max_waiting"] == "mine.yaml:2"
    assert it.origins["ageing_ms"] == "MLX_SIDECAR_AGEING_MS"
    assert it.origins["stall_ms"] == "--stall-ms"
    assert it.in_file == {"max_waiting": 1, "ageing_ms": 1, "stall_ms": 1}


@given(
    st.dictionaries(
        st.sampled_from(sorted(FIELDS)), st.sets(st.sampled_from(["environment", "flag"]), min_size=1)
    )
)
def test_the_last_layer_that_says_something_holds(said: dict[str, set[str]]) -> None:
    values = {"home": '"/h"', "log_level": "debug", "log_format": "json", "models_preload": '[{"model":"m"}]'}
    texts = {key: "true" if FIELDS[key].kind is bool else values.get(key, "7").strip('"') for key in said}
    environment = {FIELDS[key].variable: texts[key] for key in said if "environment" in said[key]}
    flags = {key: texts[key] for key in said if "flag" in said[key]}
    it = SettingsSource.of(environment | {"XDG_CONFIG_HOME": "/none"}, flags).read()
    for key, field in FIELDS.items():
        expected = "default" if key not in said else field.flag if key in flags else field.variable
        assert it.origins[key] == expected


def test_null_takes_back_what_an_earlier_layer_has_set(file: Path) -> None:
    it = read(file, "memory_budget_bytes: 5\nmax_sequences: 5\n", {"MLX_SIDECAR_MAX_SEQUENCES": "null"})
    assert (it.settings.memory_budget_bytes, it.settings.max_sequences) == (5, None)
    assert it.origins["max_sequences"] == "MLX_SIDECAR_MAX_SEQUENCES"


def test_models_to_preload_can_stand_in_every_layer(file: Path) -> None:
    text = "models_preload:\n  - model: a\n    alias: yes\n  - model: b\n    ttl_ms: null\n"
    assert read(file, text).settings.models_preload == [
        Preload(model="a", alias="yes"),
        Preload(model="b", ttl_ms=None),
    ]
    it = read(file, text, flags={"models_preload": '[{"model": "c"}]'})
    assert it.settings.models_preload == [Preload(model="c")]


def test_a_boolean_flag_says_which_of_the_two_it_was(file: Path) -> None:
    it = read(file, "evict_models: true\n", flags={"evict_models": "false"})
    assert (it.settings.evict_models, it.origins["evict_models"]) == (False, "--no-evict-models")


def test_paths_start_at_the_folder_of_the_file_or_at_ours(file: Path) -> None:
    assert read(file, "home: models\n").settings.home == file.parent / "models"
    assert read(file, "", {"MLX_SIDECAR_HOME": "models"}).settings.home == Path.cwd() / "models"
    assert read(file, "", {"XDG_CACHE_HOME": "/c"}).settings.home == Path("/c/mlx-sidecar")
    assert read(file, "home: null\n", {"XDG_CACHE_HOME": "/c"}).settings.home == Path("/c/mlx-sidecar")


def test_what_is_wrong_in_the_file_names_file_line_and_key(file: Path) -> None:
    assert problem(file, "\nmax_waiting: many\n").startswith(
        f'{file}:2: max_waiting: "many" is not a whole number'
    )
    assert problem(file, "max_waitng: 5\n").startswith(
        f"{file}:1: max_waitng: unknown. Did you mean max_waiting?"
    )
    assert problem(file, "<<: {max_waiting: 5}\n").startswith(f"{file}:1: <<: unknown.")
    models = "models_preload:\n  - model: a\n  - model: b\n    dtype: int3\n"
    assert problem(file, models).startswith(f"{file}:4: models_preload[1].dtype: ")


@pytest.mark.parametrize(
    "text", ["off", "1e3", "1_000", "1:30", "0x10", "010", "'5'", "5.0", "-1", "0", "null", "[5]"]
)
def test_what_only_looks_like_a_number_is_refused(file: Path, text: str) -> None:
    assert re.fullmatch(
        rf"{file}:1: max_waiting: .* is not a whole number from 1 to \d+\.",
        problem(file, f"max_waiting: {text}"),
    )


def test_what_is_wrong_elsewhere_names_the_variable_or_the_flag() -> None:
    with pytest.raises(ConfigError, match=r'^MLX_SIDECAR_MAX_WAITING: "x" is not a whole number'):
        SettingsSource.of({"MLX_SIDECAR_MAX_WAITING": "x"}).read()
    with pytest.raises(ConfigError, match=r"^--max-waiting: 0 is not a whole number"):
        SettingsSource.of({}, {"max_waiting": "0"}).read()
    with pytest.raises(ConfigError, match=r"^--models-preload\[0\]: Object missing required field `model`"):
        SettingsSource.of({}, {"models_preload": "[{}]"}).read()


def test_a_variable_that_is_nearly_one_of_ours_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"MAX_WAITNG: unknown\. Did you mean MLX_SIDECAR_MAX_WAITING\?"):
        SettingsSource.of({"MLX_SIDECAR_MAX_WAITNG": "5"}).read()


def test_an_empty_variable_is_not_set() -> None:
    it = SettingsSource.of(
        {"MLX_SIDECAR_MAX_WAITING": "", "MLX_SIDECAR_NO_SUCH": "", "XDG_CONFIG_HOME": "/none"}
    ).read()
    assert it.settings.max_waiting == 1024


def test_every_variable_that_the_project_reads_is_known() -> None:
    sources = [
        *ROOT.glob("native/*.py"),
        *ROOT.glob("runtime/**/*.py"),
        *ROOT.glob("clients/typescript/src/**/*.ts"),
    ]
    named = {name for path in sources for name in re.findall(r"MLX_SIDECAR_[A-Z_]+[A-Z]", path.read_text())}
    assert {"MLX_SIDECAR_BLAS", "MLX_SIDECAR_COMMAND"} <= named
    assert named <= {*OTHER_VARIABLES, *(field.variable for field in FIELDS.values())}
    page = (ROOT / "docs/configuration.md").read_text()
    assert all(name in page for name in OTHER_VARIABLES)


def test_a_file_that_was_asked_for_has_to_be_there(tmp_path: Path) -> None:
    for source in (
        SettingsSource.of({}, file=tmp_path / "none.yaml"),
        SettingsSource.of({"MLX_SIDECAR_CONFIG": str(tmp_path / "none.yaml")}),
    ):
        with pytest.raises(ConfigError, match=r"none\.yaml: there is no such file"):
            source.read()
        assert set(source.read(removable=True).origins.values()) == {"default"}


def test_the_flag_names_the_file_before_the_variable_and_the_users_own(tmp_path: Path) -> None:
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    own = tmp_path / "mlx-sidecar" / "runtime.yaml"
    assert SettingsSource.of(environment).file == own
    named = environment | {"MLX_SIDECAR_CONFIG": "/named.yaml"}
    assert SettingsSource.of(named).file == Path("/named.yaml")
    assert SettingsSource.of(named, file=Path("/flag.yaml")).file == Path("/flag.yaml")
    assert SettingsSource.of(environment).read().origins["max_waiting"] == "default"
    own.parent.mkdir()
    own.write_text("max_waiting: 5\n")
    assert SettingsSource.of(environment).read().origins["max_waiting"] == "runtime.yaml:1"


def test_the_users_own_file_is_where_the_platform_keeps_such_files() -> None:
    assert default_file({}, "linux") == Path.home() / ".config/mlx-sidecar/runtime.yaml"
    assert default_file({"XDG_CONFIG_HOME": "/x"}, "linux") == Path("/x/mlx-sidecar/runtime.yaml")
    assert default_file({}, "darwin") == Path.home() / "Library/Application Support/mlx-sidecar/runtime.yaml"


def test_without_a_home_folder_the_file_is_left_out_and_a_home_is_asked_for() -> None:
    nowhere = "~nobody-of-that-name/x"
    environment = {"XDG_CONFIG_HOME": nowhere, "XDG_CACHE_HOME": nowhere}
    source = SettingsSource.of(environment)
    assert source.file is None
    with pytest.raises(ConfigError, match=r"^home: no home folder is known\. Set MLX_SIDECAR_HOME\."):
        source.read()
    assert SettingsSource.of(environment | {"MLX_SIDECAR_HOME": "/h"}).read().settings.home == Path("/h")
    with pytest.raises(ConfigError, match="no such file"):
        SettingsSource.of({"MLX_SIDECAR_CONFIG": nowhere}).read()


def test_each_reading_gives_settings_of_its_own(file: Path) -> None:
    one, other = read(file, "").settings, read(file, "").settings
    one.max_waiting = 5
    one.models_preload.append(Preload(model="m"))
    assert (other.max_waiting, other.models_preload) == (1024, [])
