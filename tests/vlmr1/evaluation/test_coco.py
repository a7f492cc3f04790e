"""Average precision of a data set: by hand, against pycocotools called on files, and its bootstrap samples."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vlmr1.evaluation.bootstrap import counts
from vlmr1.evaluation.coco import AveragePrecision, ImageBoxes, ScoredBox, TrueBox
from vlmr1.evaluation.detection import keep_best

A, B, C = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (50.0, 50.0, 60.0, 60.0)


def image(truths, predictions):
    """Truths are (label, box), predictions (label, box, score)."""
    return ImageBoxes(tuple(TrueBox(*each) for each in truths), tuple(ScoredBox(*each) for each in predictions))


def ap(images, labels, name="ap"):
    return AveragePrecision(images, labels).value(name)


def near(box, iou):
    """A box of the same x and height that has this IoU with a box: its width is cut."""
    x1, y1, x2, y2 = box
    return x1, y1, x1 + (x2 - x1) * iou, y2


STRAY = [image([("a", A)], [("a", A, 0.5)]), image([], [("a", C, 1.0)])]
CROWD = ImageBoxes((TrueBox("a", A), TrueBox("a", C, True)), (ScoredBox("a", C, 2.0), ScoredBox("a", A, 1.0)))
HAND = {
    "right": ([image([("a", A)], [("a", A, 1.0)])], 1.0),
    "nothing said": ([image([("a", A)], [])], 0.0),
    "of two boxes one found: recall levels 0 to 0.50": ([image([("a", A), ("a", B)], [("a", A, 1.0)])], 51 / 101),
    "a false box ranked first": ([image([("a", A)], [("a", C, 1.0), ("a", A, 0.5)])], 0.5),
    "a false box ranked last": ([image([("a", A)], [("a", A, 1.0), ("a", C, 0.5)])], 1.0),
    "IoU 0.77: six of ten thresholds": ([image([("a", A)], [("a", near(A, 0.77), 1.0)])], 0.6),
    "a false box in an image without the label": (STRAY, 0.5),
    "labels count alike": ([image([("a", A), ("b", B), ("b", C)], [("a", A, 1.0)])], 0.5),
    "a label without true boxes has no part": ([image([("a", A)], [("a", A, 1.0), ("c", C, 2.0)])], 1.0),
    "an unknown label has no part": ([image([("a", A)], [("a", A, 1.0), ("zebra", C, 2.0), (None, C, 2.0)])], 1.0),
    "a box that could not be read has no part": ([image([("a", A)], [("a", None, 2.0), ("a", A, 1.0)])], 1.0),
    "an inverted box is false": ([image([("a", A)], [("a", (10.0, 10.0, 0.0, 0.0), 2.0), ("a", A, 1.0)])], 0.5),
    "a box on a crowd is not counted": ([CROWD], 1.0),
}


@pytest.mark.parametrize("images, expected", HAND.values(), ids=HAND)
def test_by_hand(images, expected):
    assert ap(images, ["a", "b", "c"]) == pytest.approx(expected, abs=1e-12)


def test_thresholds_and_labels():
    images = [image([("a", A), ("a", B)], [("a", near(A, 0.8), 1.0), ("a", near(B, 0.6), 0.5)])]
    assert ap(images, ["a"], "ap50") == pytest.approx(1.0)
    assert ap(images, ["a"], "ap75") == pytest.approx(51 / 101)
    found = AveragePrecision([image([("a", A), ("b", B)], [("a", A, 1.0)])], ["a", "b", "c"]).by_label()
    assert found == {"a": pytest.approx(1.0), "b": 0.0}


def test_without_true_boxes_there_is_no_value():
    nothing = AveragePrecision([image([], [("a", A, 1.0)])], ["a"])
    assert np.isnan(nothing.value("ap")) and np.isnan(nothing.replicates()["ap"]).all()


def random_images(seed, count=12):
    """Jittered copies of true boxes, wrong labels, stray boxes, equal scores."""
    rng = np.random.default_rng(seed)
    labels = ["a", "b", "c"]
    images = []
    for _ in range(count):
        truths, said = [], []
        for _ in range(rng.integers(0, 5)):
            x, y, w, h = rng.uniform(0, 80, 2).tolist() + rng.uniform(5, 30, 2).tolist()
            truths.append((str(rng.choice(labels)), (x, y, x + w, y + h), bool(rng.random() < 0.1)))
            for _ in range(rng.integers(0, 3)):
                jitter = rng.normal(0, 2, 4)
                box = tuple(np.add((x, y, x + w, y + h), jitter).tolist())
                label = truths[-1][0] if rng.random() < 0.8 else str(rng.choice(labels))
                said.append((label, box, float(rng.choice([1.0, 0.5, 1 / 3]))))
        images.append(image(truths, said))
    return images


def on_files(images, labels, folder):
    """pycocotools on files, as its own demo calls it: [AP, AP50, AP75]."""
    ids = {label: k for k, label in enumerate(labels, start=1)}
    truths, said = [], []
    for i, each in enumerate(images, start=1):
        for true in each.truths:
            x1, y1, x2, y2 = true.box
            area = (x2 - x1) * (y2 - y1)
            entry = {"id": len(truths) + 1, "image_id": i, "category_id": ids[true.label], "area": area}
            truths.append(entry | {"bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": int(true.crowd)})
        for box in each.predictions:
            x1, y1, x2, y2 = box.box
            entry = {"image_id": i, "category_id": ids[box.label], "score": box.score}
            said.append(entry | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    categories = [{"id": k, "name": label} for label, k in ids.items()]
    content = {"images": [{"id": i + 1} for i in range(len(images))], "annotations": truths, "categories": categories}
    (folder / "truths.json").write_text(json.dumps(content))
    (folder / "said.json").write_text(json.dumps(said))
    with redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "truths.json"))
        evaluation = COCOeval(coco, coco.loadRes(str(folder / "said.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:3]


@pytest.mark.parametrize("seed", range(4))
def test_against_pycocotools_on_files(seed, tmp_path):
    images = random_images(seed)
    found = AveragePrecision(images, ["a", "b", "c"])
    assert 0.05 < found.value("ap") < 0.95
    values = [found.value(name) for name in ("ap", "ap50", "ap75")]
    np.testing.assert_allclose(values, on_files(images, ["a", "b", "c"], tmp_path), atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_replicates_are_those_of_the_repeated_images(seed):
    """For the first draws: a data set in which each image stands as often as it was drawn."""
    images = random_images(seed, count=6)
    # Distinct scores: among equal ones, the boxes of an image that stands twice would change places.
    images = [
        ImageBoxes(
            each.truths, tuple(replace(b, score=b.score - i / 100 - j / 1e4) for j, b in enumerate(each.predictions))
        )
        for i, each in enumerate(images)
    ]
    drawn = AveragePrecision(images, ["a", "b", "c"]).replicates()
    assert {len(values) for values in drawn.values()} == {1000}
    for i, weights in enumerate(next(counts(6))[:8].astype(int)):
        repeated = [each for each, count in zip(images, weights, strict=True) for _ in range(count)]
        expected = AveragePrecision(repeated, ["a", "b", "c"])
        for name, values in drawn.items():
            assert values[i] == pytest.approx(expected.value(name), abs=1e-12), name


def kept(boxes):
    return [(box.label, box.score) for box in keep_best(boxes).predictions]


def test_a_wrong_label_on_the_same_object_raises_ap_but_not_nms_ap():
    """One model says one label of each object, the other both; of the second only the better ranked box is counted."""
    one = [image([("cat", A)], [("dog", A, 1.0)]), image([("dog", A)], [("dog", A, 1.0)])]
    said = [("dog", A, 1.0), ("cat", A, 0.5)]
    both = [image([("cat", A)], said), image([("dog", A)], said)]
    labels = ["cat", "dog"]
    # dog: the false box and the right one have equal scores, and the false one stands first.
    assert ap(one, labels) == pytest.approx((0 + 0.5) / 2)
    # cat: of two boxes of equal score the first is right.
    assert ap(both, labels) == pytest.approx((1 + 0.5) / 2)
    assert ap([keep_best(each) for each in both], labels) == ap([keep_best(each) for each in one], labels)
    assert kept(both[0]) == [("dog", 1.0)]


D, E, F = ((left, 0.0, left + 10.0, 10.0) for left in (4.0, 3.0, 2.0))  # they overlap with A and each other
UNREAD = [("a", None, 0.9), ("a", A, 0.5)]
NMS = {
    # The first prediction is near the first true box only, the second near both.
    "best of another true box stays": ([("a", A), ("a", D)], [("a", A, 0.9), ("a", E, 0.8)], [("a", 0.9), ("a", 0.8)]),
    "second on both goes": ([("a", A), ("a", D)], [("a", F, 0.9), ("a", E, 0.8)], [("a", 0.9)]),
    "near none stays": ([("a", A)], [("a", C, 0.1), ("b", C, 0.1)], [("a", 0.1), ("b", 0.1)]),
    "an IoU of 0.5 is not near": ([("a", A)], [("a", A, 0.9), ("a", near(A, 0.5), 0.8)], [("a", 0.9), ("a", 0.8)]),
    "an IoU above 0.5 is": ([("a", A)], [("a", A, 0.9), ("a", near(A, 0.51), 0.8)], [("a", 0.9)]),
    "the first of equal ones": ([("a", A)], [("b", A, 0.5), ("a", A, 0.5)], [("b", 0.5)]),
    "the highest score, not the first": ([("a", A)], [("b", A, 0.4), ("a", A, 0.5)], [("a", 0.5)]),
    "a label that could not be read takes part": ([("a", A)], [(None, A, 0.9), ("a", A, 0.5)], [(None, 0.9)]),
    "a box that could not be read is near none": ([("a", A)], UNREAD, [("a", 0.9), ("a", 0.5)]),
    "no true boxes": ([], [("a", A, 0.9), ("a", A, 0.5)], [("a", 0.9), ("a", 0.5)]),
}


@pytest.mark.parametrize("truths, said, expected", NMS.values(), ids=NMS)
def test_which_boxes_stay(truths, said, expected):
    assert kept(image(truths, said)) == expected


def test_a_crowd_removes_nothing():
    boxes = ImageBoxes((TrueBox("a", A, True),), (ScoredBox("a", A, 0.9), ScoredBox("a", A, 0.5)))
    assert kept(boxes) == [("a", 0.9), ("a", 0.5)]
