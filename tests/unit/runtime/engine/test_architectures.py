"""Every architecture: alone, three together, one leaves, another joins; and none of it changes a token."""

import random
from typing import Any

import pytest
from support.batches import Outcome, Row, make_batch, play
from support.reference import alone
from support.tiny_networks import ARCHITECTURES, MIXES_ROWS_UP, UNBATCHABLE, VOCABULARY, tiny_network

CHUNK = 8
TEXT = tuple(random.Random(5).choices(range(VOCABULARY), k=40))


class Counted:
    """A network that counts its forward passes."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.passes = 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.passes += 1
        return self._module(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def whole(architecture: str, row: Row) -> Outcome:
    return Outcome(alone(architecture, row.prompt).tokens(row.max_tokens), ["length"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sequences_come_together_leave_and_join_again(architecture: str) -> None:
    batch = make_batch(tiny_network(architecture), CHUNK)
    first = Row(TEXT[:13], 10)
    assert play(batch, [first]) == [whole(architecture, first)]

    three = [Row(TEXT[:13], 24), Row(TEXT[:37], 12, joins=1), Row(TEXT[5:9], 24, joins=3, leaves_after=10)]
    back = [Row(TEXT[:13], 9, joins=16), Row(TEXT[5:9], 16, joins=20)]
    *stay, cancelled, again, last = play(batch, [*three, *back])
    assert stay == [whole(architecture, row) for row in three[:2]]
    assert [again, last] == [whole(architecture, row) for row in back]
    assert cancelled.ends == ["cancelled"]
    assert 0 < len(cancelled.tokens) < 24
    assert cancelled.tokens == last.tokens[: len(cancelled.tokens)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_after_a_reset_nothing_of_what_ran_is_left(architecture: str) -> None:
    batch = make_batch(tiny_network(architecture), CHUNK)
    lost = [Row(TEXT[:5], 30).sequence(), Row(TEXT[:30], 30).sequence()]
    for sequence in lost:
        batch.add(sequence)
    for _ in range(4):
        batch.step()
    assert set(batch.reset()) == set(lost)
    assert len(batch) == 0
    rows = [Row(TEXT[:7], 10), Row(TEXT[:30], 10)]
    assert play(batch, rows) == [whole(architecture, row) for row in rows]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_that_come_at_once_share_forward_passes_where_the_architecture_can(architecture: str) -> None:
    network = Counted(tiny_network(architecture))
    rows = [Row(TEXT[start : start + 6 + start], 16) for start in range(4)]
    batch = make_batch(network, 64)
    for _ in range(2):
        network.passes = 0
        assert play(batch, rows) == [whole(architecture, row) for row in rows]
    # Only the second time, because the first may have been used to find out what the architecture can.
    shared = network.passes < 2 * 16
    assert shared == (architecture not in (*UNBATCHABLE, *MIXES_ROWS_UP))
