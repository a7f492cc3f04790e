"""The report of a training run: curves, and logged completions with their images and boxes, by step."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlmr1.data.boxes import Box, scale_box
from vlmr1.errors import SettingError
from vlmr1.report.html import box_svg, document
from vlmr1.report.panels import run_curves
from vlmr1.report.pictures import Picture, read_picture
from vlmr1.report.progress import COMPLETIONS, METRICS, read_lines
from vlmr1.rewards.answer import find_answer, labelled_boxes, predicted_box, solution_box, true_text

NAME = "training.html"
STEPS = 12  # with completions, at most: the first, the last, and others at equal distances
A_STEP = 6  # completions, at most
IMAGES = 4  # of a completion, at most
LEGEND = {"true": "box of the solution", "after": "box of the completion"}
NEAR_ZERO = (
    "The loss of GRPO starts near 0 and may stay there: the advantages of a group add up to 0, and the ratio of new "
    "and old policy is 1 at first. Its gradient is not 0; watch the rewards."
)


def write_run_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of the run in this directory, as far as it is; returns its path, by default training.html there.

    Images are inside the file, downscaled; it needs no network and no script. SettingError where there is no run."""
    rows = read_lines(run / METRICS)
    completions = read_lines(run / COMPLETIONS)
    if not rows and not completions:
        raise SettingError(f"{run} holds neither {METRICS} nor {COMPLETIONS} with a step in it: no run to report")
    title = f"Training run {run.resolve().name}"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="note">{escape(NEAR_ZERO)}</p>']
    curves = run_curves(rows)
    if curves is not None:
        uri = f"data:image/png;base64,{b64encode(curves).decode()}"
        body += [
            f"<h2>{len(rows)} logged steps, {int(rows[0]['step'])} to {int(rows[-1]['step'])}</h2>",
            f'<img class="curve" alt="rewards, KL, entropy, clipping, length, memory and seconds by step" src="{uri}">',
            f"<h2>Step {int(rows[-1]['step'])}</h2>",
            f"<details><summary>{len(rows[-1])} metrics</summary>{_table(rows[-1])}</details>",
        ]
    body += _completions(run, completions)
    settings = run / "settings.json"
    if settings.exists():
        values = json.loads(settings.read_text(encoding="utf-8"))
        body += ["<h2>Settings</h2>", f"<details><summary>{len(values)} settings</summary>{_table(values)}</details>"]
    path = run / NAME if out is None else out
    path.write_text(document(title, body), encoding="utf-8")
    return path


def chosen_steps(steps: Sequence[int], count: int = STEPS) -> list[int]:
    """At most `count` of these, in order: the first, the last, and others at equal distances."""
    if len(steps) <= count:
        return list(steps)
    places = [round(i * (len(steps) - 1) / (count - 1)) for i in range(count)]
    return [steps[place] for place in places]


def _completions(run: Path, records: Sequence[dict[str, Any]]) -> list[str]:
    steps = list(dict.fromkeys(record["step"] for record in records))
    if not steps:
        return []
    samples = (
        f'<span><svg viewBox="0 0 26 14"><rect class="{kind}" x="2" y="2" width="22" height="10"/></svg>{text}</span>'
        for kind, text in LEGEND.items()
    )
    shown = chosen_steps(steps)
    body = [
        f"<h2>Completions of {len(shown)} of {len(steps)} steps</h2>",
        f'<div class="legend">{"".join(samples)}</div>',
    ]
    for step in shown:
        cards = [_card(run, record) for record in records if record["step"] == step][:A_STEP]
        body.append(f'<h3>Step {step}</h3><div class="cards">{"".join(cards)}</div>')
    return body


def _card(run: Path, record: Mapping[str, Any]) -> str:
    rewards = ", ".join(f"{value:.3g}" for value in record["rewards"])
    facts = f"rewards {rewards} &middot; advantage {record['advantage']:+.2f} &middot; {escape(record['source'])}"
    if record["finish_reason"] == "length":
        facts += " &middot; cut at the length limit"
    if record["timed_out"]:
        facts += f" &middot; timed out: {escape(', '.join(record['timed_out']))}"
    return (
        f'<article class="card">{_pictures(run, record)}<div class="words"><p class="iou">{facts}</p>'
        f"<pre>{escape(record['completion'])}</pre>"
        f"<details><summary>Solution</summary><pre>{escape(record['solution'])}</pre></details></div></article>"
    )


def _pictures(run: Path, record: Mapping[str, Any]) -> str:
    """The images of a row; boxes are on it where it has one only."""
    kept = record.get("pictures") or [None] * len(record["images"])
    parts = []
    for name, copy in list(zip(record["images"], kept, strict=True))[:IMAGES]:
        picture = read_picture(Path(name)) if copy is None else read_picture(run / copy["file"], tuple(copy["size"]))
        if picture is None:
            parts.append(f'<p class="missing">no image that can be read: {escape(name)}</p>')
        else:
            parts.append(_picture(picture, record if len(record["images"]) == 1 else None))
    return "".join(parts)


def _picture(picture: Picture, record: Mapping[str, Any] | None) -> str:
    crisp = ' class="crisp"' if picture.crisp else ""
    drawn = ""
    if record is not None:
        scale = record.get("box_scale")
        boxes = [("true", box) for box in true_boxes(record["solution"])]
        boxes += [("after", scale_box(box, scale)) for box in completion_boxes(record["completion"])]
        width, height = picture.size
        drawn = f'<svg viewBox="0 0 {width} {height}">{"".join(box_svg(*box) for box in boxes)}</svg>' if boxes else ""
    return f'<div class="picture"><img{crisp} alt="" src="{picture.uri}">{drawn}</div>'


def completion_boxes(text: str) -> list[Box]:
    """The boxes that a completion answers: the only one, or those of a list with labels."""
    return _boxes(predicted_box(text), find_answer(text))


def true_boxes(solution: str) -> list[Box]:
    """The boxes of a solution; none where it is about something else."""
    return _boxes(solution_box(solution), true_text(solution))


def _boxes(single: Box | None, text: str | None) -> list[Box]:
    if single is not None:
        return [single]
    return [box for _, box in (labelled_boxes(text) or []) if box is not None] if text else []


def _table(values: Mapping[str, Any]) -> str:
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(_text(value))}</td></tr>" for name, value in values.items())
    return f'<table class="settings"><tbody>{"".join(lines)}</tbody></table>'


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else str(value)
