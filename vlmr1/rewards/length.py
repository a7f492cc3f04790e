"""Length rewards: the cosine of Yeo et al. and the soft overlong punishment of DAPO."""

from __future__ import annotations

import math
from typing import Any

COSINE_MAX = 1024  # tokens of the longest completion
CORRECT = 1.0, 0.5  # a correct answer of no tokens, and of the most
WRONG = -0.5, 0.0


def cosine(length: int, *, correct: bool, longest: int = COSINE_MAX) -> float:
    """Return s + (e - s) * (1 - cos(pi * length / longest)) / 2, periodic in 2 * longest.

    (s, e) is (1, 0.5) for a correct answer and (-0.5, 0) for a wrong one. Short correct answers and long wrong answers
    score higher. Source: Yeo et al. 2025, arXiv:2502.03373, section 4.
    """
    start, end = CORRECT if correct else WRONG
    return start - (start - end) * (1 - math.cos(length * math.pi / longest)) / 2


def overlong(length: int, max_length: int, cache: int) -> float:
    """Return 0 up to max_length - cache tokens, then -(length - (max_length - cache)) / cache, at least -1.

    Source: DAPO, arXiv:2503.14476, equation 13.
    """
    return -min(1.0, max(0.0, (length - (max_length - cache)) / cache))


def count_tokens(text: str, tokenizer: Any) -> int:
    """Count the tokens of a text; `tokenizer` has `encode`, is "whitespace" to count words, or is the known number."""
    if isinstance(tokenizer, int):
        return tokenizer
    if tokenizer == "whitespace":
        return len(text.split())
    if not hasattr(tokenizer, "encode"):
        raise TypeError(f"tokenizer is {tokenizer!r}: it must have encode, or be 'whitespace'")
    return len(tokenizer.encode(text))
