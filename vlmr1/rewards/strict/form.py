"""Strict rewards of form: tags, length, repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vlmr1.rewards.answer import find_answer, has_format, labelled_boxes, predicted_box
from vlmr1.rewards.length import COSINE_MAX, cosine, count_tokens
from vlmr1.rewards.strict.accuracy import accuracy

TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
WORDS = 6  # of an n-gram
CORRECT = 0.7  # accuracy from which an answer is right


def form(content: str, solution: str, **options: Any) -> float:
    """1 where the whole completion is `<think>..</think><answer>..</answer>`, neither empty; else 0."""
    return float(has_format(content))


def rec_form(content: str, solution: str, **options: Any) -> float:
    """1 where the completion has the format and its answer is one box; else 0."""
    return float(has_format(content) and predicted_box(content) is not None)


def length(
    content: str,
    solution: str,
    *,
    tokenizer: Any = None,
    num_tokens: int | None = None,
    longest: int = COSINE_MAX,
    accu_reward_method: str = "weighted_sum",
    **options: Any,
) -> float:
    """The cosine of the length in tokens, by the accuracy of the answer; from `longest` on it stays as it is there.

    The length is `num_tokens`, or what `tokenizer` makes of the completion.
    """
    tokens = count_tokens(content, tokenizer) if num_tokens is None else num_tokens
    score = accuracy(content, solution, accu_reward_method=accu_reward_method, **options)
    return cosine(min(tokens, longest), correct=score >= CORRECT, longest=longest)


def repetition(content: str, solution: str, **options: Any) -> float:
    """The lower of -(1 - distinct / all) of the answer's boxes and of the n-grams of six words of the text around.

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
