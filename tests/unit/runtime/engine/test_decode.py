"""Rows that nobody needs stay where a step likes its shape, and change nothing for the others."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference import alone
from support.tiny_networks import tiny_network

from mlx_sidecar.runtime.engine.chunks import Chunks
from mlx_sidecar.runtime.engine.compiled_step import CompiledStep, PlainStep
from mlx_sidecar.runtime.engine.decode import DecodeBatch
from mlx_sidecar.runtime.engine.prefill import Prefill
from mlx_sidecar.runtime.engine.sequence import Sampling, Sequence


class Choosy(PlainStep):
    """Takes few numbers of rows, as the compiled step does."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.seen: set[int] = set()

    def rows_for(self, sequences: int) -> int:
        return CompiledStep.rows_for(self, sequences)  # pyright: ignore[reportArgumentType]

    def __call__(self, inputs: Any, rows: Any) -> Any:
        self.seen.add(inputs.shape[0])
        return super().__call__(inputs, rows)


def begin(step: PlainStep, prompt: tuple[int, ...], max_tokens: int) -> DecodeBatch:
    network = tiny_network("llama")
    sequence = Sequence("m", list(prompt), max_tokens, Sampling(), frozenset(), lambda _: None)
    prefill = Prefill(network, [sequence], Chunks(64))
    prefill.advance(1000)
    return DecodeBatch(step, [sequence], prefill.finish())


@settings(max_examples=30)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=14), st.data())
def test_sequences_leave_and_come_and_every_answer_is_its_own(
    lengths: list[int], data: st.DataObject
) -> None:
    step = Choosy(tiny_network("llama"))
    prompts = [(7, number, 2 + number) for number in range(len(lengths))]
    waiting = [begin(step, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    sequences = [batch.sequences[0] for batch in waiting]
    live = set(sequences)
    batch = waiting.pop(0)
    while True:
        if waiting and data.draw(st.booleans()):
            batch.join(waiting.pop(0))
        going = batch.settle(live)
        if going:
            batch.arrange()
            batch.dispatch()
        for sequence, token, usable, *_ in batch.read():
            assert usable
            sequence.tokens.append(token)
            if len(sequence.tokens) == sequence.max_tokens:
                live.discard(sequence)
        if not going and not batch.awaits(live):
            if not waiting:
                break
            batch = waiting.pop(0)
    for sequence, prompt, length in zip(sequences, prompts, lengths, strict=True):
        assert sequence.tokens == alone("llama", prompt).tokens(length)
    assert step.seen <= {1, 2, 4, 8, 12, 16}
