"""Counting: the relative error of a number, cut at 0."""

from __future__ import annotations

import json
import re
from typing import Any

from vlmr1.rewards.answer import find_answer, true_text, written_boxes

INTEGER = re.compile(r"(?<![\d.,])\d+(?![\d]|[.,]\d)")


def counting(content: str, solution: str, **options: Any) -> float:
    """Return max(0, 1 - |m - n| / max(n, 1)) for m counted and n true. The definition is this project's.

    The answer is a whole number, the only one in a sentence, or a list with one entry for each thing.
    """
    expected, answer = count(true_text(solution)), find_answer(content)
    if expected is None:
        raise ValueError(f"the solution is no count: {solution[:120]!r}")
    counted = None if answer is None else count(answer)
    return 0.0 if counted is None else max(0.0, 1.0 - abs(counted - expected) / max(expected, 1))


def count(text: str) -> int | None:
    """Return the number in a text, or the length of a list; None for no number or several."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list):
        return len(value)
    boxes = written_boxes(text) if text.strip()[:1] in ("[", "`", "{", "<") else None
    if boxes is not None:
        return len(boxes)
    if isinstance(value, float) and value.is_integer() and value >= 0:
        return int(value)
    numbers = set(INTEGER.findall(text))
    return int(numbers.pop()) if len(numbers) == 1 and "-" not in text and len(text) < 4000 else None
