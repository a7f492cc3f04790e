"""Mode vlm_r1: the scores that VLM-R1's published code computes, recorded from it, and COCO's average precision."""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vlmr1.rewards import score
from vlmr1.rewards.coco import AP, AP50, Category, average_precision

DATA = Path(__file__).parents[2] / "data"
RECORDED, CASES = (
    [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    for name in ("seed_rewards.jsonl", "reward_cases.jsonl")
)


def name_of(case):
    return f"{case['reward']}-{case['kwargs'].get('accu_reward_method', '')}-{case['content'][-40:]}"


@pytest.mark.parametrize("case", RECORDED + CASES, ids=name_of)
def test_recorded(case):
    """Scores of the published code, recorded from it; and further cases of both modes, worked out by hand."""
    expected, mode = case["expected"], case.get("mode", "vlm_r1")
    arguments = (case["reward"], case["content"], case["solution"])
    if isinstance(expected, dict):
        with pytest.raises(Exception) as caught:
            score(*arguments, mode=mode, **case["kwargs"])
        assert type(caught.value).__name__ == expected["raises"]
        return
    value = score(*arguments, mode=mode, **case["kwargs"])
    assert value == pytest.approx(expected, abs=1e-12 if mode == "strict" else 1e-9)
    if case["reward"] == "repetition" and mode == "strict":
        assert math.copysign(1, value) == (-1 if expected else 1)


SIDES = st.one_of(st.integers(-5, 25), st.floats(-5, 25), st.sampled_from([0, 10, 1e5, -1e5, 2e5]))
NUMBERS = st.lists(SIDES, min_size=4, max_size=4)
BOXES = st.lists(st.tuples(st.sampled_from("abc"), NUMBERS), max_size=8)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(truths=BOXES.filter(bool), predictions=BOXES, repeats=st.sampled_from([1, 1, 40]))
def test_average_precision_is_that_of_cocoeval(truths, predictions, repeats):
    """To the last bit, with boxes of negative, no, and too large an area, and with more than 100 detections."""
    predictions = predictions * repeats
    labels = sorted({label for label, _ in truths})
    predictions = [(label, numbers) for label, numbers in predictions if label in labels]
    categories = [
        Category(
            [numbers for label, numbers in truths if label == name],
            [numbers for label, numbers in predictions if label == name],
        )
        for name in labels
    ]
    if not predictions:
        return
    expected = coco_stats(labels, truths, predictions)
    assert average_precision(categories, AP) == expected[0]
    assert average_precision(categories, AP50) == expected[1]


BIG = 1e5


@pytest.mark.parametrize(
    "truths, predictions, expected",
    [
        # An ignored box, here one beyond 1e10 px^2, is taken only where no other fits, though it fits better.
        ([[0, 0, BIG, BIG], [0, 0, 1.2 * BIG, BIG]], [[0, 0, 1.15 * BIG, BIG]], 0.8),
        ([[0, 0, 10, 10]], [[50, 0, 9, 9]] * 99 + [[0, 0, 10, 10]], 0.01),
        ([[0, 0, 10, 10]], [[50, 0, 9, 9]] * 100 + [[0, 0, 10, 10]], 0.0),  # the 101st is not looked at
        ([[0, 0, 10, 10]], [[0, 0, 2 * BIG, BIG], [0, 0, 10, 10]], 1.0),  # one too large is not even wrong
    ],
    ids=["ignored", "hundredth", "beyond", "too-large"],
)
def test_corners_of_average_precision(truths, predictions, expected):
    value = average_precision([Category(truths, predictions)])
    assert value == pytest.approx(expected, abs=1e-12)
    assert value == coco_stats(["a"], [("a", each) for each in truths], [("a", each) for each in predictions])[0]


def coco_stats(labels, truths, predictions):
    def annotation(index, label, numbers):
        x, y, width, height = numbers
        return {
            "id": index + 1,
            "image_id": 0,
            "category_id": labels.index(label),
            "bbox": [x, y, width, height],
            "area": width * height,
            "iscrowd": 0,
            "score": 1.0,
        }

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": 0}],
            "categories": [{"id": i, "name": name} for i, name in enumerate(labels)],
            "annotations": [annotation(i, *each) for i, each in enumerate(truths)],
        }
        truth.createIndex()
        evaluation = COCOeval(
            truth, truth.loadRes([annotation(i, *each) for i, each in enumerate(predictions)]), "bbox"
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats)
