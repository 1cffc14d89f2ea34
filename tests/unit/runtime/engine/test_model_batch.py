"""Whatever fails in a step fails for as few as possible; the others get the tokens that are theirs."""

from collections.abc import Callable
from typing import Any

import pytest
from support.reference import alone
from support.tiny_networks import tiny_network

from mlx_sidecar.protocol.errors import GenerationFailed, InternalError
from mlx_sidecar.runtime.engine import model_batch
from mlx_sidecar.runtime.engine.device import DeviceLost
from mlx_sidecar.runtime.engine.model_batch import ModelBatch
from mlx_sidecar.runtime.engine.sequence import Emission, Sampling, Sequence

POISON = 255
"""A token that the faulty networks below cannot stand; no prompt or answer here has it otherwise."""

PROMPTS = ((3, 1, 4, 1, 5), (9, 2, 6, 5, 3, 5, 8), (2, 7, 1))


class Faulty:
    """A network that does `fault` to a step as soon as some row's input has the poison in it."""

    def __init__(self, fault: Callable[[Any, Any], Any], also: Callable[[Any], bool] | None = None) -> None:
        self._network: Any = tiny_network("llama")
        self._fault = fault
        self._also = also
        self.layers: Any = self._network.layers

    def parameters(self) -> Any:
        return self._network.parameters()

    def make_cache(self) -> Any:
        return self._network.make_cache()

    def __call__(self, inputs: Any, cache: Any) -> Any:
        logits = self._network(inputs, cache=cache)
        poisoned = (inputs == POISON).any(axis=-1)
        if poisoned.any().item() or (self._also is not None and self._also(inputs)):
            return self._fault(logits, poisoned)
        return logits


def not_a_number(logits: Any, poisoned: Any) -> Any:
    import mlx.core as mx

    return mx.where(poisoned[:, None, None], mx.nan, logits)


def raises(error: Exception) -> Callable[[Any, Any], Any]:
    def fault(_: Any, __: Any) -> Any:
        raise error

    return fault


def sequence(prompt: tuple[int, ...], max_tokens: int = 12) -> Sequence:
    return Sequence("m", list(prompt), max_tokens, Sampling(), frozenset(), lambda _: None)


def run(batch: ModelBatch) -> list[Emission]:
    emissions: list[Emission] = []
    for _ in range(500):
        if not len(batch):
            return emissions
        emissions += batch.step()
    raise AssertionError("the batch does not end")


def answers(prompt: tuple[int, ...], count: int) -> list[int]:
    return alone("llama", prompt).tokens(count)


def poisoned_among_others(batch: ModelBatch) -> tuple[Sequence, list[Sequence]]:
    """Let three sequences decode, then a fourth come whose last prompt token is the poison."""
    sound = [sequence(prompt) for prompt in PROMPTS]
    for each in sound:
        batch.add(each)
    for _ in range(4):
        batch.step()
    sick = sequence((8, 8, POISON))
    batch.add(sick)
    run(batch)
    return sick, sound


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        (not_a_number, GenerationFailed),
        (raises(ValueError("a constraint that cannot be met")), InternalError),
        (raises(RuntimeError("[malloc] Unable to allocate 4 bytes.")), GenerationFailed),
        (raises(MemoryError()), GenerationFailed),
    ],
)
def test_a_row_that_fails_ends_alone_and_its_neighbours_never_notice(
    fault: Callable[[Any, Any], Any], failure: type[Exception]
) -> None:
    sick, sound = poisoned_among_others(ModelBatch(Faulty(fault), prefill_chunk_tokens=4))
    assert isinstance(sick.failure, failure)
    assert sick.tokens == []
    assert [each.tokens for each in sound] == [answers(prompt, 12) for prompt in PROMPTS]
    assert [each.failure for each in sound] == [None, None, None]


def test_a_step_that_raises_once_costs_nobody_a_token() -> None:
    hiccups = iter([False] * 25 + [True])
    fault = raises(RuntimeError("once"))
    network = Faulty(fault, also=lambda _: next(hiccups, False))
    batch = ModelBatch(network, prefill_chunk_tokens=4)
    sequences = [sequence(prompt, 30) for prompt in PROMPTS]
    for each in sequences:
        batch.add(each)
    emissions = run(batch)
    assert next(hiccups, None) is None
    for each, prompt in zip(sequences, PROMPTS, strict=True):
        assert each.tokens == answers(prompt, 30)
        assert [e.token for e in emissions if e.sequence is each] == each.tokens


def test_a_network_that_always_raises_ends_every_sequence_with_an_error() -> None:
    batch = ModelBatch(tiny_network("llama"), prefill_chunk_tokens=4)
    batch.model = Faulty(raises(RuntimeError("always")), also=lambda _: True)
    sequences = [sequence(prompt) for prompt in PROMPTS]
    for each in sequences:
        batch.add(each)
    assert [emission.finish for emission in run(batch)] == ["failed"] * 3
    assert all(isinstance(each.failure, InternalError) for each in sequences)


def test_a_device_that_computes_nothing_any_more_is_no_fault_of_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_batch, "device_works", lambda: False)
    batch = ModelBatch(Faulty(raises(RuntimeError("gone"))), prefill_chunk_tokens=4)
    batch.add(sequence((1, POISON)))
    with pytest.raises(DeviceLost):
        run(batch)
    assert len(batch) == 1


def test_a_cancelled_sequence_says_nothing_more_and_gives_its_memory_back() -> None:
    import mlx.core as mx

    batch = ModelBatch(tiny_network("llama"), prefill_chunk_tokens=64)
    gone, stays = sequence(PROMPTS[0] * 40, 100), sequence(PROMPTS[1], 100)
    batch.add(gone)
    batch.add(stays)
    for _ in range(5):
        batch.step()
    mx.synchronize()
    with_both = mx.get_active_memory()
    assert batch.remove(gone)
    assert not batch.remove(gone)
    assert all(emission.sequence is stays for emission in batch.step())
    batch.step()
    mx.synchronize()
    assert mx.get_active_memory() < with_both
    batch.reset()
    assert len(batch) == 0


def test_a_long_row_does_not_tax_short_ones() -> None:
    batch = ModelBatch(tiny_network("llama"), prefill_chunk_tokens=4096)
    for each in (sequence((1, 2, 3), 50), sequence((4, 5, 6), 50), sequence((7,) * 3000, 50)):
        batch.add(each)
    while batch.report().running < 3:
        batch.step()
    batch.step()
    assert batch.report().groups == 2


def test_a_short_prompt_is_not_held_up_by_a_long_one_before_it() -> None:
    batch = ModelBatch(tiny_network("llama"), prefill_chunk_tokens=64)
    long, short = sequence((1, 2, 3, 4) * 500, 1), sequence((5, 6), 1)
    batch.add(long)
    batch.step()
    batch.add(short)
    order = [emission.sequence for emission in run(batch)]
    assert order == [short, long]


def test_a_first_token_does_not_wait_for_the_next_prompt_on_a_cpu() -> None:
    import mlx.core as mx

    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("elsewhere a chunk is computed while the host goes on")
    batch = ModelBatch(tiny_network("llama"), prefill_chunk_tokens=64)
    short, long = sequence((5, 6)), sequence((1, 2, 3, 4) * 500)
    batch.add(short)
    batch.add(long)
    assert [emission.sequence for emission in batch.step()] == [short]


def test_of_two_long_prompts_the_first_one_is_read_first() -> None:
    batch = ModelBatch(tiny_network("llama"), prefill_chunk_tokens=64)
    first, second = sequence((1, 2, 3, 4) * 250, 1), sequence((4, 3, 2, 1) * 250, 1)
    batch.add(first)
    batch.add(second)
    waits = list[int]()
    for each in (first, second):
        waits.append(0)
        while all(emission.sequence is not each for emission in batch.step()):
            waits[-1] += 1
    assert waits[1] > waits[0] // 2
