"""The page that compares runs: curves over one another, settings that differ, final and best values."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmr1.errors import SettingError
from vlmr1.lifecycle.disk import guard_writes
from vlmr1.report.curves import COLORS, new_figure
from vlmr1.report.html import render
from vlmr1.report.pictures import data_uri
from vlmr1.report.run_groups import Estimate, RunGroup, different_settings, grouped, read_runs

NAME = "comparison.html"
COLUMNS = 3
DASHES = ("-", "--", ":", "-.")  # of groups that share a color
# Metrics beside rewards and evaluations, and their titles.
TITLES = {
    "loss": "loss",
    "mean_token_accuracy": "token accuracy",
    "kl": "KL to the reference, nats a token",
    "entropy": "entropy, nats a token",
    "completion_length": "completion length, tokens",
    "zero_variance_groups": "groups without signal, share",
    "truncated": "truncated completions, share",
    "parse_failures": "completions without an answer, share",
    "grad_norm": "gradient norm",
    "tokens_per_second": "completion tokens a second",
    "memory/peak_mib": "peak memory, MiB",
}
NO_BEST = ("completion_length", "truncated", "loss", "entropy")  # of evaluations


def write_comparison(paths: Sequence[Path], out: Path) -> Path:
    """Write one page of several runs, finished or not, and return its path. SettingError names what is no run."""
    runs = read_runs(paths)
    groups = grouped(runs)
    metrics = _metrics(groups)
    if not metrics:
        raise SettingError("no metric of these runs has a finite value: nothing to compare")
    names = [run.name for run in runs]
    different = different_settings(runs)
    text = render(
        "comparison.html",
        title=f"{len(runs)} runs",
        runs=[(run.name, run.progress, str(run.path)) for run in runs],
        unknown=[run.name for run in runs if not run.settings],
        grouped=any(len(group.runs) > 1 for group in groups),
        curves=data_uri(draw(groups, metrics), "image/png"),
        names=names,
        settings=[(name, *map(_setting, values)) for name, values in different.items()],
        groups=[group.name for group in groups],
        values=[(title, *(_cell(group, metric) for group in groups)) for metric, title in metrics.items()],
    )
    with guard_writes(out.name, out.parent):
        out.write_text(text, encoding="utf-8")
    return out


def _metrics(groups: Sequence[RunGroup]) -> dict[str, str]:
    """Title of each metric that is shown, in order: rewards, evaluations, others."""
    known = dict.fromkeys(name for group in groups for run in group.runs for name in run.metrics)
    rewards = {k: f"{k[8:-5]} reward" for k in known if k.startswith("rewards/") and k.endswith("/mean")}
    shown = {"reward": "reward, weighted sum", **rewards}
    for name in (k for k in known if k.startswith("eval/")):
        parts = name.split("/")
        shown[name] = f"evaluation: {f'{parts[2]} reward' if parts[1] == 'rewards' else '/'.join(parts[1:])}"
    shown |= {k: title for k, title in TITLES.items() if k != "loss" or "reward" not in known}
    return {name: title for name, title in shown.items() if name in known}


def draw(groups: Sequence[RunGroup], metrics: dict[str, str]) -> bytes:
    """Return a PNG with a panel a metric and a color a group. Each run of several seeds is a thin line, their mean a
    thick one with its interval as a band. A metric that is the same everywhere has no panel."""
    series = {k: np.concatenate([run.series(k)[1] for group in groups for run in group.runs]) for k in metrics}
    metrics = {k: title for k, title in metrics.items() if np.ptp(series[k]) > 0} or metrics
    height = -(-len(metrics) // COLUMNS)
    figure, canvas = new_figure(4.6 * COLUMNS, 2.9 * height + 0.3 * len(groups), dpi=100)
    for place, (metric, title) in enumerate(metrics.items()):
        axes = figure.add_subplot(height, COLUMNS, place + 1)
        for number, group in enumerate(groups):
            look: dict[str, Any] = {"color": COLORS[number % len(COLORS)]}
            look["linestyle"] = DASHES[number // len(COLORS) % len(DASHES)]
            if metric.startswith("eval/"):
                look |= {"marker": ".", "markersize": 5}
            if len(group.runs) > 1:
                thin: dict[str, Any] = look | {"linewidth": 0.7, "alpha": 0.35}
                for run in group.runs:
                    axes.plot(*run.smooth(metric), **thin)
            curve = group.curve(metric)
            axes.fill_between(curve.steps, curve.low, curve.high, color=look["color"], alpha=0.15, linewidth=0)
            axes.plot(curve.steps, curve.mean, **look, linewidth=1.8, label=group.name)
        _zoom(axes, series[metric])
        axes.set_title(title, loc="left", fontsize=10)
        axes.margins(x=0.01)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", fontsize=9, frameon=False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _zoom(axes: Any, values: np.ndarray) -> None:
    """Limit the axis to the runs' values: the interval of two seeds may be far wider."""
    low, high = values.min(), values.max()
    room = 0.05 * (high - low) or 1.0
    axes.set_ylim(low - room, high + room)


def _cell(group: RunGroup, metric: str) -> tuple[str, str]:
    """Final and best value as text; the best where a higher one is better."""
    final, best = group.final(metric), group.best(metric)
    better = "reward" in metric or (metric.startswith("eval/") and not metric.endswith(NO_BEST))
    if best is None or math.isnan(final.mean):
        return "-", ""
    return _estimate(final), f"best {best[0]:.4g}, step {best[1]}" if better else ""


def _estimate(value: Estimate) -> str:
    interval = "" if math.isnan(value.low) else f" ({value.low:.4g} to {value.high:.4g})"
    return f"{value.mean:.4g}{interval}"


def _setting(value: Any) -> str:
    return "-" if value is None else str(value)
