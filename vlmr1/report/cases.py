"""The page of an evaluation: its metrics, and its best and worst cases with boxes on the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlmr1.data.boxes import Box
from vlmr1.data.images import open_image, upright_size
from vlmr1.report.html import render, shapes
from vlmr1.report.pass_rates import Bar
from vlmr1.report.pictures import CRISP_BELOW, Picture, data_uri, encoded
from vlmr1.types import ImageRef, Sample

LEGEND = {"true": "true box", "after": "predicted box"}


@dataclass(frozen=True)
class LabelledBox:
    label: str
    box: Box  # px of the upright file


@dataclass(frozen=True)
class Case:
    """One row with its completion. Boxes are on its first image; without boxes the solution is shown."""

    sample: Sample
    completion: str
    score: float
    true: tuple[LabelledBox, ...] = ()
    predicted: tuple[LabelledBox, ...] = ()
    solution: str = ""

    @property
    def has_boxes(self) -> bool:
        return bool(self.true or self.predicted)

    @property
    def question(self) -> str:
        """Text of the last user turn."""
        return " ".join(part["text"] for part in self.sample.messages[-1]["content"] if part["type"] == "text")

    def pictures(self) -> list[Picture]:
        """All images of the row, with boxes on the first."""
        images, source = self.sample.images, self.sample.source
        made = [picture(image, source) for image in images]
        if made and self.has_boxes:
            drawn = shapes("true", [(each.box, each.label) for each in self.true])
            drawn += shapes("after", [(each.box, each.label) for each in self.predicted])
            made[0] = replace(made[0], size=upright_size(images[0], source), shapes=tuple(drawn))
        return made


def write_cases(
    path: Path,
    *,
    title: str,
    rows: Sequence[tuple[str, str, str]],
    cases: Sequence[Case],
    count: int,
    histogram: Sequence[Bar] = (),
) -> Path:
    """Write the page and return its path: a table of (metric, value, interval), the histogram of pass rates if there is
    one, then up to `count` worst and as many best cases."""
    worst, best = choose(cases, count)
    sections = {"Worst": worst, "Best": best}
    values = {"sections": sections, "count": len(cases), "legend": LEGEND, "histogram": histogram}
    text = render("cases.html", title=title, rows=rows, **values)
    path.write_text(text, encoding="utf-8")
    return path


def choose(cases: Sequence[Case], count: int) -> tuple[list[Case], list[Case]]:
    """Return the worst and the best cases, at most `count` of each and none twice; ties by order of the data."""
    order = sorted(range(len(cases)), key=lambda i: (cases[i].score, i))
    worst = order[: min(count, (len(order) + 1) // 2)]
    best = sorted(set(order) - set(worst), key=lambda i: (-cases[i].score, i))[:count]
    return [cases[i] for i in worst], [cases[i] for i in best]


def picture(image: ImageRef, source: str) -> Picture:
    """Return an image of a row, downscaled where it is large."""
    pixels = open_image(image, source)
    data, kind = encoded(pixels)  # makes `pixels` smaller
    return Picture(data_uri(data, f"image/{kind}"), pixels.size, max(pixels.size) < CRISP_BELOW)
