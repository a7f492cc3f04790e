"""COCO average precision of a data set by pycocotools, and of its bootstrap samples."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmr1.data.boxes import Box, area, to_xywh
from vlmr1.errors import import_for
from vlmr1.evaluation.bootstrap import counts

ALL_SIZES = [[0.0, 1e10]]  # px^2
THRESHOLDS = {"ap": slice(None), "ap50": slice(0, 1), "ap75": slice(5, 6)}  # slices of 0.50, 0.55, ..., 0.95
TINY = np.spacing(1)


@dataclass(frozen=True)
class TrueBox:
    label: str
    box: Box  # px
    crowd: bool = False  # a region of many objects: it matches any number of boxes, and none is counted


@dataclass(frozen=True)
class ScoredBox:
    """A predicted box; a label or corners that could not be parsed are None."""

    label: str | None
    box: Box | None  # px
    score: float


@dataclass(frozen=True)
class ImageBoxes:
    """True and predicted boxes of one image."""

    truths: tuple[TrueBox, ...]
    predictions: tuple[ScoredBox, ...]


@dataclass(frozen=True)
class Category:
    """The matches of one label over all images: D detections by falling score, at T IoU thresholds."""

    image: np.ndarray  # [D] int, the image of each
    right: np.ndarray  # [T, D] bool, true positives
    wrong: np.ndarray  # [T, D] bool, false positives; neither: ignored
    truths: np.ndarray  # [I] true boxes by image


class AveragePrecision:
    """AP over all images and labels that have a true box.

    Boxes of other labels are ignored, as in COCO. `labels` may include some without a true box. Without any true box
    every value is NaN."""

    def __init__(self, images: Sequence[ImageBoxes], labels: Sequence[str]):
        self.labels = list(labels)
        self.images = len(images)
        with redirect_stdout(io.StringIO()):
            self.evaluation = _evaluated(images, self.labels)
        params = self.evaluation.params
        self.recalls = np.asarray(params.recThrs)

    def value(self, name: str) -> float:
        """`ap`, `ap50` or `ap75`."""
        return _mean(self._precision[THRESHOLDS[name]])

    def by_label(self) -> dict[str, float]:
        """AP of each label that has a true box."""
        values = {label: _mean(self._precision[:, :, k]) for k, label in enumerate(self.labels)}
        return {label: value for label, value in values.items() if not np.isnan(value)}

    def replicates(self) -> dict[str, np.ndarray]:
        """The three values on each resampled data set, [DRAWS]."""
        categories = [each for k in range(len(self.labels)) if (each := self._category(k)) is not None]
        drawn: dict[str, list[np.ndarray]] = {name: [] for name in THRESHOLDS}
        for weights in counts(self.images):
            total = np.zeros((len(weights), len(self.evaluation.params.iouThrs)))
            present = np.zeros(len(weights))
            for category in categories:
                known, values = resampled(category, weights, self.recalls)
                present += known
                total += values
            for name, which in THRESHOLDS.items():
                mean = total[:, which].mean(1)
                drawn[name].append(np.where(present > 0, mean / np.maximum(present, 1), np.nan))
        return {name: np.concatenate(parts) for name, parts in drawn.items()}

    @property
    def _precision(self) -> np.ndarray:
        """[T, R, K]; -1 for labels without a true box."""
        return self.evaluation.eval["precision"][:, :, :, 0, -1]

    def _category(self, k: int) -> Category | None:
        matches = self.evaluation.evalImgs[k * self.images : (k + 1) * self.images]
        found = [(i, each) for i, each in enumerate(matches) if each is not None]
        if not found:
            return None
        truths = np.zeros(self.images)
        for i, each in found:
            truths[i] = np.count_nonzero(np.asarray(each["gtIgnore"]) == 0)
        if not truths.any():
            return None
        scores = np.concatenate([each["dtScores"] for _, each in found])
        order = np.argsort(-scores, kind="mergesort")
        matched = np.concatenate([each["dtMatches"] for _, each in found], axis=1)[:, order] > 0
        ignored = np.concatenate([each["dtIgnore"] for _, each in found], axis=1)[:, order] > 0
        image = np.concatenate([np.full(len(each["dtScores"]), i) for i, each in found]).astype(int)[order]
        return Category(image, matched & ~ignored, ~matched & ~ignored, truths)


def resampled(category: Category, weights: np.ndarray, recalls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether a label is in each resampled data set [d], and its mean interpolated precision [d, T], else 0.

    `weights` [d, I] counts the images; an image that is drawn twice appears twice in succession."""
    total = (weights * category.truths).sum(1)  # [d]
    values = np.zeros((len(weights), len(category.right)))
    if not len(category.image):
        return total > 0, values
    each = weights[:, category.image]  # [d, D]
    for t, (right, wrong) in enumerate(zip(category.right, category.wrong, strict=True)):
        hits, misses = np.cumsum(each * right, 1), np.cumsum(each * wrong, 1)
        precision = hits / (hits + misses + TINY)
        envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        for row in np.flatnonzero(total):
            places = np.searchsorted(hits[row] / total[row], recalls, side="left")
            values[row, t] = np.append(envelope[row], 0.0)[places].mean()
    return total > 0, values


def _evaluated(images: Sequence[ImageBoxes], labels: Sequence[str]) -> Any:
    ids = {label: k for k, label in enumerate(labels, start=1)}
    truths: list[dict[str, Any]] = []
    predictions: list[dict[str, Any]] = []
    for image, boxes in enumerate(images, start=1):
        for true in boxes.truths:
            entry = _entry(len(truths) + 1, image, ids[true.label], true.box)
            truths.append(entry | {"iscrowd": int(true.crowd)})
        for prediction in boxes.predictions:
            if prediction.box is not None and prediction.label in ids:
                entry = _entry(len(predictions) + 1, image, ids[prediction.label], prediction.box)
                predictions.append(entry | {"iscrowd": 0, "score": prediction.score})
    library = import_for("average precision", "pycocotools.cocoeval", "pycocotools")
    evaluation = library.COCOeval(_coco(len(images), labels, truths), _coco(len(images), labels, predictions), "bbox")
    evaluation.params.areaRng, evaluation.params.areaRngLbl = ALL_SIZES, ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _coco(images: int, labels: Sequence[str], annotations: list[dict[str, Any]]) -> Any:
    coco = import_for("average precision", "pycocotools.coco", "pycocotools").COCO()
    content: Any = {
        "images": [{"id": i} for i in range(1, images + 1)],
        "categories": [{"id": k, "name": label} for k, label in enumerate(labels, start=1)],
        "annotations": annotations,
    }
    coco.dataset = content
    coco.createIndex()
    return coco


def _entry(number: int, image: int, category: int, box: Box) -> dict[str, Any]:
    place = {"bbox": to_xywh(box), "area": area(box)}
    return {"id": number, "image_id": image, "category_id": category, **place}


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")
