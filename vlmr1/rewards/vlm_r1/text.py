"""Published accuracy of answers in words: choices, yes or no, numbers, formulas, fuzzy text."""

from __future__ import annotations

import re

from vlmr1.rewards.formula import normal_form, symbolic_equal, text_similarity, unboxed
from vlmr1.rewards.vlm_r1.tags import clean, first_answer, last_answer, true_answer

CHOICE = re.compile(r"(?<![A-Z])[A-Z](?=[.,?!:;]|$)")
CUES = """答案 选择 正确 是 对 ANSWER CORRECT CHOOSE SELECT RIGHT 认为 应该 觉得 THINK BELIEVE SHOULD""".split()  # noqa: SIM905
AFTER = "。.!！,，"  # noqa: RUF001
NEAR = 20  # characters around a letter in which a cue counts
LATE = 0.7  # from this share of the text on, a letter is near its end


def mcq(content: str, solution: str) -> float:
    """1 for the letter of the solution, else 0."""
    right = choice(true_answer(solution)) or solution.strip()
    return float(choice(first_answer(content)) == right)


def choice(text: str) -> str | None:
    """The letter that a text chooses; of several the one with most cues, where its letter first stands."""
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
    """1 where the first "yes" or "no" within both texts is the same, in whatever word, or both have none."""
    said, right = first_answer(content.lower()), true_answer(solution.lower())
    found = [re.search("yes|no", text) for text in (said, right)]
    one, other = (match and match[0] for match in found)
    return float(one == other)


def all_match(content: str, solution: str) -> float:
    """1 where the cleaned texts are equal."""
    return float(clean(content) == clean(solution))


def math(content: str, solution: str) -> float:
    """1 where the cleaned texts are equal, symbolically equal, or equal in their normal form."""
    said, right = clean(content), clean(solution)
    if said == right or symbolic_equal(said, right):
        return 1.0
    try:
        return float(normal_form(unboxed(said)) == normal_form(right))
    except ValueError:  # one that has no normal form equals nothing
        return 0.0


def default(content: str, solution: str) -> float:
    """Symbolic check; then numbers, a choice, or fuzzy text, by what the solution looks like."""
    said, right = last_answer(content), true_answer(solution)
    if _same_value(said, right):
        return 1.0
    if re.search(r"\d", right):
        return _numeric(clean(said), clean(right))
    right_choice = choice(right)
    if right_choice is not None:
        return float(choice(said) == right_choice)
    return text_similarity(clean(said), clean(right))


def _same_value(said: str, right: str) -> bool:
    try:
        return symbolic_equal(said, right)
    except Exception:  # whatever the symbolic check raises, the next method follows
        return False


def _numeric(said: str, right: str) -> float:
    try:
        return float(float(said) == float(right))
    except ValueError:
        return text_similarity(said, right)
