"""Benchmarks' annotation files as rows: RefCOCO's JSON, COCO's, OVDEval's; and faults by file and place."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vlmr1.errors import DataError
from vlmr1.evaluation.coco import TrueBox
from vlmr1.evaluation.detection import asked_labels, true_boxes_of
from vlmr1.evaluation.options import Options
from vlmr1.evaluation.rows import load_rows
from vlmr1.rewards.answer import solution_box


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "train2014/b.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / name)
    return tmp_path


def load(folder: Path, content, task="rec", name="data.json", **options):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    given = Options(task, (str(folder / name),), (str(folder / "images"),), question_template="none", **options)
    return load_rows(given, "qwen2_5_vl")


def words(sample):
    return sample.messages[-1]["content"][-1]["text"]


REF = [
    {
        "image": "train2014/b.png",
        "problem": "Please provide the bounding box coordinate of the region this sentence describes: left cat",
        "normal_caption": "left cat",
        "solution": [1, 2, 30, 20],
        "normalized_solution": [25, 66, 750, 666],
    },
    {"image": "a.png", "problem": "the dog", "solution": [0.5, 2.25, 30, 20], "normalized_solution": [1, 2, 3, 4]},
]


def test_refcoco(folder):
    samples = load(folder, REF).samples
    assert [words(sample) for sample in samples] == [REF[0]["problem"], "the dog"]
    assert [solution_box(sample.solution) for sample in samples] == [(1, 2, 30, 20), (0.5, 2.25, 30, 20)]
    assert [sample.source for sample in samples] == [f"{folder}/data.json:2", f"{folder}/data.json:19"]
    assert samples[0].columns == {"normal_caption": "left cat", "normalized_solution": [25, 66, 750, 666]}
    assert samples[0].images == (folder / "images/train2014/b.png",)
    assert samples[0].messages[0]["content"][0] == {"type": "image"}


def test_refcoco_with_columns_of_other_names(folder):
    (sample,) = load(folder, REF[:1], prompt_column="normal_caption").samples
    assert words(sample) == "left cat" and solution_box(sample.solution) == (1, 2, 30, 20)
    (sample,) = load(folder, REF[:1], prompt_column="text", solution_column="box").samples
    assert words(sample) == REF[0]["problem"] and solution_box(sample.solution) == (1, 2, 30, 20)


def fault(folder, content, task="rec", **options):
    with pytest.raises(DataError) as caught:
        load(folder, content, task, **options)
    return str(caught.value).replace(str(folder), "F")


def test_an_image_that_cannot_be_decoded(folder):
    (folder / "images/a.png").write_bytes(b"no image")
    assert fault(folder, REF).startswith("F/data.json:19: image F/images/a.png cannot be decoded")
    # Of several faults the first is named: the image waits for its decoder while the second row is read.
    assert fault(folder, [REF[1], {**REF[0], "solution": "no box"}]).startswith("F/data.json:2: image F/images/a.png")


def test_limit_and_digest(folder):
    every, first = load(folder, REF), load(folder, REF, limit=1)
    assert (len(every.samples), len(first.samples)) == (2, 1)
    same = load(folder, REF, limit=2, name="other.json").digest
    assert every.digest == same != first.digest
    assert load(folder, [REF[0], {**REF[1], "solution": [0.5, 2.25, 30, 21]}]).digest != every.digest
    Image.new("RGB", (41, 30)).save(folder / "images/a.png")
    assert load(folder, REF).digest != every.digest


COCO = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 5, "file_name": "train2014/b.png", "width": 40, "height": 30},
    ],
    "categories": [{"id": 0, "name": "Cat"}, {"id": 3, "name": "traffic light"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1.5, 2, 10, 5], "iscrowd": 0, "area": 50},
        {"id": 2, "image_id": 7, "category_id": 0, "bbox": [0, 0, 40, 30], "iscrowd": 1, "area": 1200},
        {"id": 3, "image_id": 7, "category_id": 0, "bbox": [3, 3, 0, 5], "iscrowd": 0, "area": 0},
    ],
}


def test_coco(folder):
    one, two = load(folder, COCO, "ovd").samples
    assert true_boxes_of(one) == (
        TrueBox("traffic light", (1.5, 2.0, 11.5, 7.0)),
        TrueBox("cat", (0.0, 0.0, 40.0, 30.0), True),
    )
    assert true_boxes_of(two) == () and two.solution == "None"
    assert asked_labels(one) == asked_labels(two) == ["cat", "traffic light"]
    assert words(one) == words(two) and '["Cat", "traffic light"]' in words(one)
    assert '```json\n[{"bbox_2d": [x1, y1, x2, y2], "label": "one of these names"}]\n```' in words(one)
    assert [sample.source for sample in (one, two)] == [f"{folder}/data.json:images[{i}]" for i in (0, 1)]


def test_coco_with_labels_of_each_image(folder):
    """OVDEval: an image is asked for what it has and for what it has not."""
    images = [COCO["images"][0] | {"text": ["traffic light"], "neg_text": ["red light"]}, COCO["images"][1]]
    one, two = load(folder, COCO | {"images": images}, "ovd").samples
    assert asked_labels(one) == ["red light", "traffic light"] and '["red light", "traffic light"]' in words(one)
    assert asked_labels(two) == ["cat", "traffic light"]


def test_other_json_is_as_in_training(folder):
    row = {"image": "a.png", "prompt": "Where?", "solution": "[1, 2, 3, 4]"}
    (sample,) = load(folder, json.dumps(row) + "\n").samples  # JSON lines in a .json file
    assert words(sample) == "Where?" and sample.source == f"{folder}/data.json:1"
    turns = [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "[1, 2, 3, 4]"}]
    row = {"image": "a.png", "conversations": turns, "problem": "x"}
    (sample,) = load(folder, json.dumps(row), name="d.jsonl").samples
    assert words(sample) == "Where?" and sample.columns == {"problem": "x"}
