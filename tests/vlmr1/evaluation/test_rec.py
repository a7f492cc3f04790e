"""Referring expressions: shares and means over known boxes."""

import pytest

from vlmr1.evaluation.rec import RecResult, score_rec

SOLUTION = "<answer>[0, 0, 10, 10]</answer>"


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
    result = score_rec(texts, [SOLUTION] * 8)
    assert result.ious == pytest.approx((1, 1 / 3, 0.5, 0.51, 0, 0, 0, 0))
    assert result.accuracy == 2 / 8
    assert result.mean_iou == pytest.approx((1 + 1 / 3 + 0.5 + 0.51) / 8)
    assert result.format_share == 4 / 8
    assert result.parse_failure_share == 3 / 8


def test_each_text_meets_its_own_solution():
    solutions = ["[0, 0, 2, 2]", '{"bbox_2d": [10, 10, 20, 20]}']
    result = score_rec([f"<answer>{solution}</answer>" for solution in solutions], solutions)
    assert result == RecResult((1.0, 1.0), accuracy=1.0, mean_iou=1.0, format_share=0.0, parse_failure_share=0.0)


@pytest.mark.parametrize(
    "texts, solutions, message",
    [
        ([], [], "0 completions for 0 solutions"),
        (["a"], [SOLUTION] * 2, "1 completions for 2 solutions"),
        (["a"], ["seven"], "the solution has no box: 'seven'"),
    ],
    ids=["empty", "counts", "solution"],
)
def test_what_cannot_be_scored(texts, solutions, message):
    with pytest.raises(ValueError) as caught:
        score_rec(texts, solutions)
    assert str(caught.value) == message
