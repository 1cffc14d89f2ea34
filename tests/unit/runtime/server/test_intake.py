import json
from itertools import pairwise
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.channels import NarrowChannel

from mlx_sidecar.protocol.framing import FrameReader, Framing
from mlx_sidecar.protocol.jsonrpc import MAX_BATCH_MEMBERS
from mlx_sidecar.protocol.messages import GenerateProgress
from mlx_sidecar.runtime.api.presence import PresenceApi
from mlx_sidecar.runtime.server.intake import Incoming, Intake
from mlx_sidecar.runtime.server.outbox import Outbox
from mlx_sidecar.runtime.server.stream import Stream
from mlx_sidecar.runtime.telemetry.vitals import Vitals

MAX_FRAME_BYTES = 2000
INITIALIZE = {"id": "init", "method": "initialize", "params": {"protocolVersion": 1}}
GENERATE = {"model": "m", "prompt": "p"}


class Desk(NamedTuple):
    """An intake, and what it has answered."""

    intake: Intake
    outbox: Outbox
    channel: NarrowChannel

    def say(self, *messages: Any) -> list[Incoming]:
        """Send messages, each on a line, and return what is left for the event loop."""
        return self.intake.feed(b"".join(line(message) for message in messages))

    def answers(self) -> list[Any]:
        """Return id and outcome of every response so far, a batch as a list."""
        return [
            [outcome(member) for member in cast(list[Any], found)]
            if isinstance(found, list)
            else outcome(found)
            for found in self.channel.messages()
        ]


def desk(*, initialized: bool = True) -> Desk:
    channel = NarrowChannel()
    channel.open()
    outbox = Outbox(channel, Framing.NDJSON.wrap)
    reader = FrameReader(Framing.NDJSON, MAX_FRAME_BYTES)
    intake = Intake(reader, outbox, PresenceApi(Vitals()).methods())
    intake.initialized = initialized
    return Desk(intake, outbox, channel)


def line(message: Any) -> bytes:
    if isinstance(message, bytes):
        return message + b"\n"
    return json.dumps(versioned(message)).encode() + b"\n"


def versioned(message: Any) -> Any:
    if isinstance(message, list):
        return [versioned(member) for member in cast(list[Any], message)]
    return {"jsonrpc": "2.0"} | cast(Any, message) if isinstance(message, dict) else message


def outcome(response: Any) -> tuple[Any, str]:
    return response["id"], response["error"]["data"]["kind"] if "error" in response else "result"


def asked(incoming: list[Incoming]) -> list[tuple[Any, str]]:
    return [(item.id, item.method) for item in incoming]


# One by one


def test_what_waits_for_nothing_is_answered_here_and_the_rest_is_handed_on_in_order() -> None:
    it = desk()
    incoming = it.say(
        {"id": 1, "method": "models"},
        {"id": 2, "method": "ping"},
        {"id": "a", "method": "generate", "params": GENERATE},
        {"method": "$/cancelRequest", "params": {"id": "a"}},
        {"method": "exit"},
    )
    assert asked(incoming) == [
        (1, "models"),
        ("a", "generate"),
        (None, "$/cancelRequest"),
        (None, "exit"),
    ]
    assert it.answers() == [(2, "result")]


def test_before_initialize_only_the_exempt_methods_are_let_in() -> None:
    it = desk(initialized=False)
    exempt = ("ping", "server/info", "rpc.discover")
    assert it.say(*({"id": name, "method": name} for name in exempt)) == []
    assert it.say({"id": 1, "method": "models"}, {"id": 2, "method": "generate", "params": {}}) == []
    assert asked(it.say(INITIALIZE, {"id": 3, "method": "models"})) == [(None, "initialize"), (3, "models")]
    assert it.answers() == [
        *((name, "result") for name in exempt),
        (1, "not_initialized"),
        (2, "not_initialized"),
        ("init", "result"),
    ]


def test_shutdown_may_come_before_initialize() -> None:
    it = desk(initialized=False)
    assert asked(it.say({"id": 1, "method": "shutdown"})) == [(1, "shutdown")]
    assert it.intake.shut_down


def test_initialize_is_accepted_once_and_an_unknown_version_not_at_all() -> None:
    it = desk(initialized=False)
    wrong = INITIALIZE | {"id": 0, "params": {"protocolVersion": 2}}
    assert it.say(wrong, {"id": 1, "method": "models"}) == []
    assert len(it.say(INITIALIZE, INITIALIZE)) == 1
    assert it.answers() == [
        (0, "invalid_params"),
        (1, "not_initialized"),
        ("init", "result"),
        ("init", "invalid_request"),
    ]


def test_after_shutdown_every_request_is_refused_even_in_the_same_write() -> None:
    it = desk()
    incoming = it.say(
        {"id": 1, "method": "shutdown"},
        {"id": 2, "method": "ping"},
        {"id": 3, "method": "models"},
        {"id": 4, "method": "shutdown"},
        INITIALIZE,
        {"id": 5, "method": "no/such/method"},
        [{"id": 6, "method": "models"}],
        {"method": "exit"},
    )
    assert asked(incoming) == [(1, "shutdown"), (None, "exit")]
    assert it.answers() == [
        *((request_id, "shutting_down") for request_id in (2, 3, 4, "init", 5)),
        [(6, "shutting_down")],
    ]


def test_a_shutdown_that_is_refused_shuts_nothing_down() -> None:
    it = desk()
    assert (
        it.say({"id": 1, "method": "shutdown", "params": {"no": 1}}, [{"id": 2, "method": "shutdown"}]) == []
    )
    assert not it.intake.shut_down
    assert asked(it.say({"id": 3, "method": "models"})) == [(3, "models")]


def test_an_id_in_flight_is_refused_until_it_is_answered() -> None:
    it = desk()
    again = {"id": 1, "method": "models"}
    assert len(it.say(again, again, {"id": 1, "method": "ping"})) == 1
    it.intake.in_flight.discard(1)
    assert len(it.say(again)) == 1
    assert it.answers() == [(1, "duplicate_id"), (1, "duplicate_id")]


def test_the_number_1_and_the_string_1_are_two_ids() -> None:
    it = desk()
    assert asked(it.say({"id": 1, "method": "models"}, {"id": "1", "method": "models"})) == [
        (1, "models"),
        ("1", "models"),
    ]


def test_notifications_are_never_answered_whatever_they_say() -> None:
    it = desk(initialized=False)
    assert (
        it.say(
            {"method": "ping"},
            {"method": "generate", "params": GENERATE},
            {"method": "no/such/method"},
            {"method": "$/cancelRequest", "params": {"wrong": 1}},
            {"method": "$/streamAck", "params": {"token": "t", "seq": -1}},
        )
        == []
    )
    assert it.answers() == []


def test_garbage_costs_one_answer_and_nothing_else() -> None:
    it = desk()
    incoming = it.say(b"hello", b"\xff", b"", b" \t ", b"1", b"x" * 5000, {"id": 1, "method": "models"})
    assert asked(incoming) == [(1, "models")]
    kinds = ["parse_error", "parse_error", "invalid_request", "invalid_request"]
    assert it.answers() == [(None, kind) for kind in kinds]


def test_a_handler_that_breaks_is_an_internal_error_and_the_next_request_works() -> None:
    it = desk()

    def break_down(_: Any, __: Intake) -> None:
        raise RuntimeError("/secret/path")

    it.intake._immediate["ping"] = break_down  # pyright: ignore[reportPrivateUsage]
    it.say({"id": 1, "method": "ping"}, {"id": 2, "method": "server/info"})
    assert it.answers() == [(1, "internal_error"), (2, "result")]
    assert b"secret" not in it.channel.written


def test_the_last_frame_may_lack_its_newline() -> None:
    it = desk()
    assert it.intake.feed(b'{"jsonrpc":"2.0","id":1,"method":"models"}') == []
    assert asked(it.intake.end()) == [(1, "models")]


def test_headers_that_cannot_be_followed_are_answered_once_and_what_comes_after_is_not_looked_at() -> None:
    channel = NarrowChannel()
    channel.open()
    reader = FrameReader()
    outbox = Outbox(channel, Framing.LSP.wrap)
    intake = Intake(reader, outbox, PresenceApi(Vitals()).methods())
    ping = Framing.LSP.wrap(b'{"jsonrpc":"2.0","id":1,"method":"ping"}')
    intake.feed(ping + b"Content-Length: many\r\n\r\n" + ping)
    assert intake.lost
    intake.feed(ping)
    intake.end()
    assert channel.written.count(b"Content-Length: ") == 2
    assert channel.written.count(b'"result"') == 1


def test_flow_control_begins_with_initialize_and_acks_go_straight_to_the_stream() -> None:
    it = desk(initialized=False)
    params = {"protocolVersion": 1, "flowControl": {"windowBytes": 1}}
    it.say(INITIALIZE | {"params": params})
    stream = Stream("t", lambda: None)
    for seq in (1, 2):
        it.outbox.put([(stream, GenerateProgress(seq=seq, text="x", tokens=[]))])
    assert it.channel.written.count(b"$/progress") == 1
    assert it.say({"method": "$/streamAck", "params": {"token": "t", "seq": 1}}) == []
    assert it.channel.written.count(b"$/progress") == 2


# Batches


def test_a_batch_is_answered_by_one_array_when_its_last_member_has_been() -> None:
    it = desk()
    incoming = it.say(
        [
            {"id": 1, "method": "models"},
            {"id": 2, "method": "ping"},
            {"method": "$/cancelRequest", "params": {"id": 9}},
            {"id": 3, "method": "no/such/method"},
            1,
            {"id": 4, "method": 5},
        ]
    )
    assert asked(incoming) == [(1, "models"), (None, "$/cancelRequest")]
    assert it.answers() == []
    batch = incoming[0].batch
    assert batch is not None
    batch.put(1, b'{"jsonrpc":"2.0","id":1,"result":null}')
    (reply,) = it.answers()
    assert sorted(reply, key=str) == sorted(
        [
            (1, "result"),
            (2, "result"),
            (3, "method_not_found"),
            (None, "invalid_request"),
            (4, "invalid_request"),
        ],
        key=str,
    )


def test_a_batch_of_notifications_is_not_answered() -> None:
    it = desk()
    assert asked(it.say([{"method": "exit"}, {"method": "no/such/method"}])) == [(None, "exit")]
    assert it.answers() == []


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (b"[]", "invalid_request"),
        (b" [ ] ", "invalid_request"),
        (json.dumps([1] * (MAX_BATCH_MEMBERS + 1)).encode(), "invalid_request"),
        (b"[", "parse_error"),
        (b'[{"jsonrpc":"2.0","id":1,"method":"ping"},]', "parse_error"),
        (b'[{"jsonrpc":"2.0","id":1,"method":"ping"}', "parse_error"),
        (b'["\xff"]', "parse_error"),
        (b"[" * 1999, "parse_error"),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_a_batch_that_is_none_is_answered_by_one_error(frame: bytes, kind: str) -> None:
    it = desk()
    assert it.intake.feed(frame + b"\n") == []
    assert it.answers() == [(None, kind)]


def test_the_largest_batch_is_taken() -> None:
    it = desk()
    frame = b",".join([b'{"jsonrpc":"2.0","id":1}'] * MAX_BATCH_MEMBERS)
    it.intake.feed(b"[%b]\n" % frame)
    assert it.answers() == [[(1, "invalid_request")] * MAX_BATCH_MEMBERS]


def test_what_cannot_be_in_a_batch_is_refused_by_itself() -> None:
    it = desk(initialized=False)
    it.say([INITIALIZE])
    it.intake.initialized = True
    streamed = GENERATE | {"partialResultToken": "t"}
    incoming = it.say(
        [
            {"id": 1, "method": "shutdown"},
            {"id": 2, "method": "generate", "params": streamed},
            {"id": 3, "method": "generate", "params": GENERATE},
        ]
    )
    assert asked(incoming) == [(3, "generate")]
    assert not it.intake.shut_down
    assert incoming[0].batch is not None
    incoming[0].batch.put(3, b'{"jsonrpc":"2.0","id":3,"result":null}')
    assert it.answers() == [
        [("init", "invalid_request")],
        [(1, "invalid_request"), (2, "invalid_request"), (3, "result")],
    ]


def test_an_id_twice_in_a_batch_is_refused_the_second_time() -> None:
    it = desk()
    (first,) = it.say([{"id": 1, "method": "models"}, {"id": 1, "method": "models"}])
    assert first.batch is not None
    first.batch.put(1, b'{"jsonrpc":"2.0","id":1,"result":null}')
    assert it.answers() == [[(1, "duplicate_id"), (1, "result")]]


def test_a_batch_in_a_batch_is_one_bad_member() -> None:
    it = desk()
    it.say([[{"id": 1, "method": "ping"}], {"id": 2, "method": "ping"}])
    assert it.answers() == [[(None, "invalid_request"), (2, "result")]]


# However it is cut

CONVERSATION = b"".join(
    line(message)
    for message in (
        {"id": "before", "method": "models"},
        INITIALIZE,
        {"id": "é\u2028", "method": "tokenize", "params": {"model": "ü", "text": "日本"}},
        b"garbage \xc3",
        b"",
        [{"id": 1, "method": "server/info"}, {"id": 2, "method": "models"}, 3],
        b"x" * (MAX_FRAME_BYTES + 100),
        {"method": "$/cancelRequest", "params": {"id": 2}},
        [{"id": 3, "method": "x"}],
        {"id": "down", "method": "shutdown"},
        {"id": "late", "method": "models"},
    )
).removesuffix(b"\n")


@given(cuts=st.lists(st.integers(0, len(CONVERSATION)), max_size=40), bom=st.booleans())
def test_the_same_bytes_get_the_same_answers_however_they_are_cut(cuts: list[int], bom: bool) -> None:
    it = desk(initialized=False)
    data = b"\xef\xbb\xbf" * bom + CONVERSATION
    edges = [0, *sorted(cuts), len(data)]
    incoming = [item for start, end in pairwise(edges) for item in it.intake.feed(data[start:end])]
    incoming += it.intake.end()
    assert asked(incoming) == [
        (None, "initialize"),
        ("é\u2028", "tokenize"),
        (2, "models"),
        (None, "$/cancelRequest"),
        ("down", "shutdown"),
    ]
    assert it.answers() == [
        ("before", "not_initialized"),
        ("init", "result"),
        (None, "parse_error"),
        (None, "invalid_request"),
        [(3, "method_not_found")],
        ("late", "shutting_down"),
    ]
