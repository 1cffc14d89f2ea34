"""The tiny networks are worth testing with: they differ, they wander, and they remember their prompt."""

import random
from typing import Any

import pytest
from support.reference import alone, greedy_without_a_cache
from support.tiny_networks import ARCHITECTURES, UNBATCHABLE, VOCABULARY, WINDOW, tiny_network

ANSWER = 24
PROMPTS = [
    tuple(random.Random(seed).choices(range(VOCABULARY), k=length)) for seed, length in enumerate((3, 21))
]


def kinds_of_cache(layer: Any) -> set[str]:
    members: Any = getattr(layer, "caches", ())
    return {type(layer).__name__}.union(*(kinds_of_cache(member) for member in members))


def can_merge(layer: Any) -> bool:
    return hasattr(layer, "merge") and all(can_merge(member) for member in getattr(layer, "caches", ()))


def caches(architecture: str) -> list[Any]:
    module = tiny_network(architecture)
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(module)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_agrees_with_a_forward_pass_without_a_cache(architecture: str) -> None:
    for prompt in PROMPTS:
        answer = alone(architecture, prompt)
        assert greedy_without_a_cache(architecture, prompt, answer.tokens(ANSWER)) == answer.tokens(ANSWER)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_answer_wanders(architecture: str) -> None:
    for prompt in PROMPTS:
        assert len(set(alone(architecture, prompt).tokens(ANSWER))) >= ANSWER // 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_answer_depends_on_the_first_token_of_its_prompt(architecture: str) -> None:
    for prompt in PROMPTS:
        other = ((prompt[0] + 1) % VOCABULARY, *prompt[1:])
        assert alone(architecture, other).tokens(ANSWER) != alone(architecture, prompt).tokens(ANSWER)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_can_be_batched_is_told_apart(architecture: str) -> None:
    assert all(map(can_merge, caches(architecture))) == (architecture not in UNBATCHABLE)


def test_every_kind_of_cache_is_there_and_windows_are_short() -> None:
    layers = [layer for architecture in ARCHITECTURES for layer in caches(architecture)]
    assert set[str]().union(*map(kinds_of_cache, layers)) == {
        "KVCache",
        "RotatingKVCache",
        "ArraysCache",
        "CacheList",
        "ChunkedKVCache",
    }
    assert {layer.max_size for layer in layers if hasattr(layer, "max_size")} == {WINDOW}


def test_a_network_is_the_same_in_every_run() -> None:
    module: Any = tiny_network("qwen3_next")
    import mlx.core as mx

    mx.random.seed(1)
    again: Any = tiny_network.__wrapped__("qwen3_next")
    text = mx.array([PROMPTS[1]])
    assert mx.array_equal(module(text), again(text))
