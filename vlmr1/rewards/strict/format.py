"""Strict rewards of format, length and repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vlmr1.rewards.answer import find_answer, has_format, labelled_boxes, predicted_box
from vlmr1.rewards.length import COSINE_MAX, cosine, count_tokens
from vlmr1.rewards.strict.accuracy import accuracy

TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
WORDS = 6  # words of an n-gram
CORRECT = 0.7  # accuracy from which an answer is correct


def answer_format(content: str, solution: str, **options: Any) -> float:
    """Return 1 where the completion is `<think>..</think><answer>..</answer>` with neither part empty, else 0."""
    return float(has_format(content))


def rec_format(content: str, solution: str, **options: Any) -> float:
    """Return 1 where the completion has the format and its answer is one box, else 0."""
    return float(has_format(content) and predicted_box(content) is not None)


def length(
    content: str,
    solution: str,
    *,
    tokenizer: Any = None,
    longest: int = COSINE_MAX,
    accu_reward_method: str = "weighted_sum",
    **options: Any,
) -> float:
    """Return the cosine of the length in tokens, for a correct or a wrong answer; it is constant beyond `longest`."""
    tokens = count_tokens(content, tokenizer)
    score = accuracy(content, solution, accu_reward_method=accu_reward_method, **options)
    return cosine(min(tokens, longest), correct=score >= CORRECT, longest=longest)


def repetition(content: str, solution: str, **options: Any) -> float:
    """Return the lower of -(1 - distinct / all) over the answer's boxes, and over 6-grams of the other words.

    A Chinese, Japanese or Korean character is a word.
    """
    answer = find_answer(content)
    boxes = labelled_boxes(content if answer is None else answer) or []
    text = content.replace(answer, " ") if boxes and answer else "" if boxes else content
    words = TOKEN.findall(text.lower())
    ngrams = list(zip(*(words[i:] for i in range(WORDS)), strict=False))
    return min(_repeated(boxes), _repeated(ngrams))


def _repeated(parts: Sequence[Any]) -> float:
    return (len(set(parts)) - len(parts)) / len(parts) if parts else 0.0
