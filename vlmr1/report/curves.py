"""The reward curve: rewards, KL and completion length by step, as one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmr1.errors import import_for

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
LABELS = {
    "reward": "reward (weighted sum)",
    "kl": "KL to the reference (nats per token)",
    "completion_length": "completion length (tokens)",
}


def new_figure(width: float, height: float, dpi: int) -> tuple[Any, Any]:
    """Return an empty figure of a size in inches, and its canvas. SettingError without matplotlib."""
    library = import_for("a picture of curves", "matplotlib.figure", "matplotlib")
    agg = import_for("a picture of curves", "matplotlib.backends.backend_agg", "matplotlib")
    figure = library.Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    return figure, agg.FigureCanvasAgg(figure)


def reward_curve(history: Sequence[Mapping[str, float]], path: Path, *, window: int | None = None) -> Path:
    """Write one panel each for the rewards, the KL and the completion length: each step thin, a
    running mean thick, with its 95% interval.

    Args:
        history: logged values, one mapping a step with its "step"; a key may be missing in some steps.
        path: the PNG to write.
        window: steps in the running mean, by default a tenth of them.

    Raises:
        ValueError: no step holds any of the keys.
    """
    keys = [*_reward_keys(history), "kl", "completion_length"]
    panels = {key: series for key in keys if len((series := _series(history, key))[0])}
    if "kl" in panels and not panels["kl"][1].any():  # a run with beta 0 has none
        del panels["kl"]
    if not panels:
        raise ValueError(f"nothing to draw: no step of the history holds any of {keys}")

    columns = min(2 if len(panels) <= 4 else 3, len(panels))
    rows = -(-len(panels) // columns)
    figure, canvas = new_figure(4.6 * columns, 3.1 * rows, dpi=120)
    for place, (key, (steps, values)) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        color = COLORS[place % len(COLORS)]
        span = window or max(1, len(values) // 10)
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.4, label="each step")
        smooth, error = running_mean(values, span), running_error(values, span)
        axes.fill_between(steps, smooth - error, smooth + error, color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, smooth, color=color, linewidth=2.2, label=f"mean of {span} steps, 95% interval")
        axes.set_title(_label(key), loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel(key)
        axes.margins(x=0.01)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    canvas.print_png(str(path))
    return path


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the last `window` values at each place, fewer at the start; NaN values are skipped."""
    valid = np.isfinite(values)
    total = np.cumsum(np.concatenate([[0.0], np.where(valid, values, 0.0)]))
    count = np.cumsum(np.concatenate([[0], valid]))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    counted = count[stop] - count[start]
    return np.where(counted > 0, (total[stop] - total[start]) / np.maximum(counted, 1), np.nan)


def running_error(values: np.ndarray, window: int) -> np.ndarray:
    """Return 1.96 standard errors of the running mean, from the spread of its steps; 0 for a single step."""
    mean, square = running_mean(values, window), running_mean(values**2, window)
    valid = np.isfinite(values)
    count = np.convolve(valid, np.ones(window))[: len(values)]
    variance = np.maximum(square - mean**2, 0) / np.maximum(count - 1, 1)
    return 1.96 * np.sqrt(variance)


def _reward_keys(history: Sequence[Mapping[str, float]]) -> list[str]:
    keys = dict.fromkeys(key for row in history for key in row)
    return [k for k in keys if k == "reward" or (k.startswith("rewards/") and not k.endswith("/std"))]


def _label(key: str) -> str:
    if key.startswith("rewards/"):
        return key.removeprefix("rewards/").removesuffix("/mean") + " reward"
    return LABELS.get(key, key)


def _series(history: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[key]) for row in history if key in row]
    array = np.array(points, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]
