"""Annotation files of benchmarks as rows: RefCOCO-style JSON, and COCO detection."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from vlmr1.data.rows import ListRows, Row, Rows
from vlmr1.errors import DataError
from vlmr1.evaluation.detection import CROWD, LABELS

logger = logging.getLogger(__name__)
# VLM-R1's evaluation files of RefCOCO, RefCOCO+, RefCOCOg and LISA-Grounding have these columns.
PROBLEM, SOLUTION = "problem", "solution"
COCO = ("images", "annotations", "categories")
QUESTION = (
    "Look for every object in the image that is one of: {labels}. Answer with a JSON list that has one entry for each "
    'object, in the form ```json\n[{{"bbox_2d": [x1, y1, x2, y2], "label": "one of these names"}}]\n```, and with None '
    "where the image shows none of them."
)


class ProblemRows(Rows):
    """Rows {"image", "problem", "solution": [x1, y1, x2, y2], ...} with the columns renamed to those of prompts."""

    def __init__(self, rows: Rows, prompt: str, solution: str):
        self.name = rows.name
        self.rows = rows
        self.prompt, self.solution = prompt, solution

    def __len__(self) -> int:
        return len(self.rows)

    def line(self, index: int) -> int:
        return self.rows.line(index)

    def read(self, index: int) -> Row:
        row = dict(self.rows.read(index))
        if PROBLEM in row and self.prompt not in row:
            row[self.prompt] = row.pop(PROBLEM)
        if SOLUTION in row and self.solution != SOLUTION:
            row[self.solution] = row.pop(SOLUTION)
        return row


class CocoRows(ListRows):
    """One row for each image of a COCO annotation file; its "line" is the image's number."""

    def source(self, index: int) -> str:
        return f"{self.name}:images[{index}]"


def annotation_rows(rows: Rows, prompt: str, solution: str) -> Rows:
    """Return the rows of a data file, with their prompt and solution in these columns.

    A JSON object with images, annotations and categories is in COCO's format. Rows with a `problem`, a `solution`, and
    neither conversations nor the column `prompt` are in RefCOCO's. Other files are as in training. DataError for an
    invalid COCO file."""
    coco = _coco_file(rows.name)
    if coco is not None:
        return CocoRows(rows.name, [_renamed(row, prompt, solution) for row in coco_rows(rows.name, coco)])
    if len(rows):
        first = rows.read(0)
        if {PROBLEM, SOLUTION} <= first.keys() and not {"conversations", prompt} & first.keys():
            return ProblemRows(rows, prompt, solution)
    return rows


def coco_rows(name: str, coco: dict[str, Any]) -> list[Row]:
    """Convert images of a COCO file to rows with `prompt`, `solution` and the labels that the question lists.

    These are an image's `text` and `neg_text` where it has them, as in OVDEval, else all categories."""
    labels = _categories(name, coco)
    boxes = _boxes(name, coco, labels)
    rows: list[Row] = []
    for place, image in enumerate(coco["images"]):
        source = f"{name}:images[{place}]"
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
            raise DataError(f"{source}: an image needs an id and a file_name")
        wanted = _asked(image, source) or sorted(labels.values())
        entries = boxes.pop(image["id"], [])
        rows.append(
            {
                "image": image["file_name"],
                "prompt": QUESTION.format(labels=json.dumps(wanted, ensure_ascii=False)),
                "solution": json.dumps([entry for entry, _ in entries], ensure_ascii=False) if entries else "None",
                LABELS: wanted,
                CROWD: [crowd for _, crowd in entries],
            }
        )
    if boxes:
        raise DataError(f"{name}: annotations of the image {next(iter(boxes))!r}, which is not among its images")
    return rows


def _coco_file(name: str) -> dict[str, Any] | None:
    """Read a COCO annotation file; None for any other file."""
    path = Path(name)
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text) if text.lstrip().startswith("{") else None
    except (OSError, ValueError):  # JSON lines, or an error that `json_rows` reports
        return None
    return value if isinstance(value, dict) and all(isinstance(value.get(key), list) for key in COCO) else None


def _categories(name: str, coco: dict[str, Any]) -> dict[Any, str]:
    """Category names by id."""
    labels: dict[Any, str] = {}
    for place, category in enumerate(coco["categories"]):
        source = f"{name}:categories[{place}]"
        if not isinstance(category, dict) or not isinstance(category.get("name"), str) or "id" not in category:
            raise DataError(f"{source}: a category needs an id and a name")
        label = category["name"].strip()
        if label.casefold() in {each.casefold() for each in labels.values()}:
            raise DataError(f"{source}: there are two categories {label!r}, case aside")
        labels[category["id"]] = label
    return labels


def _boxes(name: str, coco: dict[str, Any], labels: dict[Any, str]) -> dict[Any, list[tuple[dict[str, Any], bool]]]:
    """Boxes by image id, each with its crowd flag."""
    boxes: dict[Any, list[tuple[dict[str, Any], bool]]] = defaultdict(list)
    empty = 0
    for place, entry in enumerate(coco["annotations"]):
        source = f"{name}:annotations[{place}]"
        if not isinstance(entry, dict) or "image_id" not in entry:
            raise DataError(f"{source}: an annotation needs an image_id")
        box = entry.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(_is_number(each) for each in box)):
            raise DataError(f"{source}: bbox is {box!r}, not [x, y, width, height]")
        if entry.get("category_id") not in labels:
            raise DataError(f"{source}: category_id {entry.get('category_id')!r} is not among the categories")
        x, y, width, height = box
        if width <= 0 or height <= 0:
            empty += 1
            continue
        labelled = {"bbox_2d": [x, y, x + width, y + height], "label": labels[entry["category_id"]]}
        boxes[entry["image_id"]].append((labelled, bool(entry.get("iscrowd"))))
    if empty:
        logger.warning("%s: %d boxes without an area are left out", name, empty)
    return boxes


def _asked(image: dict[str, Any], source: str) -> list[str]:
    """Return the labels in an image's question, sorted, so that their order does not tell which are present."""
    labels: list[str] = []
    for key in ("text", "neg_text"):
        value = image.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
            raise DataError(f"{source}: {key} is not a list of labels")
        labels += value
    return sorted({label.strip() for label in labels})


def _renamed(row: Row, prompt: str, solution: str) -> Row:
    names = {"prompt": prompt, "solution": solution}
    return {names.get(key, key): value for key, value in row.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
