import pytest

from mlx_sidecar.config.fields import FIELDS, Field

ALL = pytest.mark.parametrize("field", FIELDS.values(), ids=list(FIELDS))


@ALL
def test_every_setting_says_what_it_is_in_one_line(field: Field) -> None:
    assert field.description.endswith(".")
    assert "\n" not in field.description
    assert len(f"# {field.description} (restart)") <= 110


@ALL
def test_durations_are_milliseconds_and_sizes_bytes_and_the_description_says_so(field: Field) -> None:
    assert field.key.endswith("_ms") == ("illisecond" in field.description)
    assert field.key.endswith("_bytes") == field.description.startswith("Bytes")


@ALL
def test_null_is_allowed_exactly_where_it_is_explained(field: Field) -> None:
    assert (field.default is None) == (" Null is " in field.description)


def test_what_can_change_while_the_sidecar_runs() -> None:
    fixed = {key for key, field in FIELDS.items() if not field.live}
    assert fixed == {
        "home",
        "max_sequences",
        "prefill_chunk_tokens",
        "prefill_chunk_tokens_cpu",
        "tokenizer_threads",
        "models_preload",
        "wired_limit_bytes",
    }


def test_a_key_has_the_same_name_everywhere() -> None:
    field = FIELDS["max_waiting"]
    assert (field.variable, field.flag) == ("MLX_SIDECAR_MAX_WAITING", "--max-waiting")
    assert FIELDS["evict_models"].negated_flag == "--no-evict-models"
