"""The parts of a text that the published rewards read, which differ between rewards."""

from __future__ import annotations

import re

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
ANSWER_OF_ONE_LINE = re.compile(r"<answer>(.*?)</answer>")  # does not match an answer over several lines
FENCE = re.compile(r"```json(.*?)```", re.DOTALL)


def first_answer(text: str) -> str:
    """The first answer, stripped; the whole text where there is none."""
    match = ANSWER.search(text)
    return (match[1] if match else text).strip()


def last_answer(text: str) -> str:
    """The last answer, stripped; the whole text where there is none."""
    answers = ANSWER.findall(text)
    return (answers[-1] if answers else text).strip()


def true_answer(solution: str) -> str:
    """The answer of a solution, if it is on one line, else the whole solution with its tags."""
    match = ANSWER_OF_ONE_LINE.search(solution)
    return (match[1] if match else solution).strip()


def clean(text: str) -> str:
    """The last answer (or the whole text) on one line, in lower case, without the full stop at its end."""
    answers = ANSWER.findall(text)
    text = answers[-1] if answers else text
    for line_end in "\n\r":
        text = re.sub(rf"(?<=\s){line_end}", "", text).replace(line_end, " ")
    return text.strip().rstrip(".").lower()
