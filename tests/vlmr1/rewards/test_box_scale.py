"""The factor that a logged completion's boxes are drawn with: that with which a reward has scored them, or none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from vlmr1.data.box_coordinates import BoxCoordinates
from vlmr1.report.progress import Progress
from vlmr1.rewards import get_reward
from vlmr1.rewards.settings import RewardSettings
from vlmr1.types import Prompt, Sample

CASES = {
    "accuracy": (["format", "accuracy"], "iou", None, (0.2, 0.1)),
    "accuracy in words": (["accuracy"], "mcq", None, None),
    "the row's own method": (["accuracy"], "mcq", "odLength", (0.2, 0.1)),
    "iou": (["iou"], "mcq", None, (0.2, 0.1)),
    "a point": (["point_in_box"], "mcq", None, (0.2, 0.1)),
    "not converted": (["iou_internvl"], "iou", None, None),
    "not converted, then converted": (["iou_internvl", "accuracy"], "iou", None, (0.2, 0.1)),
}


@pytest.mark.parametrize("rewards, method, own, expected", CASES.values(), ids=CASES)
def test_box_scale(rewards, method, own, expected, tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    settings = RewardSettings(accu_reward_method=method, boxes=BoxCoordinates("thousand"))
    progress = Progress(Path(tmp_path), console=False)
    progress.trainer = SimpleNamespace(rewards=[get_reward(name, settings) for name in rewards])
    columns = {} if own is None else {"accu_reward_method": own}
    sample = Sample([], (tmp_path / "a.png",), "[1, 2, 3, 4]", "data.jsonl:1", 0, columns)
    nothing = torch.zeros(0, dtype=torch.long)
    assert progress._box_scale(Prompt(sample, nothing, nothing[None])) == expected
