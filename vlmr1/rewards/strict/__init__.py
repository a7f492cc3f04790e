"""The rewards of mode strict, without the faults of the published ones.

Each scorer is `f(content, solution, **options) -> float`. The answer of a completion is its last closed `<answer>`;
without one it scores 0. No completion makes a scorer raise; a solution that cannot be scored does, and `check` finds it
before training.
"""

from vlmr1.rewards.strict.accuracy import accuracy
from vlmr1.rewards.strict.counting import counting
from vlmr1.rewards.strict.format import answer_format, length, rec_format, repetition
from vlmr1.rewards.strict.iou import plain_iou, rec_iou, scaled_iou
from vlmr1.rewards.strict.point import point_in_box

SCORERS = {
    "accuracy": accuracy,
    "format": answer_format,
    **dict.fromkeys(("format_rec_qwen", "format_rec_internvl", "format_rec_glm"), rec_format),
    "iou": rec_iou,
    "iou_qwen": scaled_iou,
    **dict.fromkeys(("iou_internvl", "iou_glm"), plain_iou),
    "length": length,
    "repetition": repetition,
    "counting": counting,
    "point_in_box": point_in_box,
}

__all__ = ["SCORERS"]
