"""Texts of the embedded data set: the question, a short thought, and a box with the errors of an annotator.

The GRPO reward knows the exact box, so the policy can still learn what the labels lack.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from vlmr1.data.templates import REC_QUESTION

STEP = 14  # px; all coordinates are multiples of it
QUESTION = "Locate the digit {label}."
JITTER = {-1: 0.25, 0: 0.5, 1: 0.25}  # in steps: the errors of every edge in the first stage of supervision
STYLES = {"loose": 0.65, "cut": 0.10, "exact": 0.25}  # of sloppy labels, one a box

ROWS = ("upper", "middle", "lower")
COLUMNS = ("left", "center", "right")

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in px


@dataclass(frozen=True)
class Canvas:
    pixels: np.ndarray  # [H, W, 3] uint8
    boxes: tuple[Box, ...]
    labels: tuple[int, ...]  # distinct on one canvas


def jittered(canvas: Canvas, which: int, rng: np.random.Generator) -> Box:
    """Jitter the box of one digit, inside the canvas: half of its edges are off by a step."""
    return _moved(canvas, which, rng.choice(list(JITTER), size=4, p=list(JITTER.values())))


def sloppy(canvas: Canvas, which: int, rng: np.random.Generator) -> Box:
    """Label one digit hastily: all edges a step outside (clipped to the canvas), one edge a step inside, or exact."""
    style = rng.choice(list(STYLES), p=list(STYLES.values()))
    outwards = np.array([-1, -1, 1, 1])
    if style == "exact":
        return canvas.boxes[which]
    return _moved(canvas, which, outwards if style == "loose" else -outwards * (np.arange(4) == rng.integers(4)))


def exact(canvas: Canvas, which: int, rng: np.random.Generator) -> Box:
    """Return the true box; the signature is that of the other labels."""
    return canvas.boxes[which]


def _moved(canvas: Canvas, which: int, steps: np.ndarray) -> Box:
    edges = np.clip(np.array(canvas.boxes[which]) + steps * STEP, 0, canvas.pixels.shape[0])
    x1, y1, x2, y2 = (int(edge) for edge in edges)
    return x1, y1, x2, y2


def question(label: int) -> str:
    return QUESTION.format(label=label)


def answer(box: Box, label: int) -> str:
    return json.dumps({"bbox_2d": list(box), "label": str(label)})


def prompt_text(label: int) -> str:
    return REC_QUESTION.format(question=question(label))


def completion_text(canvas: Canvas, which: int, box: Box) -> str:
    """Return a short thought, which lists the digits in reading order, and the answer."""
    size = canvas.pixels.shape[0]
    seen = sorted((*_cell(seen_at, size), label) for seen_at, label in zip(canvas.boxes, canvas.labels, strict=True))
    thought = ", ".join(f"{ROWS[row]} {COLUMNS[column]} {label}" for row, column, label in seen)
    return f"<think>\nI see {thought}.\n</think>\n<answer>\n{answer(box, canvas.labels[which])}\n</answer>"


def _cell(box: Box, size: int) -> tuple[int, int]:
    """Row and column, each 0 to 2, of a box's center."""
    x1, y1, x2, y2 = box
    return min(2, 3 * (y1 + y2) // (2 * size)), min(2, 3 * (x1 + x2) // (2 * size))
