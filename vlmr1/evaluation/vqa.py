"""The task vqa: answers in words, numbers and formulas, and clicks, scored by the strict accuracy reward."""

from __future__ import annotations

from collections.abc import Sequence

from vlmr1.data.faults import row_fault
from vlmr1.evaluation.bootstrap import ratio
from vlmr1.evaluation.records import Record
from vlmr1.evaluation.scoring import Scored, completion_metrics
from vlmr1.evaluation.vqa_scores import CLICK, score_vqa
from vlmr1.report.cases import Case
from vlmr1.rewards.answer import find_answer
from vlmr1.rewards.check import check_accuracy
from vlmr1.rewards.methods import method_of
from vlmr1.rewards.pool import RewardPool
from vlmr1.rewards.settings import RewardSettings
from vlmr1.types import Sample

IN_WORDS = ("default", "mcq", "yes_no", "math", "all_match", "counting", "llm")
TASK_OF_BOXES = {"iou": "rec", "map": "ovd", "od_ap": "ovd", "od_ap50": "ovd", "odLength": "ovd", "weighted_sum": "ovd"}


def check_answer(sample: Sample, settings: RewardSettings) -> None:
    """Raise DataError for a row that its method cannot score."""
    check_accuracy(sample, settings)
    method = method_of(sample, settings)
    if method not in (*IN_WORDS, CLICK):
        task = TASK_OF_BOXES.get(method, "rec")
        raise row_fault(
            sample.source, "method", f"accu_reward_method {method}: --task vqa has no boxes, --task {task} has"
        )
    if method == CLICK and len(sample.images) != 1:
        raise row_fault(sample.source, "images", f"{CLICK} needs one image, the row has {len(sample.images)}")


def has_clicks(samples: Sequence[Sample], settings: RewardSettings) -> bool:
    """Return whether a row is about a place on its image."""
    return any(method_of(sample, settings) == CLICK for sample in samples)


def score_vqa_rows(
    samples: Sequence[Sample], records: Sequence[Record], settings: RewardSettings, pool: RewardPool | None
) -> Scored:
    """Mean scores with bootstrap intervals, over all rows and by method, and one case a row."""
    scores, late = score_vqa(samples, records, settings, pool)
    methods = [method_of(sample, settings) for sample in samples]
    by_method = {
        f"score/{method}": ratio(
            [score * (each == method) for score, each in zip(scores, methods, strict=True)],
            [float(each == method) for each in methods],
        )
        for method in sorted(set(methods))
    }
    metrics = {
        "score": ratio(scores),
        **(by_method if len(by_method) > 1 else {}),
        **completion_metrics(records, failed=[not find_answer(record.text) for record in records]),
    }
    counts = {
        "rows": len(records),
        "rows_by_method": {method: methods.count(method) for method in sorted(set(methods))},
        "timed_out": late,
    }
    cases = [
        Case(sample=sample, completion=record.completion, score=score, solution=sample.solution)
        for sample, record, score in zip(samples, records, scores, strict=True)
    ]
    return Scored(metrics, counts, cases)
