"""Texts of supervised training: the question, a short thought, and a box with the errors of an annotator.

Every second edge of a supervised box is off by 14 px. The GRPO reward knows the exact box, so the policy can still
learn the difference.
"""

from __future__ import annotations

import numpy as np

from vlmr1.data.templates import REC_QUESTION
from vlmr1.tiny import digits

JITTER = {-1: 0.25, 0: 0.5, 1: 0.25}  # in steps of 14 px

ROWS = ("upper", "middle", "lower")
COLUMNS = ("left", "center", "right")


def jittered(canvas: digits.Canvas, which: int, rng: np.random.Generator) -> digits.Box:
    """Jitter the box of one digit, inside the canvas."""
    off = rng.choice(list(JITTER), size=4, p=list(JITTER.values())) * digits.STEP
    edges = np.clip(np.array(canvas.boxes[which]) + off, 0, canvas.pixels.shape[0])
    x1, y1, x2, y2 = (int(edge) for edge in edges)
    return x1, y1, x2, y2


def prompt_text(label: int) -> str:
    return REC_QUESTION.format(question=digits.question(label))


def completion_text(canvas: digits.Canvas, which: int, box: digits.Box) -> str:
    """Return a short thought, which lists the digits in reading order, and the answer."""
    size = canvas.pixels.shape[0]
    seen = sorted((*_cell(seen_at, size), label) for seen_at, label in zip(canvas.boxes, canvas.labels, strict=True))
    thought = ", ".join(f"{ROWS[row]} {COLUMNS[column]} {label}" for row, column, label in seen)
    answer = digits.answer(box, canvas.labels[which])
    return f"<think>\nI see {thought}.\n</think>\n<answer>\n{answer}\n</answer>"


def _cell(box: digits.Box, size: int) -> tuple[int, int]:
    """Row and column, each 0 to 2, of a box's center."""
    x1, y1, x2, y2 = box
    return min(2, 3 * (y1 + y2) // (2 * size)), min(2, 3 * (x1 + x2) // (2 * size))
