"""The report of a training run: curves, and logged completions with their images and boxes, by step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmr1.data.boxes import Box, scale_box
from vlmr1.errors import SettingError
from vlmr1.lifecycle.disk import guard_writes
from vlmr1.report.html import Shape, render, shapes
from vlmr1.report.panels import run_curves
from vlmr1.report.pass_rates import histogram, read_pass_rates
from vlmr1.report.pictures import Picture, data_uri, read_picture
from vlmr1.report.progress import COMPLETIONS, METRICS, read_lines
from vlmr1.rewards.answer import box_text, labelled_boxes, predicted_box, solution_box, true_text

NAME = "training.html"
STEPS = 12  # maximum steps with completions: the first, the last, and others at equal distances
A_STEP = 6  # maximum completions of a step
IMAGES = 4  # maximum images of a completion
LEGEND = {"true": "box of the solution", "after": "box of the completion"}


def write_run_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of the run in this directory, finished or not; return its path, by default training.html there.

    Images are inside the file, downscaled. SettingError where there is no run."""
    rows = read_lines(run / METRICS)
    records = read_lines(run / COMPLETIONS)
    if not rows and not records:
        raise SettingError(f"{run} holds neither {METRICS} nor {COMPLETIONS} with a step in it: no run to report")
    steps = list(dict.fromkeys(record["step"] for record in records))
    curves = run_curves(rows)
    settings = run / "settings.json"
    text = render(
        "training.html",
        title=f"Training run {run.resolve().name}",
        rows=rows,
        curves=None if curves is None else data_uri(curves, "image/png"),
        last=_texts(rows[-1]) if rows else [],
        histogram=histogram(read_pass_rates(run)),
        legend=LEGEND,
        step_count=len(steps),
        steps={step: _cards(run, records, step) for step in chosen_steps(steps)},
        settings=_texts(json.loads(settings.read_text(encoding="utf-8"))) if settings.exists() else [],
    )
    path = run / NAME if out is None else out
    with guard_writes(path.name, path.parent):
        path.write_text(text, encoding="utf-8")
    return path


def chosen_steps(steps: Sequence[int], count: int = STEPS) -> list[int]:
    """Return at most `count` steps in order: the first, the last, and others at equal distances."""
    if len(steps) <= count:
        return list(steps)
    places = [round(i * (len(steps) - 1) / (count - 1)) for i in range(count)]
    return [steps[place] for place in places]


def _cards(run: Path, records: Sequence[dict[str, Any]], step: int) -> list[tuple[list[Picture | str], dict[str, Any]]]:
    """The first completions of a step, each with its pictures."""
    return [(_pictures(run, record), record) for record in records if record["step"] == step][:A_STEP]


def _pictures(run: Path, record: Mapping[str, Any]) -> list[Picture | str]:
    """The images of a row, the name in place of one that cannot be read; boxes are drawn on a single image only."""
    kept = record.get("pictures") or [None] * len(record["images"])
    pictures: list[Picture | str] = []
    for name, copy in list(zip(record["images"], kept, strict=True))[:IMAGES]:
        picture = read_picture(Path(name)) if copy is None else read_picture(run / copy["file"], tuple(copy["size"]))
        if picture is None:
            pictures.append(name)
        elif len(record["images"]) == 1:
            pictures.append(replace(picture, shapes=tuple(_shapes(record))))
        else:
            pictures.append(picture)
    return pictures


def _shapes(record: Mapping[str, Any]) -> list[Shape]:
    scale = record.get("box_scale")
    predicted = [scale_box(box, scale) for box in completion_boxes(record["completion"])]
    drawn = shapes("true", [(box, "") for box in true_boxes(record["solution"])])
    return drawn + shapes("after", [(box, "") for box in predicted])


def completion_boxes(text: str) -> list[Box]:
    """Return the boxes of a completion's answer: a single box, or a list with labels."""
    return _boxes(predicted_box(text), box_text(text))


def true_boxes(solution: str) -> list[Box]:
    """Return the boxes of a solution; [] for other solutions."""
    return _boxes(solution_box(solution), true_text(solution))


def _boxes(single: Box | None, text: str | None) -> list[Box]:
    if single is not None:
        return [single]
    return [box for _, box in (labelled_boxes(text) or []) if box is not None] if text else []


def _texts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as they are shown."""
    return [(name, f"{value:.6g}" if _is_finite(value) else str(value)) for name, value in values.items()]


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)
