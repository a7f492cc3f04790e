"""Records -> metrics of each task, with numbers worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlmr1.evaluation.rec import RecResult, score_rec
from vlmr1.evaluation.records import Record
from vlmr1.evaluation.tasks import score_task
from vlmr1.rewards.settings import RewardSettings
from vlmr1.types import Sample

SIZE = (100, 100)
IMAGE = (Path("a.png"),)


def sample(solution, **columns) -> Sample:
    text = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    return Sample([text], IMAGE, solution, "data.jsonl:1", 0, columns)


def record(row, answer, reason="stop", extent=SIZE, tokens=4) -> Record:
    text = f"<think>a</think><answer>{answer}</answer>"
    return Record(row, "data.jsonl:1", (1,) * tokens, text, reason, SIZE, extent)


def values(scored) -> dict[str, float | None]:
    return {name: None if m.value is None else pytest.approx(m.value) for name, m in scored.metrics.items()}


def test_rec():
    samples = [sample("[0, 0, 10, 10]")] * 4
    records = [
        record(0, "[0, 0, 10, 10]"),
        record(1, "[0, 0, 100, 50]", extent=(1000, 1000), tokens=8),  # 10 x 5 px: 0.5, which is not above
        record(2, "here", "length"),
        Record(3, "data.jsonl:1", (), "[0, 0, 10, 10]", "stop", SIZE, SIZE, "<think>"),
    ]
    assert values(score_task("rec", samples, records)) == {
        "acc@0.5": 0.25,
        "mean_iou": 1.5 / 4,
        "format_share": 0.75,
        "parse_failure_share": 0.5,
        "truncated_share": 0.25,
        "completion_length": 4.0,
    }


def boxes(*entries) -> str:
    return json.dumps([{"bbox_2d": list(box), "label": label} for label, box in entries])


A, B = (0, 0, 10, 10), (20, 0, 30, 10)


def test_ovd():
    """Labels a and b have true boxes; c is asked for and has none; zebra is not known."""
    samples = [sample(boxes(("a", A), ("b", B)), labels=["A", "b", "c"]), sample("None", labels=["A", "b", "c"])]
    records = [record(0, boxes(("b", A), ("a", A), ("b", B), ("zebra", A))), record(1, boxes(("c", A)))]
    scored = score_task("ovd", samples, records)
    found = values(scored)
    # AP: a is right, of b the first box is false; NMS-AP: the first box on A is b's, so a's is removed.
    assert (found["ap"], found["ap50"], found["ap75"]) == (0.75, 0.75, 0.75)
    assert found["nms_ap"] == 0.25
    assert found["unknown_label_share"] == 1 / 5 and found["parse_failure_share"] == 0.0
    by_label = scored.counts.pop("ap_by_label")
    assert by_label == {"a": pytest.approx(1.0), "b": pytest.approx(0.5)}
    assert scored.counts == {"rows": 2, "labels": 3, "true_boxes": 2, "predicted_boxes": 5}
    assert [case.score for case in scored.cases] == [pytest.approx(2 * 2 / 6), 0.0]
    # An image is drawn twice or both once: a draw without the first has no true box and no value.
    assert np.isnan(scored.metrics["ap"].replicates).any() and scored.metrics["ap"].low == pytest.approx(0.75)


def test_ovd_boxes_are_converted_and_failures_are_counted():
    samples = [sample(boxes(("a", A)))] * 2
    records = [record(0, boxes(("a", [10 * x for x in A])), extent=(1000, 1000)), record(1, "a cat", "length")]
    found = values(score_task("ovd", samples, records))
    assert found["ap"] == pytest.approx(51 / 101) and found["parse_failure_share"] == 0.5
    assert found["unknown_label_share"] == 0.0
    nothing = values(score_task("ovd", samples, [record(0, "None"), record(1, "None")]))
    assert nothing["ap"] == 0.0 and nothing["unknown_label_share"] is None


def test_vqa_by_method():
    samples = [
        sample("B", accu_reward_method="mcq"),
        sample("yes", accu_reward_method="yes_no"),
        sample("no", accu_reward_method="yes_no"),
        sample("12"),
    ]
    records = [record(0, "(B)"), record(1, "yes"), record(2, "yes"), Record(3, "x", (), "12", "stop")]
    scored = score_task("vqa", samples, records, rewards=RewardSettings(accu_reward_method="default"))
    found = values(scored)
    assert found["score"] == 0.5 and found["parse_failure_share"] == 0.25
    by_method = {name: found[f"score/{name}"] for name in ("default", "mcq", "yes_no")}
    assert by_method == {"default": 0.0, "mcq": 1.0, "yes_no": 0.5}
    assert scored.counts["rows_by_method"] == {"default": 1, "mcq": 1, "yes_no": 2} and scored.counts["timed_out"] == 0
    assert next(iter(scored.metrics)) == "score" and [case.score for case in scored.cases] == [1.0, 1.0, 0.0, 0.0]


def test_vqa_of_one_method_has_one_score():
    rewards = RewardSettings(accu_reward_method="math")
    scored = score_task("vqa", [sample("1/2")], [record(0, "\\frac{1}{2}")], rewards=rewards)
    assert [name for name in scored.metrics if name.startswith("score")] == ["score"]
    assert scored.metrics["score"].value == 1.0


def test_clicks_are_compared_in_the_models_coordinates():
    rewards = RewardSettings(accu_reward_method="point_in_box")
    samples = [sample("[10, 10, 20, 20]")] * 2
    records = [record(0, "(150, 150)", extent=(1000, 1000)), record(1, "(15, 15)", extent=(1000, 1000))]
    assert [case.score for case in score_task("vqa", samples, records, rewards=rewards).cases] == [1.0, 0.0]
    several = [replace(each, solution="[50, 50, 60, 60]", other_solutions=(each.solution,)) for each in samples]
    assert [case.score for case in score_task("vqa", several, records, rewards=rewards).cases] == [1.0, 0.0]


def test_score_rec():
    texts = [
        "<think>a</think><answer>[0, 0, 10, 10]</answer>",  # 1
        "<think>a</think><answer>[5, 0, 15, 10]</answer>",  # 1/3
        "<answer>[0, 0, 10, 5]</answer>",  # 0.5: not above it
        "<answer>[0, 0, 10, 5.1]</answer>",  # 0.51
        "<think>a</think><answer>[10, 10, 0, 0]</answer>",  # inverted
        "<think>a</think><answer>here</answer>",
        "",
        "<answer>[0, 0, 10, 10]",
    ]
    result = score_rec(texts, ["<answer>[0, 0, 10, 10]</answer>"] * 8)
    assert result.ious == pytest.approx((1, 1 / 3, 0.5, 0.51, 0, 0, 0, 0))
    assert result.accuracy == 2 / 8
    assert result.mean_iou == pytest.approx((1 + 1 / 3 + 0.5 + 0.51) / 8)
    assert result.format_share == 4 / 8
    assert result.parse_failure_share == 3 / 8


def test_each_text_meets_its_own_solution():
    solutions = ["[0, 0, 2, 2]", '{"bbox_2d": [10, 10, 20, 20]}']
    result = score_rec([f"<answer>{solution}</answer>" for solution in solutions], solutions)
    assert result == RecResult((1.0, 1.0), accuracy=1.0, mean_iou=1.0, format_share=0.0, parse_failure_share=0.0)
