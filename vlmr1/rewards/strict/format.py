"""Strict rewards of format, length and repetition."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from vlmr1.rewards.answer import find_answer, has_format, labelled_boxes, predicted_box
from vlmr1.rewards.length import COSINE_MAX, cosine, count_tokens
from vlmr1.rewards.strict.accuracy import accuracy

TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
FENCE = re.compile(r"```(?:json)?(.*)```", re.DOTALL)
WORDS = 6  # words of an n-gram
CORRECT = 0.7  # accuracy from which an answer is correct


def answer_format(content: str, solution: str, *, allow_empty_think: bool = False, **options: Any) -> float:
    """Return 1 where the completion is `<think>..</think><answer>..</answer>` with neither part empty, else 0.

    With `allow_empty_think` the thought may be empty."""
    return float(has_format(content, allow_empty_think=allow_empty_think))


def rec_format(content: str, solution: str, **options: Any) -> float:
    """Return 1 where the completion has the format, as `answer_format`, and one box in its answer, else 0."""
    return float(answer_format(content, solution, **options) == 1 and predicted_box(content) is not None)


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
    said = content if answer is None else answer
    boxes = (labelled_boxes(said) or []) if _is_json(said) else []
    text = content.replace(answer, " ") if boxes and answer else "" if boxes else content
    words = TOKEN.findall(text.lower())
    ngrams = list(zip(*(words[i:] for i in range(WORDS)), strict=False))
    return min(_repeated(boxes), _repeated(ngrams))


def _is_json(text: str) -> bool:
    """Return whether the whole text is JSON, in a code fence or not."""
    fenced = FENCE.fullmatch(text.strip())
    try:
        json.loads(fenced[1] if fenced else text, parse_int=float)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def _repeated(parts: Sequence[Any]) -> float:
    return (len(set(parts)) - len(parts)) / len(parts) if parts else 0.0
