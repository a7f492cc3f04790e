"""Completions -> boxes with scores; rows whose boxes cannot be read; the score of one image."""

import pytest

from vlmr1.evaluation.coco import ImageBoxes, ScoredBox, TrueBox
from vlmr1.evaluation.detection import check_detection, image_f1, predicted_boxes, true_boxes_of
from vlmr1.types import Sample

SIZE = (100, 100)


def said(answer, extent=SIZE):
    boxes = predicted_boxes(f"<think>a</think><answer>{answer}</answer>", extent, SIZE)
    return None if boxes is None else [(box.label, box.box, box.score) for box in boxes]


def sample(solution, **columns):
    return Sample([], (), solution, "data.jsonl:3", 2, columns)


BOX = (1.0, 2.0, 3.0, 4.0)
ANSWERS = {
    "none": ("None", []),
    "empty list": ("[]", []),
    "order of writing": (
        '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "Cat"}, {"bbox_2d": [1, 2, 3, 4], "label": "dog"}]\n```',
        [("cat", BOX, 1.0), ("dog", BOX, 0.5)],
    ),
    "a score": (
        '[{"bbox_2d": [1, 2, 3, 4], "label": "a", "score": 0.25}, {"bbox_2d": [1, 2, 3, 4], "label": "b"}]',
        [("a", BOX, 0.25), ("b", BOX, 0.5)],
    ),
    "a confidence": ('[{"bbox_2d": [1, 2, 3, 4], "label": "a", "confidence": 7}]', [("a", BOX, 7.0)]),
    "a score in words": ('[{"bbox_2d": [1, 2, 3, 4], "label": "a", "score": "high"}]', [("a", BOX, 1.0)]),
    "a score that is true": ('[{"bbox_2d": [1, 2, 3, 4], "label": "a", "score": true}]', [("a", BOX, 1.0)]),
    "a score of NaN": ('[{"bbox_2d": [1, 2, 3, 4], "label": "a", "score": NaN}]', [("a", BOX, 1.0)]),
    "one object": ('{"bbox_2d": [1, 2, 3, 4], "label": "a", "score": 3}', [("a", BOX, 3.0)]),
    "no label, no box": ('[{"bbox_2d": [1, 2, 3]}, {"label": "a"}]', [(None, None, 1.0), ("a", None, 0.5)]),
    "words": ("two cats", None),
}


@pytest.mark.parametrize("answer, expected", ANSWERS.values(), ids=ANSWERS)
def test_predicted(answer, expected):
    assert said(answer) == expected


def test_the_answer_may_lack_its_tags_but_not_its_end():
    text = '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]'
    assert predicted_boxes(text, SIZE, SIZE) == (ScoredBox("a", BOX, 1.0),)
    assert predicted_boxes(f"<answer>{text}", SIZE, SIZE) is None


def test_a_form_without_labels_has_the_only_one():
    text = "<box>[[1, 2, 3, 4], [1, 2, 3, 4]]</box>"
    for labels, label in (({"cat"}, "cat"), ({"cat", "dog"}, None), ((), None)):
        assert predicted_boxes(text, SIZE, SIZE, labels) == (ScoredBox(label, BOX, 1.0), ScoredBox(label, BOX, 0.5))


def test_boxes_go_to_pixels():
    assert said('[{"bbox_2d": [100, 200, 500, 1000], "label": "a"}]', (1000, 2000)) == [("a", (10, 10, 50, 50), 1.0)]


def test_truths():
    boxes = '[{"bbox_2d": [1, 2, 3, 4], "label": "Cat "}, {"bbox_2d": [0, 0, 9, 9], "label": "b"}]'
    solution = f"<answer>```json\n{boxes}\n```</answer>"
    row = sample(solution, crowd=[False, True])
    check_detection(row)
    assert true_boxes_of(row) == (TrueBox("cat", BOX), TrueBox("b", (0.0, 0.0, 9.0, 9.0), True))
    assert true_boxes_of(sample("None")) == ()


A, B = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0)
IMAGES = {
    "neither": ((), (), 1.0),
    "a stray box": ((), (("a", A),), 0.0),
    "nothing said": ((("a", A),), (), 0.0),
    "right": ((("a", A), ("b", B)), (("b", B), ("a", A)), 1.0),
    "one of two labels": ((("a", A), ("a", B)), (("a", A), ("b", B)), 0.5),
    "one true box is taken once": ((("a", A),), (("a", A), ("a", A)), 2 / 3),
    "an IoU of a half": ((("a", A),), (("a", (0.0, 0.0, 10.0, 5.0)),), 1.0),
    "an IoU below": ((("a", A),), (("a", (0.0, 0.0, 10.0, 4.9)),), 0.0),
    "unreadable": ((("a", A),), (("a", None), (None, A)), 0.0),
}


@pytest.mark.parametrize("truths, boxes, expected", IMAGES.values(), ids=IMAGES)
def test_score_of_an_image(truths, boxes, expected):
    predictions = tuple(ScoredBox(*each, 1 / (1 + i)) for i, each in enumerate(boxes))
    assert image_f1(ImageBoxes(tuple(TrueBox(*each) for each in truths), predictions)) == pytest.approx(expected)
