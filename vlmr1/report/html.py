"""Self-contained HTML pages from jinja2 templates, which escape all text; style and images are inside the file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vlmr1.data.boxes import Box

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Shape:
    """A rectangle over a picture, in pixels of the image, with a label at its upper left corner."""

    kind: str  # class in style.css: "true", "before" or "after"
    x: float
    y: float
    width: float
    height: float
    label: str = ""


def shapes(kind: str, boxes: Iterable[tuple[Box | None, str]]) -> list[Shape]:
    """Rectangles of boxes with labels, swapped corners put in order; boxes that cannot be drawn are left out."""
    drawn = []
    for box, label in boxes:
        if box is not None and all(map(isfinite, box)):
            (x1, x2), (y1, y2) = sorted((box[0], box[2])), sorted((box[1], box[3]))
            drawn.append(Shape(kind, x1, y1, x2 - x1, y2 - y1, label))
    return drawn


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package."""
    text = _environment().get_template(template).render(values)
    return text.encode(errors="replace").decode()  # half of a surrogate pair, which JSON may hold, has no bytes


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(FOLDER / "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["g"] = "{:g}".format
    made.globals["style"] = Markup((FOLDER / "style.css").read_text(encoding="utf-8"))
    return made
