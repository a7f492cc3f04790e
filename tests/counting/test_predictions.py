"""The tables of predicted time in the manual: one row is counted anew, and all rows are there."""

import pytest

from tests.counting.predictions import DOCS, HEAD_LINES, counted, line, rows
from vlmr1.planner.known_models import config_named

ROWS = dict(rows())
SHOWN = "3B", 256, "shared"


@pytest.fixture(scope="module")
def page() -> list[str]:
    return (DOCS / "benchmarks.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_a_row_is_what_is_counted_on_the_whole_model(page: list[str]):
    config = config_named("Qwen2.5-VL-3B-Instruct")
    assert line(SHOWN, counted(config, SHOWN[1], ROWS[SHOWN])) in page


def test_the_tables_have_every_model_length_and_setting(page: list[str]):
    savings = (DOCS / "rollouts.md").read_text(encoding="utf-8")
    start = page.index(HEAD_LINES[0])
    assert [tuple(each.split(" | ")[:3]) for each in page[start + 2 : start + 2 + len(ROWS)]] == [
        (f"| {model}", f"{length:,}", name) for model, length, name in ROWS
    ]
    for model, length, name in ROWS:
        assert name == "nothing shared" or f"| {model} | {length:,} | {name} | " in savings
