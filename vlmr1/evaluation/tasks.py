"""The tasks of an evaluation by name: how a row is checked, and how completions are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from vlmr1.evaluation.detection import check_detection, detection_scores, score_ovd_rows
from vlmr1.evaluation.rec import check_rec, score_rec, score_rec_rows
from vlmr1.evaluation.records import Record
from vlmr1.evaluation.scoring import Scored, check_one_image
from vlmr1.evaluation.vqa import check_answer, has_clicks, score_vqa_rows
from vlmr1.rewards.pool import RewardPool
from vlmr1.rewards.settings import RewardSettings
from vlmr1.types import Sample

Check = Callable[[Sample], None]


def check_of(task: str, rewards: RewardSettings) -> Check:
    """Return the function that raises DataError for a row that the task cannot score."""
    if task == "vqa":
        return partial(check_answer, settings=rewards)
    return check_rec if task == "rec" else _check_ovd


def writes_boxes(task: str, samples: Sequence[Sample], rewards: RewardSettings) -> bool:
    """Return whether completions hold boxes or points, so that the coordinates of the model matter."""
    return task != "vqa" or has_clicks(samples, rewards)


def score_task(
    task: str,
    samples: Sequence[Sample],
    records: Sequence[Record],
    *,
    rewards: RewardSettings | None = None,
    pool: RewardPool | None = None,
) -> Scored:
    """Score one completion a row. `rewards` and `pool` are for vqa."""
    if task == "rec":
        return score_rec_rows(samples, records)
    if task == "ovd":
        return score_ovd_rows(samples, records)
    return score_vqa_rows(samples, records, rewards or RewardSettings(accu_reward_method="default"), pool)


def box_metrics(task: str, samples: Sequence[Sample], records: Sequence[Record]) -> dict[str, float]:
    """Metrics of rec or ovd as numbers by name, without intervals."""
    if task == "rec":
        texts, sizes = [record.completion for record in records], [record.sizes for record in records]
        result = score_rec(texts, [sample.solution for sample in samples], sizes)
        return {"acc@0.5": result.accuracy, "mean_iou": result.mean_iou}
    scores = detection_scores(samples, records)
    return {name: scores.plain.value(name) for name in ("ap", "ap50")} | {"nms_ap": scores.best.value("ap")}


def _check_ovd(sample: Sample) -> None:
    check_one_image(sample, "ovd")
    check_detection(sample)
