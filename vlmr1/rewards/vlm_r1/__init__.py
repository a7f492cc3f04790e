"""Rewards as VLM-R1 published them (github.com/om-ai-lab/VLM-R1), faults and exceptions included, to 1e-9.

Each scorer is `f(content, solution, **options) -> float`; `strict` has the same names without the faults.
"""

from vlmr1.rewards.vlm_r1.accuracy import accuracy
from vlmr1.rewards.vlm_r1.form import form, length, rec_form, repetition
from vlmr1.rewards.vlm_r1.iou import box_iou

SCORERS = {
    "accuracy": accuracy,
    "format": form,
    "format_rec_qwen": rec_form("qwen"),
    "format_rec_internvl": rec_form("internvl"),
    "format_rec_glm": rec_form("glm"),
    "iou": box_iou("internvl"),
    "iou_qwen": box_iou("qwen"),
    "iou_internvl": box_iou("internvl"),
    "iou_glm": box_iou("glm"),
    "length": length,
    "repetition": repetition,
}

__all__ = ["SCORERS"]
