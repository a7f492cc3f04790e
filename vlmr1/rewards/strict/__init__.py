"""The rewards without the faults of the published ones. Each scorer is `f(content, solution, **options) -> float`.

A completion answers what its last closed `<answer>` holds; without one it scores 0. Whatever a completion says, it
never raises; a solution that cannot be scored does (`DataError` before training, by `check`).
"""

from vlmr1.rewards.strict.accuracy import accuracy
from vlmr1.rewards.strict.counting import counting
from vlmr1.rewards.strict.form import form, length, rec_form, repetition
from vlmr1.rewards.strict.iou import plain_iou, rec_iou, scaled_iou
from vlmr1.rewards.strict.point import point_in_box

SCORERS = {
    "accuracy": accuracy,
    "format": form,
    "format_rec_qwen": rec_form,
    "format_rec_internvl": rec_form,
    "format_rec_glm": rec_form,
    "iou": rec_iou,
    "iou_qwen": scaled_iou,
    "iou_internvl": plain_iou,
    "iou_glm": plain_iou,
    "length": length,
    "repetition": repetition,
    "counting": counting,
    "point_in_box": point_in_box,
}

__all__ = ["SCORERS"]
