"""Parse boxes in the forms that models write: JSON, lists, pairs of corners, and the box tokens of model families.

The part of a text that is read is its last code fence, else its box tokens, else all of it. In that part every
bracket is read, so words and Markdown around boxes do no harm. One that opens like JSON and is not is malformed, and
then nothing is read. docs/rewards.md lists the forms.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlmr1.data.boxes import Box, area
from vlmr1.rewards.tags import box_text, find_answer, has_format, lacks_thought, true_text

LabelledBox = tuple[str | None, Box | None]  # None where it cannot be read

__all__ = [
    "LabelledBox",
    "WrittenBox",
    "box_text",
    "find_answer",
    "has_format",
    "labelled_boxes",
    "lacks_thought",
    "parse_box",
    "parse_point",
    "predicted_box",
    "predicted_boxes",
    "solution_box",
    "true_text",
    "with_only_label",
    "written_boxes",
]
FLOAT_MAX = 1.7976931348623157e308
KEYS = ("bbox_2d", "bbox")
FENCE = "```"
LANGUAGE = re.compile(r"\s*(?:json|xml|text)?\s*", re.IGNORECASE)
TOKENS = {"<|begin_of_box|>": "<|end_of_box|>", "<box>": "</box>", "<|box_start|>": "<|box_end|>"}
OPENING_TOKEN = re.compile("|".join(map(re.escape, TOKENS)))
LABELS = {"<ref>": "</ref>", "<|object_ref_start|>": "<|object_ref_end|>"}
NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
BRACKET = re.compile(r"[\[{(<]")
CORNER = re.compile(rf"\({NUMBER},{NUMBER}\)\s*,?\s*")
FLAT = re.compile(rf"\({NUMBER},{NUMBER},{NUMBER},{NUMBER}\)|<{NUMBER},{NUMBER},{NUMBER},{NUMBER}>")
# The opening of a list or object; without a group it is a bracket among words.
JSON = re.compile(r'\{\s*(?P<object>["}])?|\[[\[\s]*(?P<list>["{\]]|-?\d|true|false|null|NaN|-?Infinity)?')


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; a key of a box that it has twice, with different boxes, has none."""
    made = dict(pairs)
    return made | {key: None for key, value in pairs if key in KEYS and value != made[key]}


DECODER = json.JSONDecoder(parse_int=float, object_pairs_hook=_object)


@dataclass(frozen=True)
class WrittenBox:
    """A box as a text has it. `label` is case-folded."""

    box: Box | None  # None where it cannot be read
    label: str | None = None  # None where it cannot be read, or the form has none
    has_label: bool = False  # whether the form has a label
    fields: Mapping[str, Any] = field(default_factory=dict)  # the JSON object around it


def written_boxes(text: str) -> list[WrittenBox] | None:
    """Return the boxes of a text, in order; [] for the word None or an empty list, None where none can be read.

    In a JSON list of objects, an object without a box is a box that cannot be read."""
    parts = _parts(text)
    if parts is None:
        return None
    if len(parts) == 1 and parts[0][1].strip().strip(".").casefold() in ("none", "null"):
        return []
    found: list[WrittenBox] = []
    is_empty = False
    for label, part in parts:
        values = _values(part)
        if values is None:
            return None
        is_empty |= [] in values
        boxes = [each for value in values for each in _boxes_of(value)]
        found += [
            replace(each, label=label, has_label=True) if label and not each.has_label else each for each in boxes
        ]
    return found or ([] if is_empty else None)


def labelled_boxes(text: str) -> list[LabelledBox] | None:
    """Return (label, box) of each box of a text; [] and None as `written_boxes`."""
    boxes = written_boxes(text)
    return None if boxes is None else [(each.label, each.box) for each in boxes]


def parse_box(text: str) -> Box | None:
    """Return the only box of a text, which may be repeated and inverted; None for two different ones, or none."""
    boxes = {each.box for each in written_boxes(text) or ()}
    return boxes.pop() if len(boxes) == 1 else None


def parse_point(text: str) -> tuple[float, float] | None:
    """Return the only point of a text or the center of its only box; None for two different ones, or none.

    A point is `[x, y]`, `(x, y)`, `{"point_2d": [x, y]}`, or a text `x, y`."""
    box = parse_box(text)
    if box is not None:
        return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    points: set[tuple[float, float]] = set()
    for _, part in _parts(text) or ():
        if bare := re.fullmatch(rf"{NUMBER},{NUMBER}", LANGUAGE.sub("", part, count=1)):
            points.update(_points_of([float(bare[1]), float(bare[2])]))
        points.update(point for value in _values(part) or () for point in _points_of(value))
    return points.pop() if len(points) == 1 else None


def predicted_box(content: str) -> Box | None:
    """Return the box in a completion's answer, or None."""
    text = box_text(content)
    return None if text is None else parse_box(text)


def predicted_boxes(content: str) -> list[WrittenBox] | None:
    """Return the boxes in a completion's answer; [] and None as `written_boxes`."""
    text = box_text(content)
    return None if text is None else written_boxes(text)


def with_only_label(boxes: Sequence[WrittenBox], labels: Collection[str]) -> list[WrittenBox]:
    """Return the boxes; those in a form without labels get the label that is the only one."""
    only = next(iter(labels)) if len(labels) == 1 else None
    return [each if each.has_label else replace(each, label=only) for each in boxes]


def solution_box(solution: str) -> Box | None:
    """Return the box of a solution, inside `<answer>` or bare; None if there is none or it has no area."""
    box = parse_box(true_text(solution))
    return box if box is not None and area(box) > 0 else None


def _parts(text: str) -> list[tuple[str, str]] | None:
    """Return (label or "", text) of each part that is read; None where a fence or token is not closed."""
    fences = text.split(FENCE)
    if len(fences) % 2 == 0:
        return None
    text = LANGUAGE.sub("", fences[-2], count=1) if len(fences) > 1 else text
    parts: list[tuple[str, str]] = []
    end, label = 0, ""
    while opening := OPENING_TOKEN.search(text, end):
        closing = TOKENS[opening[0]]
        between = text[end : opening.start()]
        stop = text.find(closing, opening.end())
        if stop < 0:
            return None
        label = _label_in(between) or (label if not between.strip(" \n\t,;") else "")
        parts.append((label, text[opening.end() : stop]))
        end = stop + len(closing)
    return parts or [("", text)]


def _label_in(text: str) -> str:
    """Return the last label in the tokens for one, case-folded."""
    for opening, closing in LABELS.items():
        start = text.rfind(opening)
        stop = text.find(closing, start)
        if 0 <= start < stop:
            return text[start + len(opening) : stop].strip().casefold()
    return ""


def _values(text: str) -> list[object] | None:
    """Return the lists, objects, and points or boxes in parentheses of a text; None where one is malformed."""
    found: list[object] = []
    place = 0
    while bracket := BRACKET.search(text, place):
        start = bracket.start()
        place = start + 1
        if flat := FLAT.match(text, start):
            found.append([float(number) for number in flat.groups() if number is not None])
            place = flat.end()
        elif text[start] == "(":
            corners: list[float] = []
            while corner := CORNER.match(text, start):
                corners += map(float, corner.groups())
                place = start = corner.end()
            if len(corners) > 2 and len(corners) % 4:
                return None
            step = min(4, len(corners) or 4)
            found += [corners[i : i + step] for i in range(0, len(corners), step)]
        elif opened := JSON.match(text, start):
            if opened.lastgroup is None:
                place = opened.end()
                continue
            try:
                value, place = DECODER.raw_decode(text, start)
            except (json.JSONDecodeError, RecursionError):
                return None
            found.append(value)
    return found


def _boxes_of(value: object) -> list[WrittenBox]:
    """Return the boxes of a JSON value; [] for one that is none."""
    if isinstance(value, dict):
        return [_object_box(value)]
    if not isinstance(value, list):
        return []
    if _is_numbers(value, 4):
        return [WrittenBox(_box(value))]
    if all(isinstance(each, dict) for each in value):
        return [_object_box(each) for each in value]
    if any(_is_numbers(each, 4) for each in value):
        return [WrittenBox(_box(each)) for each in value]
    return []


def _object_box(value: Mapping[str, Any]) -> WrittenBox:
    lists = [value[key] for key in KEYS if key in value]
    lists = [each[0] if isinstance(each, list) and len(each) == 1 else each for each in lists]  # [[x1, y1, x2, y2]]
    boxes = {_box(each) for each in lists}
    label = value.get("label")
    label = label.strip().casefold() if isinstance(label, str) else None
    return WrittenBox(boxes.pop() if len(boxes) == 1 else None, label, True, value)


def _points_of(value: object) -> list[tuple[float, float]]:
    """Return the points of a JSON value; [] for one that has none."""
    if isinstance(value, dict):
        value = value.get("point_2d", value.get("point"))
    values: Sequence[object] = value if isinstance(value, list) and not _is_numbers(value, 2) else [value]
    found = []
    for each in values:
        point = each.get("point_2d", each.get("point")) if isinstance(each, dict) else each
        if isinstance(point, list) and _is_numbers(point, 2) and all(abs(number) <= FLOAT_MAX for number in point):
            found.append((point[0], point[1]))
    return found


def _is_numbers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(each, float) for each in value)


def _box(value: object) -> Box | None:
    if not isinstance(value, list) or not _is_numbers(value, 4):
        return None
    if not all(abs(number) <= FLOAT_MAX for number in value):  # NaN compares false
        return None
    x1, y1, x2, y2 = value
    return x1, y1, x2, y2
