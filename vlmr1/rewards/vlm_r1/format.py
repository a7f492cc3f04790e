"""Published rewards of format, length and repetition."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from vlmr1.rewards.length import cosine, count_tokens
from vlmr1.rewards.vlm_r1.detection import detection_score
from vlmr1.rewards.vlm_r1.iou import Family
from vlmr1.rewards.vlm_r1.repair import repair
from vlmr1.rewards.vlm_r1.tags import FENCE, clean

FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
NUMBERS = r"\[\d+,\s*\d+,\s*\d+,\s*\d+\]"
REC_FORMATS = {
    "qwen": re.compile(rf"<think>.*?</think>\s*<answer>.*?\{{.*{NUMBERS}.*\}}.*?</answer>", re.DOTALL),
    "internvl": re.compile(rf"<think>.*?</think>\s*<answer>.*?{NUMBERS}.*?</answer>", re.DOTALL),
    "glm": re.compile(r"<think>.*?<answer>.*?</answer>", re.DOTALL),
}
ANY_FENCE = re.compile(r"```(.*?)```", re.DOTALL)
BARE_BOXES = re.compile(r'\[\s*{.*?"bbox_2d".*?"label".*?}\s*\]', re.DOTALL)
WORDS = 6  # words of an n-gram


def answer_format(content: str, solution: str, **options: Any) -> float:
    """Return 1 where the whole completion is `<think>` and `<answer>`, which may be empty, else 0."""
    return float(FORMAT.fullmatch(content) is not None)


def rec_format(family: Family) -> Callable[..., float]:
    """Return the format reward of a family: 1 where the completion matches its pattern, else 0.

    Qwen needs a box in an object, InternVL a box, GLM an opened `<think>` and an answer."""
    return lambda content, solution, **options: float(REC_FORMATS[family].search(content) is not None)


def length(content: str, solution: str, *, tokenizer: Any, **options: Any) -> float:
    """Return the cosine of the length in tokens for a correct answer, whatever the answer; it is periodic."""
    answer, expected = clean(content), clean(solution)
    if expected != "none":
        detection_score(answer, expected)  # its value has no effect, but what it raises has
    return cosine(count_tokens(content, tokenizer), correct=True)


def repetition(content: str, solution: str, **options: Any) -> float:
    """Return -(1 - distinct / all) over boxes, or over n-grams of words where there is no JSON."""
    boxes = _boxes(content)
    if boxes is not None:
        return _repeated(boxes) if boxes else 0.0
    words = content.lower().split()
    if len(words) < WORDS:
        return 0.0
    return _repeated(list(zip(*(words[i:] for i in range(WORDS)), strict=False)))


def _repeated(parts: Sequence[Any]) -> float:
    return -(1 - len(set(parts)) / len(parts))


def _boxes(content: str) -> list[str] | None:
    """Texts of the boxes in the first JSON; None where no list can be read."""
    found = FENCE.search(content) or ANY_FENCE.search(content)
    text = found[1].strip() if found else ""
    if not text and (found is None or found.re is ANY_FENCE):
        bare = BARE_BOXES.search(content)
        text = bare[0] if bare else ""
    if not text:
        return None
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        data = repair(text)
    if not data or not isinstance(data, list):
        return None
    return [f"{item['bbox_2d']}_{item['label']}" for item in data if "bbox_2d" in item and "label" in item]
