"""The accuracy reward of each completion of the task vqa, clicks in the coordinates that the model writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import torch

from vlmr1.data.boxes import scale_between, scale_box
from vlmr1.evaluation.records import Record
from vlmr1.rewards.groups import TimedOut, score_groups
from vlmr1.rewards.methods import method_of
from vlmr1.rewards.pool import RewardPool
from vlmr1.rewards.registry import get_reward
from vlmr1.rewards.settings import RewardSettings
from vlmr1.rewards.strict.iou import true_box
from vlmr1.types import Completion, Group, Prompt, Sample

CLICK = "point_in_box"


def score_vqa(
    samples: Sequence[Sample], records: Sequence[Record], settings: RewardSettings, pool: RewardPool | None = None
) -> tuple[list[float], int]:
    """Return one score in 0..1 a row, and the number of rows that are 0 because they exceeded the pool's time limit."""
    groups = [_group(sample, record, settings) for sample, record in zip(samples, records, strict=True)]
    late: list[TimedOut] = []
    scored = score_groups(groups, [get_reward("accuracy", settings)], pool=pool, timed_out=late)
    return [float(group.rewards[0, 0]) for group in scored if group.rewards is not None], len(late)


def _group(sample: Sample, record: Record, settings: RewardSettings) -> Group:
    """A group of one completion; the true boxes of a click are converted to the coordinates that the model writes."""
    if method_of(sample, settings) == CLICK and record.box_extent and record.image_size:
        scale = scale_between(record.image_size, record.box_extent)
        boxes = [true_box(each) for each in (sample.solution, *sample.other_solutions)]
        solution, *others = [json.dumps(list(scale_box(box, scale))) for box in boxes]
        sample = replace(sample, solution=solution, other_solutions=tuple(others))
    nothing = torch.zeros(0, dtype=torch.long)
    prompt = Prompt(replace(sample, images=()), nothing, nothing[None], (), record.think_opening)
    ids = torch.tensor(record.token_ids, dtype=torch.long)
    return Group(prompt, (Completion(ids, None, None, record.completion, record.finish_reason),))
