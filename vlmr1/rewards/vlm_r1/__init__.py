"""Rewards as published by VLM-R1 (github.com/om-ai-lab/VLM-R1), faults and exceptions included, to 1e-9.

Each scorer is `f(content, solution, **options) -> float`; `strict` has the same names without the faults.
"""

from vlmr1.rewards.vlm_r1.accuracy import accuracy
from vlmr1.rewards.vlm_r1.format import answer_format, length, rec_format, repetition
from vlmr1.rewards.vlm_r1.iou import FAMILIES, IOUS

SCORERS = {
    "accuracy": accuracy,
    "format": answer_format,
    **{f"format_rec_{family}": rec_format(family) for family in FAMILIES},
    **IOUS,
    "length": length,
    "repetition": repetition,
}

__all__ = ["SCORERS"]
