"""Which prompts go together, and in what chunks."""

from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_networks import tiny_network

from mlx_sidecar.runtime.engine.chunks import Chunks
from mlx_sidecar.runtime.engine.prefill import Prefill, next_together
from mlx_sidecar.runtime.engine.sequence import Sampling, Sequence

SHAPES = (8, 32, 128)


def of_length(length: int) -> Sequence:
    return Sequence("m", [1] * length, 1, Sampling(), frozenset(), lambda _: None)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=40), st.integers(1, 2000))
def test_prompts_that_go_together_are_the_first_ones_and_of_like_length(
    lengths: list[int], most: int
) -> None:
    line = [of_length(length) for length in lengths]
    waiting = deque(line)
    taken = next_together(waiting, most, alone=())
    assert [*taken, *waiting] == line
    assert len(taken) == 1 or max(one.length for one in taken) * len(taken) <= most
    assert max(one.length for one in taken) <= 2 * min(one.length for one in taken)
    assert len(taken).bit_count() == 1


def test_nobody_goes_with_one_that_must_be_alone() -> None:
    line = [of_length(5) for _ in range(4)]
    assert next_together(deque(line), 1000, alone={line[1]}) == line[:1]


def test_any_number_goes_together_where_no_shape_is_dear() -> None:
    line = deque(of_length(5) for _ in range(7))
    assert len(next_together(line, 1000, alone=(), any_number=True)) == 7
    assert not line


@given(st.integers(1, 64), st.integers(2, 400), st.sampled_from([1, 2, 4]))
def test_chunks_of_given_shapes_go_through_as_many_layers_as_there_is_time_for(
    budget: int, length: int, rows: int
) -> None:
    network: Any = tiny_network("llama")
    prefill = Prefill(network, [of_length(length) for _ in range(rows)], Chunks(128, shapes=SHAPES))
    worth, chunk = list[int](), 0
    while left := prefill.remaining:
        worth.append(prefill.advance(budget))
        chunk += worth[-1]
        assert worth[-1] <= max(budget, -(-SHAPES[-1] * 3 // 2 // len(network.layers)))
        if prefill.remaining != left:
            assert chunk in [shape * rows for shape in SHAPES]
            chunk = 0
    assert chunk == 0
    assert sum(worth) >= rows * (length - 1)


@pytest.mark.parametrize(
    "chunks",
    [Chunks(16), Chunks(128, shapes=SHAPES), Chunks(32, 32), Chunks(32, 32, halved=True)],
    ids=["as there is time", "shapes", "one length", "halves"],
)
@pytest.mark.parametrize("lengths", [(70,), (40, 40), (33, 61, 50, 64)])
def test_caches_hold_each_prompt_and_end_together(lengths: tuple[int, ...], chunks: Chunks) -> None:
    prefill = Prefill(tiny_network("llama"), [of_length(length) for length in lengths], chunks)
    while prefill.remaining:
        prefill.advance(16 * len(lengths))
    rows: Any = prefill.finish()
    assert rows.end == max(lengths) - 1
    assert [rows.end - padding for padding in rows.padding] == [length - 1 for length in lengths]
