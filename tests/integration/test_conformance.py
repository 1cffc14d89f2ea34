"""The conformance suite: our server passes it in every way, and who breaks a promise is found out."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.checked_target import CheckedTarget
from support.tiny_adapter import random_matrices, write_mlx_lm
from support.tiny_model import HIDDEN, LAYERS, make_tiny_model
from support.wire import COMMAND, Listening

from mlx_sidecar.conformance.connection import Cutting
from mlx_sidecar.conformance.parser import load_transcripts
from mlx_sidecar.conformance.report import failures
from mlx_sidecar.conformance.runner import ALL_VARIANTS, Runner, Variant
from mlx_sidecar.conformance.target import ProcessTarget, SocketTarget
from mlx_sidecar.protocol.framing import Framing

PATIENCE_SECONDS = 30.0
TOY_GIVEN = {"model": "toy", "adapter": "/toy-adapter"}
TOY = Path(__file__).parents[1] / "support" / "toy_server.py"
TRANSCRIPTS = load_transcripts()
EVERYWHERE = {
    transcript.name
    for transcript in TRANSCRIPTS
    if transcript.framing is not Framing.LSP and "socket" not in transcript.needs
}
"""What can be played to a toy."""

Failing = Callable[[str | None], set[str]]


def names(text: str) -> set[str]:
    """Return the names of transcripts in `text`."""
    found = set(text.split())
    assert found <= EVERYWHERE
    return found


# Progress is looked at in these, whatever else they are about.
STREAMS = names("""
    cancel/during-decode cancel/one-of-two-alike cancel/twice flow/acks-are-absolute
    flow/acks-open-the-window flow/acks-without-flow-control flow/held-back-and-merged
    flow/streams-are-paced-apart lifecycle/end-of-input-lets-work-end lifecycle/shutdown-cancels
    lifecycle/signal methods/adapters-by-force methods/adapters-wait methods/generate-alike methods/reload
    methods/unload-waits streams/add-up streams/first-part streams/other-answers-overtake
    streams/tokens-may-be-numbers-or-strings
""")
UNKNOWN_METHODS = names("""
    framing/long-line framing/separators-are-escaped ids/come-back-as-they-went ids/used-again
    ids/zero-and-empty json/valid jsonrpc/examples jsonrpc/many-in-one-write
    jsonrpc/notifications-asked-as-requests jsonrpc/unknown-method lifecycle/before-initialize
""")
FAILING: dict[str, set[str]] = {
    "adapters-ignored": names("errors/adapter-not-loaded errors/invalid-adapter methods/adapters"),
    "aliases-outlive-models": names("methods/alias-of-a-load"),
    "answers-notifications": names("""
        batch/as-many-as-allowed batch/notifications-only jsonrpc/examples jsonrpc/examples-of-batches
        jsonrpc/many-in-one-write jsonrpc/notifications-are-silent lifecycle/before-initialize
        lifecycle/shutdown-and-exit
    """),
    "answers-twice": UNKNOWN_METHODS,
    "batch-answered-apart": names("""
        batch/as-many-as-allowed batch/bad-members batch/batches-do-not-nest batch/before-initialize
        batch/errors-inside batch/members-can-be-cancelled batch/one-array-of-answers
        batch/streams batch/waits-for-the-slowest jsonrpc/examples-of-batches
        lifecycle/end-of-input-lets-work-end lifecycle/shutdown-and-exit
    """),
    "dies-on-garbage": names("""
        batch/not-json framing/a-line-may-come-in-two-writes framing/bad-json-in-a-good-frame
        framing/bad-utf-8 framing/byte-order-mark-later framing/deep-nesting
        framing/framing-is-decided-once framing/garbage-between-messages framing/lone-surrogates
        framing/separators-do-not-end-lines ids/lone-surrogate json/invalid json/invalid-inside
        jsonrpc/examples jsonrpc/examples-of-batches jsonrpc/many-in-one-write
    """),
    "empty-batch-answered-with-array": names(
        "batch/as-many-as-allowed batch/empty jsonrpc/examples-of-batches"
    ),
    "exits-with-zero": names("lifecycle/exit-without-shutdown"),
    "force-is-quiet": names("methods/adapters-by-force methods/unload-by-force methods/unload-forced-later"),
    "force-spreads": names("methods/adapters-by-force"),
    "ids-become-strings": EVERYWHERE
    - names("""
        batch/batches-do-not-nest batch/empty batch/not-json batch/notifications-only cancel/unknown-ids
        framing/a-line-may-come-in-two-writes framing/bad-utf-8 framing/byte-order-mark-later
        framing/deep-nesting framing/lone-surrogates ids/beyond-safe-integers ids/fraction ids/lone-surrogate
        ids/null ids/other-types ids/too-long-to-come-back ids/used-again json/invalid json/invalid-inside
        json/valid jsonrpc/examples-of-batches jsonrpc/members-in-any-order jsonrpc/method-member
        jsonrpc/not-a-request jsonrpc/notifications-are-silent jsonrpc/params-must-be-structured
        jsonrpc/version-member lifecycle/end-of-input lifecycle/exit-without-shutdown
    """),
    "ignores-cancel": names("""
        batch/members-can-be-cancelled cancel/before-it-began cancel/during-decode
        cancel/one-of-two-alike cancel/only-the-one-that-is-meant cancel/twice flow/acks-open-the-window
        flow/streams-are-paced-apart ids/in-flight lifecycle/shutdown-cancels lifecycle/signal
        methods/adapters-by-force streams/other-answers-overtake
    """),
    "ignores-deadlines": names("errors/deadline-exceeded"),
    "ignores-the-window": names("flow/held-back-and-merged"),
    "load-goes-back": names("methods/load-tells-how-far methods/reload-tells-how-far"),
    "loses-work-at-the-end": names("lifecycle/end-of-input-lets-work-end"),
    "miscounts-bytes": STREAMS | names("cancel/before-it-began streams/without-text"),
    "no-jsonrpc-member": EVERYWHERE - {"lifecycle/end-of-input"},
    "null-result-left-out": names("""
        lifecycle/shutdown-and-exit lifecycle/shutdown-before-initialize lifecycle/shutdown-cancels
        lifecycle/shutdown-in-the-same-write
    """),
    "progress-after-the-response": STREAMS
    | names("errors/deadline-exceeded methods/unload-by-force methods/unload-forced-later"),
    "reload-cancels": names("methods/reload"),
    "repairs-bad-utf-8": names("framing/bad-utf-8"),
    "separators-end-lines": names("""
        framing/separators-do-not-end-lines json/invalid json/invalid-inside json/valid
    """),
    "separators-not-escaped": names("""
        framing/separators-are-escaped framing/separators-do-not-end-lines methods/text-with-separators
    """),
    "settings-forgotten": names("methods/load-settings"),
    "unknown-method-is-invalid": UNKNOWN_METHODS | names("batch/errors-inside jsonrpc/examples-of-batches"),
}
"""What each way of being wrong makes fail."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model with a context for answers that take long enough to be cancelled, and an adapter of it."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 1024}))
    layers = {f"model.layers.{layer}.self_attn.q_proj": (HIDDEN, HIDDEN) for layer in range(LAYERS)}
    adapter = write_mlx_lm(folder.parent / "adapter", random_matrices(layers, seed=1, rank=4))
    return {"model": str(folder), "adapter": str(adapter)}


@pytest.fixture(scope="module")
def server() -> Generator[Listening]:
    """A server that listens, on a path that is short enough."""
    with (
        tempfile.TemporaryDirectory(prefix="mlx-", dir="/tmp") as folder,
        Listening(Path(folder) / "s") as one,
    ):
        yield one


@pytest.fixture(scope="module")
def failing() -> Generator[Failing]:
    """Says which transcripts fail for a toy server with a break."""
    # Without site-packages the toy starts in a fraction of the time.
    command = [sys.executable, "-ESs", str(TOY)]
    variant = Variant(Framing.NDJSON, Cutting.WHOLE)

    def run(broken: str | None) -> set[str]:
        target = ProcessTarget([*command, broken] if broken else command)
        outcomes = Runner(target, TOY_GIVEN, PATIENCE_SECONDS).run(TRANSCRIPTS, [variant])
        return {outcome.transcript.name for outcome in outcomes if outcome.failed is not None}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {broken: pool.submit(run, broken) for broken in (None, *FAILING)}
        yield lambda broken: runs[broken].result()


def run(target: ProcessTarget | SocketTarget, given: dict[str, str], variant: Variant) -> set[str]:
    outcomes = Runner(CheckedTarget(target), given, PATIENCE_SECONDS).run(TRANSCRIPTS, [variant])
    if details := failures(outcomes):
        pytest.fail(details, pytrace=False)
    skipped = {outcome.skipped for outcome in outcomes if outcome.skipped is not None}
    return skipped - {"ndjson only", "lsp only", "whole only"}


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
def test_our_server_keeps_every_promise_over_stdio(variant: Variant, given: dict[str, str]) -> None:
    assert run(ProcessTarget([COMMAND, "serve"]), given, variant) == {"needs socket"}


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
def test_our_server_keeps_every_promise_over_a_socket(
    variant: Variant, given: dict[str, str], server: Listening
) -> None:
    assert run(SocketTarget(server.path), given, variant) == {"needs process"}


def test_a_server_that_shares_no_code_with_ours_passes_too(failing: Failing) -> None:
    assert failing(None) == set()


@pytest.mark.parametrize("broken", FAILING)
def test_who_breaks_one_promise_fails_where_it_is_made(broken: str, failing: Failing) -> None:
    assert failing(broken) == FAILING[broken]
