"""Runs to be compared: logs and settings, groups that differ in their seed alone, and means over seeds."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlmr1.errors import SettingError
from vlmr1.lifecycle.run_settings import RESUMABLE_CHANGES, SETTINGS, settings_of_run
from vlmr1.report.curves import running_mean
from vlmr1.report.progress import EVALUATIONS, METRICS, read_lines

logger = logging.getLogger(__name__)
# 0.975 quantiles of Student's t by degrees of freedom, from 1; beyond them `t_quantile` has an expansion.
QUANTILES = (12.7062047, 4.30265273, 3.18244631, 2.77644511, 2.57058184, 2.44691185, 2.36462425, 2.30600414, 2.26215716)
Z = 1.95996398  # of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A mean, with its 95% t interval where there are several values."""

    mean: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Curve:
    """A metric by step [T]; the interval is NaN where there is one seed."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Run:
    """A training run, finished or not."""

    path: Path
    name: str  # the path below the directory that all compared runs share
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    settings: dict[str, Any]  # {} where the run has written none

    @cached_property
    def progress(self) -> str:
        """The last logged step, and the steps of the whole run where its settings say them."""
        last, total = int(self.rows[-1]["step"]), self.settings.get("max_steps") or 0
        if total <= 0:
            return str(last)
        return f"{last} of {total}" + (": not finished" if last < total else "")

    @property
    def metrics(self) -> dict[str, None]:
        """The names of its metrics that have a finite value, in order."""
        return dict.fromkeys(
            n for row in (*self.rows, *self.evaluations) for n in row if n != "step" and _is_number(row[n])
        )

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric, without those that are not finite."""
        lines = self.evaluations if metric.startswith("eval/") else self.rows
        points = [(line["step"], line[metric]) for line in lines if _is_number(line.get(metric))]
        array = np.array(points, dtype=float).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    def smooth(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """The series as a running mean over a tenth of its steps; evaluations as they are."""
        steps, values = self.series(metric)
        window = 1 if metric.startswith("eval/") else max(1, len(values) // 10)
        return steps, running_mean(values, window)

    def final(self, metric: str) -> float:
        """The mean over the last tenth of the logged steps, or the last evaluation; NaN without any."""
        _, values = self.smooth(metric)
        return float(values[-1]) if len(values) else math.nan


@dataclass(frozen=True)
class RunGroup:
    """Runs whose settings differ in the seed alone, or a single run."""

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        first = self.runs[0].name
        if len(self.runs) == 1:
            return first
        seeds = ", ".join(str(run.settings.get("seed")) for run in self.runs)
        return f"{first} and {len(self.runs) - 1} more (seeds {seeds})"

    def curve(self, metric: str) -> Curve:
        """The mean of the runs' smoothed curves at the steps that all of them have."""
        series = [dict(zip(*map(np.ndarray.tolist, run.smooth(metric)), strict=True)) for run in self.runs]
        steps = sorted(set.intersection(*map(set, series)))
        found = [estimate([each[step] for each in series]) for step in steps]
        parts = [np.array([getattr(each, part) for each in found]) for part in ("mean", "low", "high")]
        return Curve(np.array(steps), *parts)

    def final(self, metric: str) -> Estimate:
        """The mean of the runs' final values; NaN where one of them has none."""
        return estimate([run.final(metric) for run in self.runs])

    def best(self, metric: str) -> tuple[float, int] | None:
        """The highest value of the curve and its step."""
        curve = self.curve(metric)
        if not len(curve.steps):
            return None
        place = int(np.argmax(curve.mean))
        return float(curve.mean[place]), int(curve.steps[place])


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs in these directories, each once. SettingError names the directories without a run."""
    folders: dict[Path, Path] = {}
    for path in paths:
        if folders.setdefault(path.resolve(), path) is not path:
            logger.warning("%s is given twice: it is shown once", path)
    empty = [path for path in folders.values() if not _rows(path)]
    if empty:
        raise SettingError("\n".join(f"{path} has no {METRICS} with a step in it: no run to compare" for path in empty))
    shared = Path(os.path.commonpath([folder.parent for folder in folders]))
    return [
        Run(
            path,
            folder.relative_to(shared).as_posix(),
            _rows(path),
            read_lines(path / EVALUATIONS),
            settings_of_run(path / SETTINGS),
        )
        for folder, path in folders.items()
    ]


def grouped(runs: Sequence[Run]) -> list[RunGroup]:
    """Group runs with equal settings but for the seed and those that have no effect on what is computed; a run without
    settings, or with the seed of another, stays alone."""
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups if run.settings else ():
            seeds = [other.settings.get("seed") for other in group]
            if run.settings.get("seed") not in seeds and _without_seed(group[0]) == _without_seed(run):
                group.append(run)
                break
        else:
            groups.append([run])
    return [RunGroup(tuple(group)) for group in groups]


def different_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the values, by run, of each setting in which runs differ. What a run has not written is None, and makes no
    difference; nor does the output directory."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "output_dir")
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    known = {name: [run.settings[name] for run in runs if name in run.settings] for name in names}
    return {name: values[name] for name in names if any(value != known[name][0] for value in known[name])}


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of values and its 95% t interval: mean +- t * s / sqrt(n)."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(mean)
    half = t_quantile(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)


def t_quantile(freedom: int) -> float:
    """Return the 0.975 quantile of Student's t: tabulated, then the Cornish-Fisher expansion."""
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in read_lines(path / METRICS) if "step" in row]


def _without_seed(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.settings.items() if name != "seed" and name not in RESUMABLE_CHANGES}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
