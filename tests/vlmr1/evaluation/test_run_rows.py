"""Rows that a run evaluates: what its box metrics cannot read is found before training."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.evaluations import evaluated
from vlmr1.config import GRPOConfig
from vlmr1.errors import DataError, SettingError
from vlmr1.evaluation.run_rows import kind_of_boxes
from vlmr1.rewards.settings import RewardSettings
from vlmr1.types import Sample

BOXES = '[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}]'
BOX = "[1, 2, 30, 40]"


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    Image.new("RGB", (60, 60)).save(folder / "a.png")
    path = folder / "eval.jsonl"
    whole = ({"image": "a.png", "prompt": "<image>?", "solution": BOXES} | row for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in whole))
    return path


def samples_of(path: Path, processor: Any, *methods: str, **more: Any) -> Any:
    settings = {"eval_steps": 1, "eval_data_file_paths": [str(path)], "eval_image_folders": [str(path.parent)]}
    settings |= {"output_dir": str(path.parent / "out"), "use_cpu": True, "accu_reward_method": list(methods)} | more
    return evaluated(GRPOConfig(**settings), processor)


FAULTS = {
    "labels": ({"labels": [3, 7]}, "the column labels is not a list of texts"),
    "crowd": ({"crowd": [True, False]}, "the column crowd has not one value for each box"),
}


@pytest.mark.parametrize("column, message", FAULTS.values(), ids=FAULTS)
def test_columns_of_boxes(column, message, tmp_path, processor):
    path = write(tmp_path, {}, column)
    with pytest.raises(DataError, match=rf"eval\.jsonl:2: {message}"):
        samples_of(path, processor, "od_ap")
    assert len(samples_of(path, processor, "od_ap", eval_limit=1)) == 1
    assert len(samples_of(path, processor, "od_ap", reward_funcs=["format"])) == 2
    mixed = write(tmp_path, column, {"solution": BOX, "accu_reward_method": "iou"})
    assert len(samples_of(mixed, processor, "od_ap")) == 2  # there are no box metrics of these


def test_a_validation_part_is_checked_too(tmp_path, processor):
    sample = Sample([], (tmp_path / "a.png",), BOXES, "data.jsonl:3", 2, {"labels": [3, 7]})
    none = {"eval_data_file_paths": [], "eval_image_folders": []}
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, accu_reward_method=["od_ap"], eval_steps=1, **none)
    with pytest.raises(DataError, match=r"data\.jsonl:3: the column labels"):
        evaluated(config, processor, [sample])


def test_methods_of_several_training_files(tmp_path, processor):
    own = {"solution": BOX, "accu_reward_method": "iou"}
    found = samples_of(write(tmp_path, own, {"accu_reward_method": "od_ap"}), processor, "mcq", "iou")
    assert [sample.columns["accu_reward_method"] for sample in found] == ["iou", "od_ap"]
    message = (
        r"accu_reward_method has 2 methods, eval_data_file_paths 1 file, and .*eval\.jsonl:2 has no column "
        "accu_reward_method: give eval_data_file_paths one file for each method, or its rows that column"
    )
    with pytest.raises(SettingError, match=message):
        samples_of(write(tmp_path, own, {}), processor, "mcq", "iou")


KINDS = {
    "rec": ("strict", ["iou", "iou"], 1, "rec"),
    "ovd": ("strict", ["map", "odLength"], 1, "ovd"),
    "both": ("strict", ["iou", "map"], 1, None),
    "words": ("strict", ["iou", "mcq"], 1, None),
    "two images": ("strict", ["iou", "iou"], 2, None),
    "published": ("vlm_r1", ["iou", "iou"], 1, None),
}


@pytest.mark.parametrize("mode, methods, images, kind", KINDS.values(), ids=KINDS)
def test_kind_of_boxes(mode, methods, images, kind):
    paths = (Path("a.png"),) * images
    samples = [Sample([], paths, BOX, "data.jsonl:1", 0, {"accu_reward_method": method}) for method in methods]
    assert kind_of_boxes(samples, RewardSettings(mode=mode)) == kind
