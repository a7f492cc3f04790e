"""Placeholders of ms-swift's grounding rows, `<ref-object>` and `<bbox>`, filled in from the column `objects`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vlmr1.data.boxes import Size
from vlmr1.data.faults import row_fault
from vlmr1.data.formats import Reading
from vlmr1.data.messages import short

REF, BOX = "<ref-object>", "<bbox>"
ANY = re.compile(f"{REF}|{BOX}")
# In a solution: boxes in a row with or without their names, or a name alone.
RUN = re.compile(rf"(?:(?:{REF}\s*)?{BOX}[\s,]*)*(?:{REF}\s*)?{BOX}|{REF}")
ENTRY = re.compile(rf"(?:({REF})\s*)?{BOX}")


def fill(reading: Reading, objects: Any, size: Callable[[int], Size], source: str) -> Reading:
    """Replace the placeholders of a row, in order, by names and by boxes in pixels, `[x1, y1, x2, y2]`.

    In the solution several boxes, or boxes with names, become a JSON list of `bbox_2d` and `label`, which the rewards
    read. `size(i)` is the size of the ith image, by which boxes of `bbox_type: norm1` are multiplied."""
    parts = [part for each in reading.messages for part in each["content"] if "text" in part]
    if isinstance(objects, dict) and all(value is None for value in objects.values()):
        objects = None  # as tables have it in rows without objects
    found = ANY.findall(" ".join([*(part["text"] for part in parts), reading.solutions[0]]))
    if not found or (objects is None and REF not in found):
        return reading  # <bbox> may be a word of the question
    names, boxes = _objects(objects, size, source)
    if found.count(REF) > len(names) or (BOX in found and found.count(BOX) != len(boxes)):
        counts = f"{found.count(REF)} {REF} and {found.count(BOX)} {BOX} in the texts"
        raise row_fault(source, "objects", f"{counts}, {len(names)} ref and {len(boxes)} bbox in objects")
    left = {REF: iter(names), BOX: iter(map(json.dumps, boxes))}

    def labelled(match: re.Match[str]) -> str:
        entries = ENTRY.findall(match[0])
        if entries in ([], [""]):
            return next(left[BOX if entries else REF])
        labels = names if len(names) == len(entries) else (names if len(names) == 1 else [""]) * len(entries)
        made = [
            {"bbox_2d": json.loads(next(left[BOX])), "label": next(left[REF]) if ref else label}
            for ref, label in zip(entries, labels, strict=True)
        ]
        return json.dumps(made, ensure_ascii=False)

    for part in parts:
        part["text"] = ANY.sub(lambda match: next(left[match[0]]), part["text"])
    return replace(reading, solutions=(RUN.sub(labelled, reading.solutions[0]), *reading.solutions[1:]))


def _objects(objects: Any, size: Callable[[int], Size], source: str) -> tuple[list[str], list[list[float]]]:
    """Return names and boxes. DataError for other content of the column."""
    given = objects if isinstance(objects, dict) else {}
    names, boxes = given.get("ref") or [], given.get("bbox") or []
    places = given.get("image_id") or [0] * len(boxes)
    kind = given.get("bbox_type") or "real"
    lists = all(isinstance(each, list) for each in (names, boxes, places)) and len(places) == len(boxes)
    if not given or not lists or not all(isinstance(name, str) for name in names) or not all(map(_is_box, boxes)):
        what = f'objects is {{"ref": [text], "bbox": [[x1, y1, x2, y2]], "image_id": [number]}}, not {short(objects)}'
        raise row_fault(source, "objects", what)
    if kind not in ("real", "norm1"):
        raise row_fault(source, "objects", f"bbox_type of objects is {kind!r}: real (pixels) or norm1 (0 to 1)")
    if kind == "real":
        return names, boxes
    return names, [
        [round(value * size(place)[axis % 2], 2) for axis, value in enumerate(box)]
        for box, place in zip(boxes, places, strict=True)
    ]


def _is_box(box: Any) -> bool:
    numbers = isinstance(box, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in box)
    return numbers and len(box) in (2, 4)
