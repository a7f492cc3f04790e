"""Answers in words, numbers and formulas: the strict accuracy reward of each completion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import torch

from vlmr1.data.boxes import scale_between, scale_box
from vlmr1.data.faults import row_fault
from vlmr1.evaluation.records import Record
from vlmr1.rewards.answer import find_answer
from vlmr1.rewards.check import check_accuracy
from vlmr1.rewards.groups import TimedOut, score_groups
from vlmr1.rewards.methods import method_of
from vlmr1.rewards.pool import RewardPool
from vlmr1.rewards.registry import get_reward
from vlmr1.rewards.settings import RewardSettings
from vlmr1.rewards.strict.iou import true_box
from vlmr1.types import Completion, Group, Prompt, Sample

CLICK = "point_in_box"
IN_WORDS = ("default", "mcq", "yes_no", "math", "all_match", "counting", "llm")
TASK_OF_BOXES = {"iou": "rec", "map": "ovd", "od_ap": "ovd", "od_ap50": "ovd", "odLength": "ovd", "weighted_sum": "ovd"}


def check_answer(sample: Sample, settings: RewardSettings) -> None:
    """A DataError by file and line for a row that its method cannot score."""
    check_accuracy(sample, settings)
    method = method_of(sample, settings)
    if method not in (*IN_WORDS, CLICK):
        task = TASK_OF_BOXES.get(method, "rec")
        raise row_fault(
            sample.source, "method", f"accu_reward_method {method}: --task vqa has no boxes, --task {task} has"
        )
    if method == CLICK and len(sample.images) != 1:
        raise row_fault(sample.source, "images", f"{CLICK} needs one image, the row has {len(sample.images)}")


def answered(text: str) -> bool:
    """Whether there is anything in the completion's answer."""
    return bool(find_answer(text))


def score_vqa(
    samples: Sequence[Sample], records: Sequence[Record], settings: RewardSettings, pool: RewardPool | None = None
) -> tuple[list[float], int]:
    """One score in 0..1 a row, and how many were 0 because the pool's time was up."""
    groups = [_group(sample, record, settings) for sample, record in zip(samples, records, strict=True)]
    late: list[TimedOut] = []
    scored = score_groups(groups, [get_reward("accuracy", settings)], pool=pool, timed_out=late)
    return [float(group.rewards[0, 0]) for group in scored if group.rewards is not None], len(late)


def _group(sample: Sample, record: Record, settings: RewardSettings) -> Group:
    """What the rewards take; a click's true box goes to the coordinates that the model writes."""
    solution = sample.solution
    if method_of(sample, settings) == CLICK and record.box_extent and record.image_size:
        scale = scale_between(record.image_size, record.box_extent)
        solution = json.dumps(list(scale_box(true_box(solution), scale)))
    nothing = torch.zeros(0, dtype=torch.long)
    prompt = Prompt(replace(sample, images=(), solution=solution), nothing, nothing[None])
    ids = torch.tensor(record.token_ids, dtype=torch.long)
    return Group(prompt, (Completion(ids, None, None, record.completion, record.finish_reason),))
