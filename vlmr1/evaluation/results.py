"""results.json: fingerprint and metrics with intervals; bootstrap.json: replicates, which pair two results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmr1.errors import SettingError
from vlmr1.evaluation.bootstrap import DRAWS, SEED, Metric
from vlmr1.evaluation.fingerprint import as_json
from vlmr1.evaluation.scoring import Scored
from vlmr1.lifecycle.checkpoint import replace_text
from vlmr1.report.cases import Case, write_cases
from vlmr1.report.pass_rates import Bar

RESULTS = "results.json"
REPLICATES = "bootstrap.json"
PAGE = "cases.html"
TITLES = {
    "acc@0.5": "acc@0.5",
    "mean_iou": "mean IoU",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "nms_ap": "NMS-AP",
    "score": "mean score",
    "pass_rate": "pass rate",
    "mean_reward": "mean reward",
    "always_pass_share": "rows that always pass",
    "never_pass_share": "rows that never pass",
    "format_share": "with the format",
    "parse_failure_share": "answer not read",
    "unknown_label_share": "boxes of unknown labels",
    "truncated_share": "cut at the limit",
    "completion_length": "tokens a completion",
}


@dataclass(frozen=True)
class Results:
    """The content of results.json, with the bootstrap replicates."""

    content: Mapping[str, Any]
    metrics: Mapping[str, Metric]

    @property
    def model(self) -> str:
        return self.content["model"]["name"]

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of (metric, value, 95% interval) as text."""
        return [(title(name), shown(name, m.value), shown_interval(name, m)) for name, m in self.metrics.items()]


def write_results(folder: Path, what: Mapping[str, Any], scored: Scored) -> Results:
    """Write results.json and bootstrap.json, without time, host or output path."""
    metrics = {name: {"value": m.value, "low": m.low, "high": m.high} for name, m in scored.metrics.items()}
    bootstrap = {"draws": DRAWS, "seed": SEED, "interval": 0.95, "replicates": REPLICATES}
    content = {**what, "metrics": metrics, "counts": scored.counts, "bootstrap": bootstrap}
    replicates = {name: _numbers(m.replicates) for name, m in scored.metrics.items()}
    for name, text in ((REPLICATES, json.dumps(replicates) + "\n"), (RESULTS, as_json(content))):
        replace_text(folder / name, text)
    return Results(content, scored.metrics)


def write_page(
    folder: Path, results: Results, cases: Sequence[Case], count: int, histogram: Sequence[Bar] = ()
) -> None:
    """Write the page with the metrics, a histogram of pass rates, up to `count` worst and as many best cases."""
    content = results.content
    title = f"{results.model}: {content['options']['task']}, {content['rows']['count']} rows"
    write_cases(folder / PAGE, title=title, rows=results.table(), cases=cases, count=count, histogram=histogram)


def read_results(folder: Path) -> Results:
    """Read the files of `write_results`. SettingError where they are missing."""
    texts = {}
    for name in (RESULTS, REPLICATES):
        try:
            texts[name] = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingError(f"{folder / name} cannot be read: {error}") from error
    metrics = {
        name: Metric(**value, replicates=np.array(texts[REPLICATES][name], dtype=np.float64))
        for name, value in texts[RESULTS]["metrics"].items()
    }
    return Results(texts[RESULTS], metrics)


def title(name: str) -> str:
    kind, _, method = name.partition("/")
    return f"mean score, {method}" if kind == "score" and method else TITLES[name]


def shown(name: str, value: float | None) -> str:
    digits = 1 if name == "completion_length" else 4
    return "-" if value is None else f"{value:.{digits}f}"


def shown_interval(name: str, metric: Metric) -> str:
    return f"{shown(name, metric.low)} to {shown(name, metric.high)}"


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
