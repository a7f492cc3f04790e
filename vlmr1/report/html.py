"""One self-contained HTML file: before and after, the curve, boxes on held-out images, settings."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from PIL import Image

from vlmr1.data.boxes import Box

STYLE = Path(__file__).with_name("style.css")
CRISP_BELOW = 256  # px; a smaller image is shown enlarged, its pixels left visible
LEGEND = {"true": "true box", "before": "predicted before training", "after": "predicted after training"}


@dataclass(frozen=True)
class Example:
    """One held-out question with the model's answers before and after; a box that was not given is None."""

    image: Path
    question: str
    true_box: Box
    box_before: Box | None
    box_after: Box | None
    iou_before: float
    iou_after: float
    text_before: str
    text_after: str


def write_report(
    path: Path,
    *,
    title: str,
    summary_rows: Sequence[tuple[str, str, str]],
    curve_png: Path,
    examples: Sequence[Example],
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Path:
    """Write the report; images and style are inside the file, which needs no network and no script.

    Args:
        summary_rows: (name, before, after), as they should be shown.
        curve_png: the picture that `reward_curve` made.
        notes: paragraphs under the title.
    """
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        "<h2>Before and after</h2>",
        _summary(summary_rows),
        "<h2>Training</h2>",
        f'<img class="curve" alt="rewards, KL and completion length by step" src="{data_uri(curve_png)}">',
        f"<h2>Held-out images ({len(examples)})</h2>",
        _legend(),
        f'<div class="cards">{"".join(map(_card, examples))}</div>',
        "<h2>Settings</h2>",
        f"<details><summary>{len(settings)} settings</summary>{_settings(settings)}</details>",
    ]
    path.write_text(document(title, body), encoding="utf-8")
    return path


def document(title: str, body: Sequence[str]) -> str:
    """A whole page with the style inside; `body` is HTML, `title` text."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style>"
    )
    text = "\n".join(body)
    page = f'<html lang="en"><head>{head}</head><body><main>\n{text}\n</main></body></html>'
    # Half of a surrogate pair, which JSON may hold, has no bytes.
    return f"<!doctype html>\n{page}\n".encode(errors="replace").decode()


def data_uri(path: Path) -> str:
    """The image file, byte for byte, as a data URI."""
    with Image.open(path) as image:
        kind = image.get_format_mimetype()
    return f"data:{kind};base64,{b64encode(path.read_bytes()).decode()}"


def _summary(rows: Sequence[tuple[str, str, str]]) -> str:
    head = "<thead><tr><th></th><th>before</th><th>after</th></tr></thead>"
    lines = (
        f"<tr><th>{escape(name)}</th><td>{escape(before)}</td><td>{escape(after)}</td></tr>"
        for name, before, after in rows
    )
    return f'<table class="summary">{head}<tbody>{"".join(lines)}</tbody></table>'


def _settings(settings: Mapping[str, Any]) -> str:
    lines = (f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in settings.items())
    return f'<table class="settings"><tbody>{"".join(lines)}</tbody></table>'


def _legend() -> str:
    place = 'x="2" y="2" width="22" height="10"'
    samples = (
        f'<span><svg viewBox="0 0 26 14"><rect class="{kind}" {place}/></svg>{text}</span>'
        for kind, text in LEGEND.items()
    )
    return f'<div class="legend">{"".join(samples)}</div>'


def _card(example: Example) -> str:
    with Image.open(example.image) as image:
        width, height = image.size
    crisp = ' class="crisp"' if max(width, height) < CRISP_BELOW else ""
    boxes = {"true": example.true_box, "before": example.box_before, "after": example.box_after}
    drawn = "".join(box_svg(kind, box) for kind, box in boxes.items())
    before = _iou(example.box_before, example.iou_before)
    after = _iou(example.box_after, example.iou_after)
    return (
        '<article class="card"><div class="picture">'
        f'<img{crisp} alt="" src="{data_uri(example.image)}">'
        f'<svg viewBox="0 0 {width} {height}">{drawn}</svg></div>'
        f'<div class="words"><p class="question">{escape(example.question)}</p>'
        f'<p class="iou">IoU <span class="before">{before}</span> &rarr; '
        f'<span class="after">{after}</span></p>'
        f"<details><summary>Completions</summary><h3>Before</h3><pre>{escape(example.text_before)}</pre>"
        f"<h3>After</h3><pre>{escape(example.text_after)}</pre></details></div></article>"
    )


def _iou(box: Box | None, iou: float) -> str:
    return f"{iou:.2f}" if box is not None else f"{iou:.2f} (no box)"


def box_svg(kind: str, box: Box | None) -> str:
    """The box as an SVG rectangle over a light halo; corners that a model swapped are put in order."""
    if box is None or not all(map(isfinite, box)):
        return ""
    x1, x2 = sorted((box[0], box[2]))
    y1, y2 = sorted((box[1], box[3]))
    place = f'x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}"'
    return f'<rect class="halo" {place}/><rect class="{kind}" {place}/>'
