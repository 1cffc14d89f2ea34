from pathlib import Path

import pytest

from mlx_sidecar.conformance.parser import (
    TRANSCRIPTS,
    TranscriptError,
    load_setup,
    load_transcripts,
    parse,
)
from mlx_sidecar.conformance.transcript import (
    Event,
    Expect,
    ExpectNothing,
    ExpectProgress,
    Send,
    Transcript,
)
from mlx_sidecar.protocol import errors
from mlx_sidecar.protocol.framing import Framing
from mlx_sidecar.protocol.methods import CLIENT_NOTIFICATIONS, METHODS

# No client can bring these about with any server and any model.
NOT_PROVOKED = {
    "internal_error",
    "backend_unavailable",
    "engine_failed",
    "generation_failed",
    "out_of_memory",
    "unsupported",
    "unsafe_model",
    "slow_consumer",
    "overloaded",
}


def test_a_transcript_is_read_line_by_line() -> None:
    read = parse(
        "area/name",
        "# The promise,\n# in two lines.\n#\n# And a remark.\n"
        "@setup loaded\n@needs process\n@framing lsp\n@whole\n"
        '--> {"id":1,\n    "x":2}\n-->bytes \'\\n\'\n# Between.\n<-- {"id":1}\n<-* {"id":2}\n<-* {"id":3}\n'
        '<~~ "t" {"seq":1}\n<~~ 7\n<-- nothing\n=== eof\n=== exit 143\n',
    )
    assert (read.promise, read.setup, read.needs) == ("The promise, in two lines.", "loaded", {"process"})
    assert (read.framing, read.whole, read.ends_connection) == (Framing.LSP, True, True)
    send, one, two, progress, other, nothing, eof, end = read.statements
    assert isinstance(send, Send)
    assert [(item.pieces[0].text, item.framed) for item in send.items] == [
        (b'{"id":1, "x":2}', True),
        (b"\n", False),
    ]
    assert one == Expect(13, ('{"id":1}',))
    assert two == Expect(14, ('{"id":2}', '{"id":3}'), any_order=True)
    assert progress == ExpectProgress(16, '"t"', '{"seq":1}')
    assert other == ExpectProgress(17, "7", '"$any"')
    assert nothing == ExpectNothing(18)
    assert (eof, end) == (Event(19, "eof", ""), Event(20, "exit", "143"))


@pytest.mark.parametrize(
    "line",
    [
        "hello",
        "<-- {",
        '<-- {"id":"$integr"}',
        '<~~ "t" {"seq":"$no"}',
        "<~~ t",
        "-->frame abc",
        "=== nap",
        "=== exit",
        "=== eof now",
        "@framing xml",
        "@needs luck",
        "@unknown",
    ],
)
def test_a_mistake_in_a_transcript_is_told_with_its_name(line: str) -> None:
    with pytest.raises(TranscriptError, match="area/name:"):
        parse("area/name", f"# A promise.\n--> {{}}\n{line}\n")


@pytest.mark.parametrize("text", ["--> {}\n", "# A promise without a conversation.\n"])
def test_a_transcript_has_a_promise_and_says_something(text: str) -> None:
    with pytest.raises(TranscriptError):
        parse("area/name", text)


def test_cases_are_read_from_their_file(tmp_path: Path) -> None:
    (tmp_path / "some.cases").write_text("# remark\n'a'\n\n'b'*2 'c'\n")
    read = parse("area/name", "# A promise.\n@each some.cases\n-->frame '${case}'\n", tmp_path)
    assert [[piece.text for piece in case] for case in read.cases] == [[b"a"], [b"b", b"c"]]


def test_a_transcript_needs_what_its_setup_needs() -> None:
    needs = {one.name: one.needs for one in load_transcripts()}
    assert needs["streams/add-up"] == {"model"}
    assert needs["ids/null"] == set()


def test_a_setup_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(TranscriptError, match="no-such"):
        load_setup("no-such")


@pytest.fixture(scope="module")
def everything() -> str:
    return "".join(path.read_text() for path in TRANSCRIPTS.rglob("*.txt"))


def test_every_method_and_notification_is_spoken(everything: str) -> None:
    for name in METHODS | CLIENT_NOTIFICATIONS:
        assert f'"method":"{name}"' in everything, name


def test_every_kind_of_error_is_provoked_or_known_to_be_out_of_reach(everything: str) -> None:
    def kinds(base: type[errors.SidecarError]) -> set[str]:
        return {base.kind}.union(*map(kinds, base.__subclasses__()))

    expected = {kind for kind in kinds(errors.SidecarError) if f'"kind":"{kind}"' in everything}
    assert expected == kinds(errors.SidecarError) - NOT_PROVOKED


def test_every_case_of_the_two_lists_is_what_it_is_said_to_be() -> None:
    # Against a parser that shares no code with the server's.
    import json

    from mlx_sidecar.conformance.notation import build

    def refuse(name: str) -> None:
        raise ValueError(name)

    def is_json(data: bytes) -> bool:
        try:
            json.loads(data.decode(), parse_constant=refuse)
        except ValueError:
            return False
        return True

    def cases(transcript: Transcript) -> list[bytes]:
        return [build(case, {}) for case in transcript.cases]

    transcripts = {one.name: one for one in load_transcripts()}
    assert [case for case in cases(transcripts["json/valid"]) if not is_json(case)] == []
    assert [case for case in cases(transcripts["json/invalid"]) if is_json(case)] == []
