"""Scores of one evaluation, and the metrics that every task has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmr1.data.faults import row_fault
from vlmr1.evaluation.bootstrap import Metric, ratio
from vlmr1.evaluation.records import Record
from vlmr1.report.cases import Case
from vlmr1.rewards.answer import has_format
from vlmr1.types import Sample


@dataclass(frozen=True)
class Scored:
    """Metrics by name in their order of display, counts of what they are over, and one case a row for the page."""

    metrics: dict[str, Metric]
    counts: dict[str, Any]
    cases: list[Case]


def check_one_image(sample: Sample, task: str) -> None:
    """Raise DataError for a row that does not have exactly one image."""
    if len(sample.images) != 1:
        raise row_fault(
            sample.source, "images", f"--task {task} needs one image a row, this one has {len(sample.images)}"
        )


def completion_metrics(records: Sequence[Record], failed: Sequence[bool]) -> dict[str, Metric]:
    """Shares of completions with the format, with an unreadable answer (`failed`), truncated; and their length."""
    return {
        "format_share": ratio([float(has_format(record.text)) for record in records]),
        "parse_failure_share": ratio([float(each) for each in failed]),
        "truncated_share": ratio([float(record.finish_reason == "length") for record in records]),
        "completion_length": ratio([float(len(record.token_ids)) for record in records]),
    }
