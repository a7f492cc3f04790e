"""Compare results of several models on the same rows: a Markdown table with paired differences to the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlmr1.errors import SettingError
from vlmr1.evaluation.bootstrap import Metric, interval
from vlmr1.evaluation.fingerprint import differences
from vlmr1.evaluation.results import RESULTS, Results, read_results, shown, shown_interval, title

COMPARISON = "comparison.md"


def compare(folders: Sequence[Path]) -> str:
    """Return the table of the results in these directories, or one level below. SettingError where rows differ."""
    found = [each for folder in folders for each in result_folders(folder)]
    if len(found) < 2:
        raise SettingError(f"compare: {len(found)} results.json in {', '.join(map(str, folders))}: two are needed")
    return comparison([read_results(folder) for folder in found])


def result_folders(folder: Path) -> list[Path]:
    """Return the directory if it has results, else its subdirectories with results."""
    if (folder / RESULTS).is_file():
        return [folder]
    below = sorted(path.parent for path in folder.glob(f"*/{RESULTS}"))
    if not below:
        raise SettingError(f"compare: there is no {RESULTS} in {folder}, nor one level below")
    return below


def comparison(results: Sequence[Results]) -> str:
    """Return Markdown: a row a metric, a column a model, with 95% intervals, and the paired differences."""
    first, *others = results
    for other in others:
        _check(first, other)
    names = [_escaped(result.model) for result in results]
    head = ["metric", *names, *(f"{name} - {names[0]}" for name in names[1:])]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for name in first.metrics:
        if all(name in other.metrics for other in others):
            values = [_value(name, result.metrics[name]) for result in results]
            changes = [_change(name, first.metrics[name], other.metrics[name]) for other in others]
            lines.append(_row([title(name), *values, *changes]))
    content = first.content
    note = (
        f"{content['options']['task']}, {content['rows']['count']} rows. In parentheses bootstrap 95% intervals over "
        f"rows; differences are paired: {content['bootstrap']['draws']} draws of the same rows for all models."
    )
    return "\n".join([*lines, "", note]) + "\n"


def difference(first: Metric, other: Metric) -> tuple[float | None, float | None, float | None]:
    """Return other - first with its 95% interval, from paired replicates."""
    if first.value is None or other.value is None:
        return None, None, None
    return other.value - first.value, *interval(np.asarray(other.replicates) - np.asarray(first.replicates))


def _check(first: Results, other: Results) -> None:
    """Raise SettingError where task or rows differ."""
    for name in ("rows", "bootstrap"):
        changed = next(differences(first.content[name], other.content[name], name), None)
        if changed is not None:
            what, one, two = changed
            raise SettingError(
                f"compare: {what} is {one!r} for {first.model} and {two!r} for {other.model}: not the same rows"
            )
    tasks = [result.content["options"]["task"] for result in (first, other)]
    if tasks[0] != tasks[1]:
        raise SettingError(f"compare: {first.model} has results of {tasks[0]}, {other.model} of {tasks[1]}")


def _value(name: str, metric: Metric) -> str:
    return f"{shown(name, metric.value)} ({shown_interval(name, metric)})"


def _change(name: str, first: Metric, other: Metric) -> str:
    value, low, high = difference(first, other)
    if value is None or low is None or high is None:
        return "-"
    digits = 1 if name == "completion_length" else 4
    return f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")
