import re
from pathlib import Path

import pytest

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.protocol import openrpc, reference
from mlx_sidecar.protocol.framing import MAX_INBOUND_FRAME_BYTES, MAX_OUTBOUND_FRAME_BYTES
from mlx_sidecar.protocol.jsonrpc import MAX_BATCH_MEMBERS
from mlx_sidecar.runtime.server import exit_codes

ROOT = Path(__file__).parents[3]
DOCUMENT = openrpc.document()
PAGE = reference.markdown(DOCUMENT)
HEADINGS = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)


def anchor(heading: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def row(first_cell: str, page: str = PAGE) -> list[str]:
    """The cells of the first table row that begins with a cell."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {first_cell} |"))
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split(" | ")]


def test_the_checked_in_reference_is_current() -> None:
    assert (ROOT / "docs/protocol.md").read_text() == PAGE, "It is stale. Run: make generate"


def test_every_message_has_a_section() -> None:
    entries = [*DOCUMENT["methods"], *DOCUMENT["x-notifications"]]
    assert {f"`{entry['name']}`" for entry in entries} <= {*HEADINGS}


def test_every_link_within_the_page_leads_to_one_heading() -> None:
    anchors = [anchor(heading) for heading in HEADINGS]
    links = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert len(links) > 20
    assert [link for link in links if anchors.count(link) != 1] == []


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    tables = re.findall(r"(?:^\|.*\|\n)+", PAGE, re.MULTILINE)
    assert len(tables) > 30
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


@pytest.mark.parametrize(
    "cells",
    [
        ["`temperature`", "number (from 0 up to 100)", "`0.0`", "0 is greedy."],
        ["`repetitionPenalty`", "number (above 0 up to 100)", "`1.0`", "1 is off."],
        ["`windowBytes`", "integer (from 1 up to 2^53 - 1)", ""],
        ["`merged`", "integer, or absent for 1", ""],
        ["`lastStepAgeMs`", "number or null", ""],
        ["`flowControl`", "[`FlowControl`](#type-flowcontrol) or null", "`null`", ""],
        ["`jsonrpc`", '`"2.0"`', ""],
        ["`result`", "anything", ""],
    ],
    ids=lambda cells: cells[0],
)
def test_a_row_says_type_bounds_default_and_meaning(cells: list[str]) -> None:
    assert row(cells[0]) == cells


def test_every_kind_of_error_is_listed_with_code_and_whether_to_try_again() -> None:
    table = PAGE.partition("## Errors")[2]
    for kind, error in DOCUMENT["components"]["errors"].items():
        again = "yes" if error["data"]["retryable"] else "no"
        assert row(f"`{kind}`", table) == [f"`{kind}`", str(error["code"]), again, error["message"]]


def test_a_method_lists_the_errors_that_not_every_method_has() -> None:
    section = PAGE.partition("### `generate`")[2].partition("### `")[0]
    assert "`slow_consumer` (1007, retryable)" in section
    assert "`context_overflow` (1004)" in section
    assert "internal_error" not in section


def test_the_numbers_of_the_introduction_are_those_of_the_code() -> None:
    assert f"may be {MAX_INBOUND_FRAME_BYTES >> 20} MiB long" in PAGE
    assert f"never longer than {MAX_OUTBOUND_FRAME_BYTES >> 20} MiB" in PAGE
    assert f"at most {MAX_BATCH_MEMBERS} messages" in PAGE
    assert f"at most {Settings(home=Path()).max_connections} connections" in PAGE
    codes = {value for value in vars(exit_codes).values() if isinstance(value, int)}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)} == codes
