"""The table of predicted time in the manual is what is counted now: one of its rows, and the rows that it should have."""

import pytest

from tests.counting.predictions import DOCS, HEAD_LINES, counted, line, rows

ROWS = dict(rows())
SHOWN = "3B", 256, "shared"


@pytest.fixture(scope="module")
def page() -> list[str]:
    return (DOCS / "benchmarks.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_a_row_is_what_is_counted(page: list[str]):
    assert line(SHOWN, counted(SHOWN, ROWS[SHOWN])) in page


def test_the_tables_have_every_model_length_and_setting(page: list[str]):
    savings = (DOCS / "rollouts.md").read_text(encoding="utf-8")
    start = page.index(HEAD_LINES[0])
    assert [tuple(each.split(" | ")[:3]) for each in page[start + 2 : start + 2 + len(ROWS)]] == [
        (f"| {model}", f"{length:,}", name) for model, length, name in ROWS
    ]
    for model, length, name in ROWS:
        assert name == "nothing shared" or f"| {model} | {length:,} | {name} | " in savings
