"""Targets that misbehave: each must cost its own transcript, in bounded time, and nothing more."""

import sys
from pathlib import Path

import pytest

from mlx_sidecar.conformance.connection import Cutting
from mlx_sidecar.conformance.parser import parse
from mlx_sidecar.conformance.report import failures, summary, table
from mlx_sidecar.conformance.runner import Outcome, Runner, Variant
from mlx_sidecar.conformance.target import ProcessTarget, SocketTarget
from mlx_sidecar.conformance.transcript import Transcript
from mlx_sidecar.protocol.framing import Framing

NDJSON = Variant(Framing.NDJSON, Cutting.WHOLE)
ANSWER = '{"jsonrpc":"2.0","id":1,"result":{}}'
PING = '--> {"jsonrpc":"2.0","id":1,"method":"ping"}\n<-- {"id":1}\n'
ENDS = parse("some/ends", f"# It answers and ends.\n{PING}=== exit 0\n")


def program(body: str) -> ProcessTarget:
    return ProcessTarget([sys.executable, "-ISc", f"import os, sys, time\n{body}"])


def play(
    target: ProcessTarget | SocketTarget, *transcripts: Transcript, patience: float = 0.3
) -> list[Outcome]:
    return Runner(target, {}, patience).run(transcripts, [NDJSON])


def failed(target: ProcessTarget | SocketTarget, transcript: Transcript = ENDS, patience: float = 0.3) -> str:
    [outcome] = play(target, transcript, patience=patience)
    assert outcome.failed is not None
    return outcome.failed


def test_what_a_target_should_do_is_ok() -> None:
    target = program(f"sys.stdin.readline(); print('{ANSWER}')")
    [outcome] = play(target, ENDS, patience=20)
    assert (outcome.failed, outcome.skipped) == (None, None)


def test_a_target_that_says_nothing() -> None:
    assert "nothing came for 0.3 s" in failed(program("time.sleep(60)"))


def test_a_target_that_never_ends_a_line() -> None:
    assert "no complete frame" in failed(program("\nwhile True: os.write(1, b'x'); time.sleep(0.01)"))


def test_a_target_that_floods() -> None:
    assert "not JSON" in failed(program("\nwhile True: os.write(1, b'x' * 1000 + b'\\n')"), patience=20)


def test_a_target_that_does_not_read() -> None:
    much = parse("some/much", "# It reads.\n-->frame 'x'*1000000\n<-- nothing\n")
    assert "read nothing" in failed(program("time.sleep(60)"), much)


def test_a_target_that_floods_instead_of_reading() -> None:
    much = parse("some/much", "# It reads.\n-->frame 'x'*1000000\n<-- nothing\n")
    assert "floods" in failed(program("\nwhile True: os.write(1, b'x' * 65536)"), much, patience=20)


def test_a_target_that_dies_without_a_word() -> None:
    assert "ended the connection" in failed(program("sys.exit(3)"), patience=20)


def test_a_target_that_cannot_be_started() -> None:
    assert "cannot be started" in failed(ProcessTarget(["/no/such/program"]))


def test_a_target_that_nobody_listens_for(tmp_path: Path) -> None:
    assert "nobody answers" in failed(SocketTarget(tmp_path / "none.sock"))


def test_a_target_that_ends_with_the_wrong_code() -> None:
    target = program(f"sys.stdin.readline(); print('{ANSWER}', flush=True); sys.exit(3)")
    assert "expected exit code 0, got 3" in failed(target, patience=20)


def test_a_target_that_is_killed_has_the_code_of_its_signal() -> None:
    dies = parse("some/dies", "# It dies.\n=== exit 137\n")
    [outcome] = play(program("os.kill(os.getpid(), 9)"), dies, patience=20)
    assert outcome.failed is None


def test_a_target_that_closes_its_output_and_stays() -> None:
    target = program(f"sys.stdin.readline(); os.write(1, b'{ANSWER}\\n'); os.close(1); time.sleep(60)")
    assert "still there" in failed(target)


def test_a_target_that_says_too_much() -> None:
    target = program(f"sys.stdin.readline(); print('{ANSWER}\\n{ANSWER}')")
    assert "expected the end of the connection" in failed(target, patience=20)


def test_what_another_process_of_the_target_holds_open_is_closed_with_it() -> None:
    target = program("os.fork() or time.sleep(60); time.sleep(60)")
    assert "nothing came" in failed(target)


def test_one_failure_leaves_the_others_alone() -> None:
    target = program(
        "import json\n"
        "for line in sys.stdin:\n"
        "    request = json.loads(line)\n"
        "    if request['method'] == 'hang': time.sleep(60)\n"
        "    print(json.dumps({'jsonrpc': '2.0', 'id': request['id'], 'result': {}}), flush=True)\n"
    )
    hangs = parse("some/hangs", f"# It hangs.\n{PING.replace('ping', 'hang')}")
    works = parse("some/works", f"# It works.\n{PING}")
    outcomes = play(target, hangs, works, patience=1)
    assert [outcome.failed is None for outcome in outcomes] == [False, True]


def test_what_a_target_cannot_offer_is_skipped_with_the_reason() -> None:
    transcripts = [
        parse("needs/model", f"# a\n@needs model\n{PING}"),
        parse("needs/socket", f"# a\n@needs socket\n{PING}"),
        parse("only/lsp", f"# a\n@framing lsp\n{PING}"),
    ]
    reasons = [outcome.skipped for outcome in play(ProcessTarget(["/no/such/program"]), *transcripts)]
    assert reasons == ["needs model", "needs socket", "lsp only"]


def test_what_is_too_much_for_single_bytes_is_skipped_there() -> None:
    transcript = parse("only/whole", f"# a\n@whole\n{PING}")
    variant = Variant(Framing.LSP, Cutting.BYTEWISE)
    [outcome] = Runner(ProcessTarget(["/no/such/program"]), {}, 1).run([transcript], [variant])
    assert outcome.skipped == "whole only"


def test_the_case_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "letters.cases").write_text("'a'\n'b'\n")
    each = parse("some/each", "# Each.\n@each letters.cases\n-->bytes '${case}'\n=== exit 0\n", tmp_path)
    assert "for the case b'a'" in failed(program("sys.exit(1)"), each, patience=20)


@pytest.fixture
def report() -> tuple[str, str, str]:
    skipped = parse("b/skipped", f"# Never tried.\n@needs model\n{PING}")
    outcomes = play(program("sys.stderr.write('oh no'); sys.exit(3)"), ENDS, skipped, patience=20)
    return table(outcomes), failures(outcomes), summary(outcomes)


def test_the_table_has_a_line_for_every_promise(report: tuple[str, str, str]) -> None:
    head, *rows = [line.split(maxsplit=3) for line in report[0].splitlines()]
    assert head[:3] == ["area", "transcript", "ndjson"]
    assert rows[0] == ["b", "skipped", "skipped:", "needs model  Never tried."]
    assert rows[1] == ["some", "ends", "FAILED", "It answers and ends."]
    assert report[2] == "0 ok, 1 failed, 1 skipped"


def test_a_failure_is_told_with_what_was_said_and_with_the_last_words(report: tuple[str, str, str]) -> None:
    assert "FAILED some/ends (ndjson whole)" in report[1]
    assert "line 3: the target ended the connection" in report[1]
    assert '--> {"jsonrpc":"2.0","id":1,"method":"ping"}' in report[1]
    assert "oh no" in report[1]
