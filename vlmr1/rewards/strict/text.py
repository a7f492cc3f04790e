"""Strict accuracy of answers in words: choices, yes or no, numbers, formulas, fuzzy text."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from vlmr1.rewards.answer import find_answer, true_text
from vlmr1.rewards.formula import normal_form, symbolic_equal, text_similarity, unboxed

END = r"\s.,:;!?)\]。、，：；！？）"  # noqa: RUF001
# A letter alone, in brackets, or before what it stands for: A  (A)  A.  B。  **C**  \boxed{D}  A: cat
ALONE = re.compile(rf"[(\[（*]*(?:\\boxed\{{)?([A-Za-z])[}}*{END}]*")  # noqa: RUF001
LEADING = re.compile(r"[(\[（*]*([A-Z])\s*[).:：。\]）*](?!\w{0,3}\.\w)")  # noqa: RUF001
CUE = re.compile(
    r"(?:answer|choice|choose|option|select|pick|correct|答案|选项|选择|选)"
    r"(?:\s*(?:is|was|should be|是|为|应该是|应为))?\s*[:：=]?\s*[(\[（*\"']*([A-Z])(?![A-Za-z0-9])",  # noqa: RUF001
    re.IGNORECASE,
)
STANDALONE = re.compile(r"(?<![A-Za-z0-9'])([A-Z])(?![A-Za-z0-9'])")
WORDS = re.compile(r"(?:^|[.!?]\s+)A\s+(?!or\b|and\b)[a-z]|\bI\s+(?!or\b|and\b)[a-z]")  # "A cat" at a start, "I am"
# Not "12 cm"; of "route 66" 66 is a part.
PROSE = re.compile(r"(?<![\\A-Za-z])(?!sqrt|sin|cos|tan|log|exp|text)[A-Za-z]{3,}")
WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def mcq(content: str, solution: str, **options: Any) -> float:
    """Return 1 where the answer chooses the letter of the solution, else 0."""
    expected, answer = choice(true_text(solution)), find_answer(content)
    if expected is None:
        raise ValueError(f"the solution is no choice: {solution[:120]!r}")
    return float(answer is not None and choice(answer) == expected)


def choice(text: str) -> str | None:
    """Return the letter that a text chooses: alone, in front, after the last cue such as "answer", or the only one."""
    text = text.strip()
    if found := ALONE.fullmatch(text) or LEADING.match(text):
        return found[1].upper()
    cued = [letter for letter in CUE.findall(text) if letter.isupper()]
    if cued:
        return cued[-1]
    letters = set(STANDALONE.findall(WORDS.sub(" ", text)))
    return letters.pop() if len(letters) == 1 else None


def yes_no(content: str, solution: str, **options: Any) -> float:
    """Return 1 where answer and solution have the same word, yes or no, else 0."""
    expected, answer = decision(true_text(solution)), find_answer(content)
    if expected is None:
        raise ValueError(f"the solution is neither yes nor no: {solution[:120]!r}")
    return float(answer is not None and decision(answer) == expected)


def decision(text: str) -> str | None:
    """Return the word, yes or no, that a text begins with, or the only one of them in it; else None."""
    words = [word.lower() for word in WORD.findall(text)]
    start = WORD.match(text.lstrip())
    if start is not None:
        return start[1].lower()
    return words[0] if len(set(words)) == 1 else None


def all_match(content: str, solution: str, **options: Any) -> float:
    """Return 1 where the answer is the solution, except for case, width, white space and a full stop."""
    answer = find_answer(content)
    return float(answer is not None and plain(answer) == plain(true_text(solution)))


def plain(text: str) -> str:
    """Normalize case, width and white space, and remove a full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".。").rstrip()


def math(content: str, solution: str, **options: Any) -> float:
    """Return 1 where answer and solution are equal as texts, symbolically, or in their normal form."""
    answer, expected = find_answer(content), true_text(solution)
    if not answer:
        return 0.0
    if plain(_bare(answer)) == plain(_bare(expected)) or symbolic_equal(expected, answer):
        return 1.0
    try:
        return float(normal_form(_bare(answer)) == normal_form(_bare(expected)))
    except ValueError:
        return 0.0


def _bare(text: str) -> str:
    """Return the content of a \\boxed{...}, where the text has a whole one, else the text."""
    try:
        return unboxed(text)
    except ValueError:
        return text


def default(content: str, solution: str, **options: Any) -> float:
    """Compare by the kind of the solution.

    A choice is compared as a letter. A text with digits is compared by value or as text, all or nothing. Other text is
    compared by value, else by its similarity, 0 to 1."""
    answer, expected = find_answer(content), true_text(solution)
    if not answer:
        return 0.0
    if plain(_bare(answer)) == plain(_bare(expected)):
        return 1.0
    if ALONE.fullmatch(expected):
        return float(choice(answer) == choice(expected))
    if _same_number(answer, expected) or (not PROSE.search(expected) and symbolic_equal(expected, answer)):
        return 1.0
    if re.search(r"\d", expected):
        return 0.0
    return text_similarity(plain(answer), plain(expected))


def _same_number(answer: str, expected: str) -> bool:
    try:
        return float(plain(answer)) == float(plain(expected))
    except ValueError:
        return False
