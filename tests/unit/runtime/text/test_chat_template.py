import pytest

from mlx_sidecar.protocol.errors import InvalidParams, Unsupported
from mlx_sidecar.protocol.messages import Message
from mlx_sidecar.runtime.text.chat_template import ChatTemplate

MESSAGES = [Message(role="user", content="hi"), Message(role="assistant", content="ho")]


def render(source: str) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES)


def test_messages_special_tokens_and_the_open_turn_are_there() -> None:
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    assert render(source + "{{ add_generation_prompt }}") == "<s>[user:hi][assistant:ho]True"


def test_blocks_leave_no_blank_lines() -> None:
    assert render("{% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"


def test_json_is_written_as_models_expect_it() -> None:
    assert render("{{ {'a': 'é<'} | tojson }}") == '{"a": "é<"}'


def test_loops_can_be_left() -> None:
    assert render("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}") == "user"


def test_what_a_template_refuses_is_a_wrong_parameter_with_its_words() -> None:
    with pytest.raises(InvalidParams, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.path == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ undefined.attribute }}",
        "{{ 1 / 0 }}",
        "{{ messages[9].content }}",
        "{% include 'other' %}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_unsupported(source: str) -> None:
    with pytest.raises(Unsupported):
        render(source)


def test_a_template_that_does_not_compile_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="chat template"):
        ChatTemplate("{% for %}", {})
