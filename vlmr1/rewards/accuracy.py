"""The accuracy reward of referring expressions: how well the predicted box covers the right one."""

from __future__ import annotations

from typing import Any

from vlmr1.errors import DataError
from vlmr1.rewards.answer import iou, predicted_box, solution_box
from vlmr1.rewards.registry import register
from vlmr1.types import Sample


def check_box(sample: Sample) -> None:
    """Raises DataError where the solution holds no box with an area."""
    if solution_box(sample.solution) is None:
        raise DataError(
            f'{sample.source}: the solution has no box {{"bbox_2d": [x1, y1, x2, y2]}} with an area: '
            f"{sample.solution[:120]!r}"
        )


@register("accuracy", check=check_box)
def accuracy_reward(
    prompts: list[list[dict[str, Any]]],
    completions: list[list[dict[str, str]]],
    *,
    solution: list[str],
    **columns: list[Any],
) -> list[float]:
    """IoU of the box in the last `<answer>` with the solution's, 0..1; 0 where no box can be parsed."""
    return [box_iou(completion[-1]["content"], truth) for completion, truth in zip(completions, solution, strict=True)]


def box_iou(text: str, solution: str) -> float:
    """IoU of a completion's box with the solution's; 0 where the completion has none."""
    truth = solution_box(solution)
    if truth is None:
        raise ValueError(f"the solution has no box: {solution[:120]!r}")
    box = predicted_box(text)
    return 0.0 if box is None else iou(box, truth)
