"""The report of `vlmr1 demo`: figures before and after, the curve, boxes on held-out images, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmr1.data.boxes import Box
from vlmr1.report.html import render, shapes
from vlmr1.report.pictures import CRISP_BELOW, Picture, data_uri

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
    summary_head: Sequence[str],
    summary_rows: Sequence[Sequence[str]],
    curve_png: Path,
    examples: Sequence[Example],
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Path:
    """Write the report as one HTML file and return its path.

    Args:
        summary_head: names of the columns.
        summary_rows: a metric's name and a value for each column, as they should be shown.
        curve_png: the picture that `reward_curve` made.
        notes: paragraphs under the title.
    """
    text = render(
        "demo.html",
        title=title,
        notes=notes,
        summary_head=summary_head,
        summary=summary_rows,
        curve=file_uri(curve_png),
        legend=LEGEND,
        examples=[(picture_of(example), example) for example in examples],
        settings=settings,
    )
    path.write_text(text, encoding="utf-8")
    return path


def picture_of(example: Example) -> Picture:
    """The image of an example with its three boxes."""
    with Image.open(example.image) as image:
        size = image.size
    boxes = {"true": example.true_box, "before": example.box_before, "after": example.box_after}
    drawn = tuple(shape for kind, box in boxes.items() for shape in shapes(kind, [(box, "")]))
    return Picture(file_uri(example.image), size, max(size) < CRISP_BELOW, drawn)


def file_uri(path: Path) -> str:
    """The image file, byte for byte, as a data URI."""
    with Image.open(path) as image:
        kind = image.get_format_mimetype()
    return data_uri(path.read_bytes(), str(kind))
