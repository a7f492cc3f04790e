"""One self-contained HTML file: the best and the worst cases of an evaluation, with boxes on the images."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path

from vlmr1.data.images import open_image, upright_size
from vlmr1.report.html import CRISP_BELOW, Box, box_svg, document
from vlmr1.report.pictures import encoded
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


def write_cases(
    path: Path, *, title: str, rows: Sequence[tuple[str, str, str]], cases: Sequence[Case], count: int
) -> Path:
    """Write the page: a table of (metric, value, interval), then up to `count` worst and as many best cases.

    Images and style are inside the file, which needs no network and no script."""
    worst, best = choose(cases, count)
    body = [f"<h1>{escape(title)}</h1>", _table(rows)]
    for heading, chosen in (("Worst", worst), ("Best", best)):
        if chosen:
            body.append(f"<h2>{heading} ({len(chosen)} of {len(cases)})</h2>")
            if any(case.true or case.predicted for case in chosen):
                body.append(_legend())
            body.append(f'<div class="cards">{"".join(map(_card, chosen))}</div>')
    path.write_text(document(title, body), encoding="utf-8")
    return path


def choose(cases: Sequence[Case], count: int) -> tuple[list[Case], list[Case]]:
    """The worst and the best cases, at most `count` of each and none twice; of equal ones the first in the data."""
    order = sorted(range(len(cases)), key=lambda i: (cases[i].score, i))
    worst = order[: min(count, (len(order) + 1) // 2)]
    best = sorted(set(order) - set(worst), key=lambda i: (-cases[i].score, i))[:count]
    return [cases[i] for i in worst], [cases[i] for i in best]


def picture(image: ImageRef, source: str) -> tuple[str, tuple[int, int]]:
    """An image as a data URI, made smaller where it is large, and its size there."""
    pixels = open_image(image, source)
    data, kind = encoded(pixels)
    return f"data:image/{kind};base64,{b64encode(data).decode()}", pixels.size


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    head = "<thead><tr><th></th><th>value</th><th>95% interval</th></tr></thead>"
    lines = (f"<tr><th>{escape(n)}</th><td>{escape(v)}</td><td>{escape(i)}</td></tr>" for n, v, i in rows)
    return f'<table class="summary">{head}<tbody>{"".join(lines)}</tbody></table>'


def _legend() -> str:
    samples = (
        f'<span><svg viewBox="0 0 26 14"><rect class="{kind}" x="2" y="2" width="22" height="10"/></svg>{text}</span>'
        for kind, text in LEGEND.items()
    )
    return f'<div class="legend">{"".join(samples)}</div>'


def _card(case: Case) -> str:
    sample = case.sample
    answer = f'<p class="iou">Solution: {escape(case.solution)}</p>' if case.solution else ""
    return (
        f'<article class="card">{_pictures(case)}<div class="words">'
        f'<p class="question">{escape(question_of(sample))}</p>'
        f'<p class="iou">Score <span class="after">{case.score:.2f}</span> &middot; {escape(sample.source)}</p>{answer}'
        f"<details><summary>Completion</summary><pre>{escape(case.completion)}</pre></details></div></article>"
    )


def _pictures(case: Case) -> str:
    """All images of a row, boxes on the first."""
    parts = []
    for place, image in enumerate(case.sample.images):
        uri, size = picture(image, case.sample.source)
        crisp = ' class="crisp"' if max(size) < CRISP_BELOW else ""
        drawn = _boxes(case, image) if place == 0 else ""
        parts.append(f'<div class="picture"><img{crisp} alt="" src="{uri}">{drawn}</div>')
    return "".join(parts)


def _boxes(case: Case, image: ImageRef) -> str:
    """Boxes with labels, in an SVG whose unit is a pixel of the upright file."""
    if not case.true and not case.predicted:
        return ""
    width, height = upright_size(image, case.sample.source)
    parts = []
    for kind, boxes in (("true", case.true), ("after", case.predicted)):
        for each in boxes:
            parts.append(box_svg(kind, each.box) + _label(kind, each, height))
    return f'<svg viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'


def _label(kind: str, each: LabelledBox, height: int) -> str:
    """The label at the box's upper left corner; that of a predicted box inside, so that both can be read."""
    if not each.label or not all(map(isfinite, each.box)):
        return ""
    size = max(4.0, height / 24)
    x, y = min(each.box[0], each.box[2]), min(each.box[1], each.box[3])
    y = y - size / 4 if kind == "true" else y + size
    return f'<text class="{kind}" x="{x:g}" y="{max(size, y):g}" font-size="{size:g}">{escape(each.label)}</text>'


def question_of(sample: Sample) -> str:
    """What the last user turn says."""
    return " ".join(part["text"] for part in sample.messages[-1]["content"] if part["type"] == "text")
