"""The curves of a training run as one picture: lines by step, and stacked seconds by phase."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmr1.report import curves
from vlmr1.report.curves import new_figure, running_mean

COLUMNS = 3
COLORS = (*curves.COLORS, "#f0e442", "#444444")  # one for each phase, and the peak
# Title and metrics of each panel of lines; metrics that a run does not log are left out.
LINES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("KL to the reference, nats a token", ("kl",)),
    ("entropy, nats a token", ("entropy",)),
    ("share of clipped tokens", ("clip_low", "clip_high")),
    ("completion length, tokens", ("completion_length", "completion_length_max")),
    ("shares of groups and completions", ("zero_variance_groups", "truncated", "parse_failures", "box_failures")),
    ("gradient norm", ("grad_norm",)),
    ("completion tokens a second", ("tokens_per_second", "update/tokens_per_second")),
    ("GPU power, W", ("gpu/power_watts",)),
)
Rows = Sequence[Mapping[str, float]]


def run_curves(rows: Rows) -> bytes | None:
    """Return a PNG of the logged steps, or None where nothing was logged; each row has its "step".

    Each reward has a panel with its mean and a band of one standard deviation within groups. Then follow the panels of
    `LINES`, peak memory by phase, and stacked seconds by phase."""
    panels = _panels(rows)
    if not panels:
        return None
    height = -(-len(panels) // COLUMNS)
    figure, canvas = new_figure(4.6 * COLUMNS, 2.9 * height, dpi=100)
    for place, (title, kind, keys) in enumerate(panels):
        axes = figure.add_subplot(height, COLUMNS, place + 1)
        {"reward": _reward, "lines": _lines, "areas": _areas}[kind](axes, rows, keys)
        axes.set_title(title, loc="left", fontsize=10)
        axes.margins(x=0.01)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if kind != "reward" and len(keys) > 1:
            axes.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _panels(rows: Rows) -> list[tuple[str, str, tuple[str, ...]]]:
    """Title, kind and metrics of each panel of a run."""
    known = dict.fromkeys(key for row in rows for key in row)
    rewards = [k[8:-5] for k in known if k.startswith("rewards/") and k.endswith("/mean")]
    panels: list[tuple[str, str, tuple[str, ...]]] = [("reward, weighted sum", "lines", ("reward",))]
    if "mean_token_accuracy" in known:  # supervised
        panels = [("loss, nats a token", "lines", ("loss",))]
        panels.append(("share of most probable tokens", "lines", ("mean_token_accuracy",)))
    panels += [(f"{n} reward", "reward", (f"rewards/{n}/mean", f"rewards/{n}/std")) for n in rewards]
    panels += [(title, "lines", keys) for title, keys in LINES]
    panels.append(("peak memory by phase, MiB", "lines", tuple(k for k in known if k.startswith("memory/"))))
    panels.append(("seconds a step by phase", "areas", tuple(k for k in known if k.startswith("seconds/"))))
    there = [(title, kind, tuple(key for key in keys if key in known)) for title, kind, keys in panels]
    return [panel for panel in there if panel[2]]


def _series(rows: Rows, key: str) -> np.ndarray:
    """Values by step [T], NaN where missing."""
    return np.array([row.get(key, np.nan) for row in rows], dtype=float)


def _steps(rows: Rows) -> np.ndarray:
    return np.array([row["step"] for row in rows], dtype=float)


def _reward(axes: Any, rows: Rows, keys: tuple[str, ...]) -> None:
    mean, std = (_series(rows, key) for key in keys)
    axes.fill_between(_steps(rows), mean - std, mean + std, color=COLORS[0], alpha=0.15, linewidth=0)
    _line(axes, _steps(rows), mean, COLORS[0], None)


def _lines(axes: Any, rows: Rows, keys: tuple[str, ...]) -> None:
    for place, key in enumerate(keys):
        label = key.removeprefix("memory/").removesuffix("_mib")
        _line(axes, _steps(rows), _series(rows, key), COLORS[place % len(COLORS)], label)


def _line(axes: Any, steps: np.ndarray, values: np.ndarray, color: str, label: str | None) -> None:
    """Draw each step as a thin line, and the running mean over a tenth of the steps as a thick one."""
    there = np.isfinite(values)
    steps, values = steps[there], values[there]
    axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
    axes.plot(steps, running_mean(values, max(1, len(values) // 10)), color=color, linewidth=1.8, label=label)


def _areas(axes: Any, rows: Rows, keys: tuple[str, ...]) -> None:
    """Draw stacked areas; a phase that a step lacks counts as 0 seconds."""
    parts = [np.nan_to_num(_series(rows, key)) for key in keys]
    colors = [COLORS[place % len(COLORS)] for place in range(len(keys))]
    labels = [key.removeprefix("seconds/") for key in keys]
    axes.stackplot(_steps(rows), parts, labels=labels, colors=colors, alpha=0.8, linewidth=0)
