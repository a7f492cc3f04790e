"""Rewards as published by VLM-R1 (github.com/om-ai-lab/VLM-R1), faults and exceptions included, to 1e-9.

Each scorer is `f(content, solution, **options) -> float`; `strict` has the same names without the faults.
"""

from vlmr1.rewards.vlm_r1.accuracy import accuracy
from vlmr1.rewards.vlm_r1.format import answer_format, length, rec_format, repetition
from vlmr1.rewards.vlm_r1.iou import box_iou

SCORERS = {
    "accuracy": accuracy,
    "format": answer_format,
    "format_rec_qwen": rec_format("qwen"),
    "format_rec_internvl": rec_format("internvl"),
    "format_rec_glm": rec_format("glm"),
    "iou": box_iou("internvl"),
    "iou_qwen": box_iou("qwen"),
    "iou_internvl": box_iou("internvl"),
    "iou_glm": box_iou("glm"),
    "length": length,
    "repetition": repetition,
}

__all__ = ["SCORERS"]
