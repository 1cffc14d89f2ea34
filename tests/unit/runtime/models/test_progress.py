from mlx_sidecar.protocol.messages import LoadProgress
from mlx_sidecar.runtime.models.progress import LoadWatch


def test_who_listens_is_told_at_once_how_it_stands_and_then_each_phase() -> None:
    watch, told = LoadWatch(), list[LoadProgress]()
    watch.listen(told.append)
    watch.enter("checking")
    watch.enter("weights")
    watch.note(10, 10, 2, 2)
    assert [(part.seq, part.phase, part.done_bytes) for part in told] == [
        (1, "queued", 0),
        (2, "checking", 0),
        (3, "weights", 0),
        (4, "weights", 10),
    ]
    assert told[-1].remaining_ms == 0


def test_each_listener_has_a_count_of_its_own_and_hears_nothing_after_leaving() -> None:
    watch, early, late = LoadWatch(), list[LoadProgress](), list[LoadProgress]()
    number = watch.listen(early.append)
    watch.enter("checking")
    watch.listen(late.append)
    watch.leave(number)
    watch.enter("warmup")
    assert [(part.seq, part.phase) for part in late] == [(1, "checking"), (2, "warmup")]
    assert early[-1].phase == "checking"


def test_pieces_that_come_fast_are_told_of_together_but_the_last_always() -> None:
    watch, told = LoadWatch(), list[LoadProgress]()
    watch.listen(told.append)
    watch.enter("weights")
    for done in range(1, 1001):
        watch.note(done, 1000, done, 1000)
    assert told[-1].done_bytes == 1000
    assert len(told) < 500
