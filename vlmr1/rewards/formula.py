"""Equality of formulas by math-verify, a normal form of LaTeX by rewriting, and the similarity of two texts."""

from __future__ import annotations

import re
import threading
from functools import reduce

from vlmr1.errors import import_for

LIMIT = 5  # seconds for each step of math-verify; its timer is a signal, so it works in the main thread only

DROPPED = ("\n", r"\!")
RENAMED = [("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")]
UNSEEN = (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$")
PERCENT = r"\%"
BOXED = r"\boxed"
UNIT = r"\text{ "  # a unit behind a number


def symbolic_equal(gold: str, answer: str) -> bool:
    """Return whether math-verify finds both equal; `gold` may be a relation or a set that the answer solves."""
    library = import_for("the symbolic comparison of answers", "math_verify", "math-verify")  # a second of import
    limit = LIMIT if threading.current_thread() is threading.main_thread() else None
    parsed = [library.parse(text, parsing_timeout=limit) for text in (gold, answer)]
    return bool(library.verify(parsed[0], parsed[1], timeout_seconds=limit))


def text_similarity(answer: str, solution: str) -> float:
    """Return 1 - (insertions and deletions from one text to the other) / (characters of both)."""
    library = import_for("the fuzzy comparison of answers", "rapidfuzz.distance", "rapidfuzz")
    return library.Indel.normalized_similarity(answer, solution)


def normal_form(text: str) -> str:
    """Rewrite LaTeX so that equal short answers are equal texts, as in Hendrycks et al., MATH (arXiv:2103.03874).

    Fractions and roots get braces; units, percent and degree signs, spaces and a short "x =" in front are removed.
    ValueError for a text without a normal form: two units, a bare backslash command at the end, or a quotient with one
    slash whose parts are not whole numbers.
    """
    text = _without(text, DROPPED)
    text = reduce(lambda result, pair: result.replace(*pair), RENAMED, text)
    text = _without(text, UNSEEN)
    text, *units = text.split(UNIT)
    if len(units) > 1:
        raise ValueError(f"two units: {text!r}")
    text = text.replace(PERCENT, "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _fractions(_roots(text).replace(" ", ""))
    return _quotient(r"\frac{1}{2}" if text == "0.5" else text)


def unboxed(text: str) -> str:
    r"""Return the content of the last \boxed{...}, or the text after "\boxed " up to a dollar sign, else the text.

    ValueError for an \fbox, and a box without braces.
    """
    if BOXED + " " in text:
        return text.split(BOXED + " ")[-1].split("$")[0]
    start = text.rfind(BOXED) if BOXED in text else text.rfind(r"\fbox")
    if start < 0:
        return text
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0 and text[end] == "}":
            break
    else:
        return text
    if not text.startswith(BOXED + "{", start):
        raise ValueError(f"a box without braces: {text!r}")
    return text[start + len(BOXED) + 1 : end]


def _without(text: str, parts: tuple[str, ...]) -> str:
    return reduce(lambda result, part: result.replace(part, ""), parts, text)


def _roots(text: str) -> str:
    r"""\sqrt2 -> \sqrt{2}"""
    head, *tails = text.split(r"\sqrt")
    if not all(tails):
        raise ValueError(f"a root of nothing: {text!r}")
    return head + "".join(r"\sqrt" + (tail if tail[0] == "{" else f"{{{tail[0]}}}{tail[1:]}") for tail in tails)


def _fractions(text: str) -> str:
    r"""\frac12 and \frac1{2} -> \frac{1}{2}; a text with a fraction of one character is unchanged."""
    head, *tails = text.split(r"\frac")
    for tail in tails:
        if not tail:
            raise ValueError(f"a fraction of nothing: {text!r}")
        if tail[0] != "{":
            if len(tail) < 2:
                return text
            lower = tail[1:] if tail[1] == "{" else f"{{{tail[1]}}}{tail[2:]}"
            tail = f"{{{tail[0]}}}{lower}"
        head += r"\frac" + tail
    return head


def _quotient(text: str) -> str:
    r"""1/2 -> \frac{1}{2}"""
    if text.count("/") != 1:
        return text
    upper, lower = (int(part) for part in text.split("/"))
    exact = re.fullmatch(r"(-?[1-9]\d*|0)/(-?[1-9]\d*|0)", text, re.ASCII)  # no sign, space or zero in front
    return rf"\frac{{{upper}}}{{{lower}}}" if exact else text
