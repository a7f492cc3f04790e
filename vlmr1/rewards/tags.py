"""Find the answer in a completion or a solution: `<think>` and `<answer>` tags, and the part in which boxes are read.

The answer is the last closed `<answer>`, up to the first `</answer>` after it; of nested ones the innermost. A
completion has the format only if each of the four tags occurs exactly once.
"""

from __future__ import annotations

import re

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FORMAT = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
MARKS = re.compile(r"<\|(?:begin|end)_of_box\|>")  # GLM-4V marks every answer with them, not only boxes


def find_answer(text: str) -> str | None:
    """Return the text of the last closed `<answer>`, stripped and without GLM's marks; None where there is none."""
    answer = _last_answer(text)
    return None if answer is None else MARKS.sub("", answer).strip()


def box_text(text: str) -> str | None:
    """Return the part of a completion in which boxes are read: the last closed `<answer>`, else all behind the thought.

    None where nothing is there, or a `<think>` or `<answer>` is not closed."""
    answer = _last_answer(text)
    if answer is not None:
        return answer
    rest = text.rpartition("</think>")[2].strip()
    return None if not rest or "<think>" in rest or "<answer>" in rest else rest


def _last_answer(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return None
    start += len("<answer>")
    return text[start : text.find("</answer>", start)].strip()


def has_format(text: str, *, allow_empty_think: bool = False) -> bool:
    """Return whether the whole text is `<think>..</think><answer>..</answer>` with neither part empty.

    With `allow_empty_think` the thought may be empty."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    match = FORMAT.fullmatch(text)
    if match is None or not match[2].strip():
        return False
    return allow_empty_think or bool(match[1].strip())


def lacks_thought(text: str) -> bool:
    """Return whether the text would have the format if its thought were not empty."""
    return has_format(text, allow_empty_think=True) and not has_format(text)


def true_text(solution: str) -> str:
    """The text of a solution, inside `<answer>` or bare, stripped."""
    answer = _last_answer(solution)
    return solution.strip() if answer is None else answer
