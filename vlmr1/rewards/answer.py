"""Parse completions and solutions: `<think>` and `<answer>` tags, and boxes in JSON.

The answer is the last closed `<answer>`, up to the first `</answer>` after it; of nested ones the innermost. A
completion has the format only if each of the four tags occurs exactly once.
"""

from __future__ import annotations

import json
import re

from vlmr1.data.boxes import Box, area

LabelledBox = tuple[str | None, Box | None]  # None where it cannot be read

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FORMAT = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
FENCE = re.compile(r"```(?:json)?(.*)```", re.DOTALL)
FLOAT_MAX = 1.7976931348623157e308


def find_answer(text: str) -> str | None:
    """Return the text of the last closed `<answer>`, stripped; None where there is none."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return None
    start += len("<answer>")
    return text[start : text.find("</answer>", start)].strip()


def has_format(text: str) -> bool:
    """Return whether the whole text is `<think>..</think><answer>..</answer>` with neither part empty."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    match = FORMAT.fullmatch(text)
    return match is not None and all(part.strip() for part in match.groups())


def parse_box(text: str) -> Box | None:
    """Parse `{"bbox_2d": [x1, y1, x2, y2], ...}`, a list of one such object, or a list of four numbers.

    A Markdown code fence around it is allowed. Return None for anything else: two boxes, strings, NaN, infinity.
    The box may be inverted.
    """
    value = _parse_json(text)
    if isinstance(value, list) and len(value) == 1:
        value = value[0] if isinstance(value[0], dict) else None
    return _box(value.get("bbox_2d") if isinstance(value, dict) else value)


def labelled_boxes(text: str) -> list[LabelledBox] | None:
    """Parse `[{"bbox_2d": [x1, y1, x2, y2], "label": text}, ...]` or one such object; the word None gives [].

    Return None for any other text. A label or box that cannot be read is None; labels are case-folded.
    """
    if text.strip().strip(".").casefold() in ("none", "null"):
        return []
    value = _parse_json(text)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return None
    return [(_label(entry.get("label")), _box(entry.get("bbox_2d"))) for entry in value]


def _label(value: object) -> str | None:
    return value.strip().casefold() if isinstance(value, str) else None


def _parse_json(text: str) -> object:
    """Parse JSON, in a code fence or not; None for invalid JSON."""
    fenced = FENCE.fullmatch(text.strip())
    try:
        return json.loads(fenced[1] if fenced else text, parse_int=float)
    except (json.JSONDecodeError, RecursionError):
        return None


def _box(value: object) -> Box | None:
    if not isinstance(value, list) or len(value) != 4:
        return None
    if not all(isinstance(number, float) and abs(number) <= FLOAT_MAX for number in value):
        return None
    x1, y1, x2, y2 = value
    return x1, y1, x2, y2


def predicted_box(text: str) -> Box | None:
    """The box in a completion's answer, or None."""
    answer = find_answer(text)
    return None if answer is None else parse_box(answer)


def true_text(solution: str) -> str:
    """The text of a solution, inside `<answer>` or bare, stripped."""
    answer = find_answer(solution)
    return solution.strip() if answer is None else answer


def solution_box(solution: str) -> Box | None:
    """The box of a solution, inside `<answer>` or bare; None if there is none or it has no area."""
    box = parse_box(true_text(solution))
    return box if box is not None and area(box) > 0 else None
