import json
import threading
from itertools import permutations
from typing import Any

from mlx_sidecar.protocol import jsonrpc
from mlx_sidecar.protocol.framing import MAX_OUTBOUND_FRAME_BYTES
from mlx_sidecar.protocol.jsonrpc import MAX_BATCH_MEMBERS
from mlx_sidecar.runtime.server.batch_reply import BatchReply


def answer(request_id: int | str, result: object = None) -> tuple[int | str, bytes]:
    return request_id, jsonrpc.encode_outcome(request_id, result)


def test_the_reply_is_sent_once_when_the_last_member_has_been_answered() -> None:
    for order in permutations(range(3)):
        sent: list[bytes] = []
        reply = BatchReply(3, sent.append)
        for n in order:
            assert sent == []
            reply.put(*answer(n, f"result {n}"))
        (frame,) = sent
        assert {found["id"]: found["result"] for found in json.loads(frame)} == {
            n: f"result {n}" for n in range(3)
        }


def test_nothing_expected_is_nothing_sent() -> None:
    sent: list[bytes] = []
    BatchReply(0, sent.append)
    assert sent == []


def test_answers_from_many_threads_make_one_reply() -> None:
    sent: list[bytes] = []
    reply = BatchReply(MAX_BATCH_MEMBERS, sent.append)
    together = threading.Barrier(8)

    def put(first: int) -> None:
        together.wait()
        for n in range(first, first + 8):
            reply.put(*answer(n))

    threads = [threading.Thread(target=put, args=(8 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (frame,) = sent
    assert {found["id"] for found in json.loads(frame)} == set(range(MAX_BATCH_MEMBERS))


def test_members_that_would_make_the_frame_too_long_are_refused_and_the_others_are_not() -> None:
    sent: list[bytes] = []
    reply = BatchReply(MAX_BATCH_MEMBERS, sent.append)
    for n in range(MAX_BATCH_MEMBERS):
        reply.put(*answer(n, "x" * (1 << 20)))
    (frame,) = sent
    assert len(frame) <= MAX_OUTBOUND_FRAME_BYTES
    replies: list[Any] = json.loads(frame)
    kinds = [found["error"]["data"]["kind"] for found in replies if "error" in found]
    assert len(replies) == MAX_BATCH_MEMBERS
    assert len(replies) - len(kinds) > 8
    assert set(kinds) == {"response_too_large"}


def test_a_small_answer_behind_a_large_one_is_given() -> None:
    sent: list[bytes] = []
    reply = BatchReply(2, sent.append)
    reply.put(*answer(1, "x" * (MAX_OUTBOUND_FRAME_BYTES - 1000)))
    reply.put(*answer(2, "small"))
    first, second = json.loads(sent[0])
    assert first["error"]["data"]["kind"] == "response_too_large"
    assert second["result"] == "small"
