"""Templates that mean harm end soon, with an error that a client may see."""

import threading

import pytest

from mlx_sidecar.protocol.errors import Unsupported
from mlx_sidecar.protocol.messages import Message
from mlx_sidecar.runtime.text.chat_template import ChatTemplate

MESSAGES = [Message(role="user", content="hello")]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = [
    LOOPS,
    "{% macro m() %}" + LOOPS + "{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for c in 'a' * 30000000 %}{% endfor %}",
    "{% for x in [range(99999)] recursive %}{% for y in x %}{{ loop(x) }}{% endfor %}{% endfor %}",
    "{{ 'a' * 2500000000 }}",
    "{{ [0] * 2500000000 }}",
    "{{ 2 ** 100000000 }}",
    "{{ 'a' | center(2500000000) }}",
    "{{ 'a'.ljust(2500000000) }}",
    "{{ '%2500000000d' % 1 }}",
    "{{ '%*d' % (2500000000, 1) }}",
    "{{ '%2500000000d' | format(1) }}",
    "{{ '{:2500000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 2500000000) }}",
    "{{ ('a' * 30000000) | replace('a', 'b' * 30000000) }}",
    "{{ ('a' * 30000000).replace('a', 'b' * 30000000) }}",
    "{{ [1] | batch(2500000000, 0) | list }}",
    "{{ [1] | slice(2500000000) | list }}",
    "{{ messages | tojson(indent=2500000000) }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x %}{{ n.x*2 }}{% endset %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% endfor %}",
]


@pytest.mark.parametrize("source", HOSTILE)
@pytest.mark.timeout(30, func_only=True)
def test_a_template_that_wants_too_much_is_ended(source: str) -> None:
    with pytest.raises(Unsupported, match="chat template cannot render"):
        ChatTemplate(source, {}).render(MESSAGES)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{% for m in messages %}{{ loop.index ~ m.role ~ loop.last ~ loop.length }}{% endfor %}",
            "1userTrue1",
        ),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x ~ '-' ~ x }}", "a1-a1"),
        ("{% set x | upper %}a{% endset %}{{ x }}", "A"),
        ("{{ 'a' * 3 + 'b' }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ '%s-%02d' % ('x', 5) }}", "aaab31024x-05"),
        ("{{ messages[0].content.replace('l', 'L') | trim | length }}", "5"),
        ("{% for k, v in {'a': 1}.items() if v %}{{ k ~ v }}{% else %}none{% endfor %}", "a1"),
        ("{% for x in [] %}{% else %}none{% endfor %}", "none"),
        ("{% for x in [[1, [2]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "12"),
        ("{{ messages | map(attribute='role') | join(', ') }}{{ 'ab'[::-1] }}", "userba"),
        ("{{ {'a': [1]} | tojson(indent=2) | indent(2) }}", '{\n    "a": [\n      1\n    ]\n  }'),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(m(1)) }}", "[[1]]"),
        ("{{ '{}-{:>3}'.format(1, 2) }}", "1-  2"),
    ],
)
def test_an_ordinary_template_says_what_jinja_makes_of_it(source: str, text: str) -> None:
    assert ChatTemplate(source, {}).render(MESSAGES) == text


def test_each_rendering_counts_anew_and_each_thread_for_itself() -> None:
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}{{ messages[0].content }}", {})
    texts: list[str] = []

    def render() -> None:
        texts.extend(template.render(MESSAGES) for _ in range(8))

    threads = [threading.Thread(target=render) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["hello"] * 16
