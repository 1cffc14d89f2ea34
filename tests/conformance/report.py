"""What a run looks like to people: a table of every promise, and the details of those that were not kept."""

from collections.abc import Iterable, Sequence
from textwrap import indent

from .runner import Outcome, Variant
from .transcript import Transcript


def table(outcomes: Sequence[Outcome]) -> str:
    """Return one line for each transcript and one column for each variant."""
    variants = list(dict.fromkeys(outcome.variant for outcome in outcomes))
    cells = {(outcome.transcript.name, outcome.variant): _cell(outcome) for outcome in outcomes}
    transcripts = sorted(_transcripts(outcomes), key=lambda transcript: transcript.name)
    rows = [("area", "transcript", *map(str, variants), "promise")]
    rows += [_row(transcript, variants, cells) for transcript in transcripts]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def failures(outcomes: Iterable[Outcome]) -> str:
    """Return, for each failure, what was expected, what came, and what had been said before."""
    parts: list[str] = []
    for outcome in outcomes:
        if outcome.failed is not None:
            title = f"FAILED {outcome.transcript.name} ({outcome.variant})"
            body = [outcome.transcript.promise, "", outcome.failed, "", "said last:", *outcome.conversation]
            details = indent("\n".join(body), " " * 4)
            parts.append(f"{title}\n{details}")
    return "\n\n".join(parts)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the counts in one line."""
    failed = sum(outcome.failed is not None for outcome in outcomes)
    skipped = sum(outcome.skipped is not None for outcome in outcomes)
    return f"{len(outcomes) - failed - skipped} ok, {failed} failed, {skipped} skipped"


def _transcripts(outcomes: Iterable[Outcome]) -> list[Transcript]:
    return list({outcome.transcript.name: outcome.transcript for outcome in outcomes}.values())


def _row(
    transcript: Transcript, variants: Iterable[Variant], cells: dict[tuple[str, Variant], str]
) -> tuple[str, ...]:
    area, _, name = transcript.name.partition("/")
    results = [cells.get((transcript.name, variant), "") for variant in variants]
    return area, name, *results, transcript.promise


def _cell(outcome: Outcome) -> str:
    if outcome.failed is not None:
        return "FAILED"
    return "ok" if outcome.skipped is None else f"skipped: {outcome.skipped}"
