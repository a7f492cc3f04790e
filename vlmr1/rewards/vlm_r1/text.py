"""Published accuracy of answers in words: choices, yes or no, numbers, formulas, fuzzy text."""

from __future__ import annotations

import re

from vlmr1.rewards.formula import normal_form, symbolic_equal, text_similarity, unboxed
from vlmr1.rewards.vlm_r1.tags import clean, first_answer, last_answer, true_answer

CHOICE = re.compile(r"(?<![A-Z])[A-Z](?=[.,?!:;]|$)")
CUES = """答案 选择 正确 是 对 ANSWER CORRECT CHOOSE SELECT RIGHT 认为 应该 觉得 THINK BELIEVE SHOULD""".split()  # noqa: SIM905
AFTER = "。.!！,，"  # noqa: RUF001
NEAR = 20  # characters around a letter that are searched for cues
LATE = 0.7  # share of the text from which a letter counts as near the end


def mcq(content: str, solution: str) -> float:
    """Return 1 for the letter of the solution, else 0."""
    expected = choice(true_answer(solution)) or solution.strip()
    return float(choice(first_answer(content)) == expected)


def choice(text: str) -> str | None:
    """Return the letter that a text chooses; of several the one with most cues at its first occurrence."""
    text = re.sub(r"\s+", " ", text.upper())
    letters = dict.fromkeys(CHOICE.findall(text))
    return max(letters, key=lambda letter: _cues(letter, text)) if letters else None


def _cues(letter: str, text: str) -> int:
    place = text.find(letter)
    around = text[max(0, place - NEAR) : place + NEAR]
    cues = sum(cue in around for cue in CUES)
    late = 2 if place > len(text) * LATE else 0
    return cues + late + (text[place + 1 : place + 2] in tuple(AFTER))


def yes_no(content: str, solution: str) -> float:
    """Return 1 where the first "yes" or "no" of both texts is the same, also within words, or both have none."""
    answer, expected = first_answer(content.lower()), true_answer(solution.lower())
    found = [re.search("yes|no", text) for text in (answer, expected)]
    one, other = (match and match[0] for match in found)
    return float(one == other)


def all_match(content: str, solution: str) -> float:
    """Return 1 where the cleaned texts are equal, else 0."""
    return float(clean(content) == clean(solution))


def math(content: str, solution: str) -> float:
    """Return 1 where the cleaned texts are equal, symbolically equal, or equal in their normal form."""
    answer, expected = clean(content), clean(solution)
    if answer == expected or symbolic_equal(answer, expected):
        return 1.0
    try:
        return float(normal_form(unboxed(answer)) == normal_form(expected))
    except ValueError:  # no normal form: not equal
        return 0.0


def default(content: str, solution: str) -> float:
    """Compare symbolically, then as numbers, a choice, or fuzzy text, by the form of the solution."""
    answer, expected = last_answer(content), true_answer(solution)
    if _same_value(answer, expected):
        return 1.0
    if re.search(r"\d", expected):
        return _numeric(clean(answer), clean(expected))
    right_choice = choice(expected)
    if right_choice is not None:
        return float(choice(answer) == right_choice)
    return text_similarity(clean(answer), clean(expected))


def _same_value(answer: str, expected: str) -> bool:
    try:
        return symbolic_equal(answer, expected)
    except Exception:  # as published: on any error the next method follows
        return False


def _numeric(answer: str, expected: str) -> float:
    try:
        return float(float(answer) == float(expected))
    except ValueError:
        return text_similarity(answer, expected)
