"""The command `mlx-sidecar conformance`: which target, which transcripts, which way of saying them."""

import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path

from .parser import load_transcripts
from .report import failures, summary, table
from .runner import ALL_VARIANTS, Outcome, Runner, Variant
from .target import ProcessTarget, SocketTarget, Target
from .transcript import Transcript

WRONG_ARGUMENTS = 2


def run(arguments: argparse.Namespace) -> int:
    """Play the transcripts and print how it went; return 0 if every promise was kept, else 1, or 2."""
    target = _target(arguments.socket, arguments.target)
    transcripts = [one for one in load_transcripts() if _chosen(one, arguments.only)]
    if target is None or not transcripts:
        problem = "name either --socket PATH or -- COMMAND" if target is None else "no such transcript"
        sys.stderr.write(f"mlx-sidecar conformance: {problem}\n")
        return WRONG_ARGUMENTS
    given = {"model": arguments.model, "adapter": arguments.adapter}
    given = {name: value for name, value in given.items() if value is not None}
    runner = Runner(target, given, arguments.timeout)
    outcomes = runner.run(transcripts, _variants(arguments.framing, arguments.cutting), _show_progress)
    sys.stderr.write("\n")
    details = failures(outcomes)
    sys.stdout.write("\n\n".join(filter(None, [table(outcomes), details, summary(outcomes)])) + "\n")
    return 1 if details else 0


def _show_progress(outcome: Outcome) -> None:
    sys.stderr.write("F" if outcome.failed is not None else "-" if outcome.skipped is not None else ".")
    sys.stderr.flush()


def _target(path: Path | None, command: list[str]) -> Target | None:
    if (path is None) == (not command):
        return None
    return SocketTarget(path) if path is not None else ProcessTarget(command)


def _chosen(transcript: Transcript, pattern: str) -> bool:
    return fnmatch(transcript.name, pattern)


def _variants(framing: str, cutting: str | None) -> list[Variant]:
    return [
        variant
        for variant in ALL_VARIANTS
        if framing in ("both", variant.framing.value) and cutting in (None, variant.cutting.value)
    ]
