"""A lenient JSON parser, for truncated answers in the published repetition reward."""

from __future__ import annotations

import re
from typing import Any

BLANK = re.compile(r"[\s,]*")
OPENING = re.compile(r"[\[{]")
NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
BARE = re.compile(r"[^\[\]{},:\"\n]+")
QUOTES = {'"': '"', "'": "'", "“": "”"}
WORDS = {"true": True, "false": False, "null": None}


def repair(text: str) -> Any:
    """Return the lists and objects of a text, closed where truncated: one itself, several as a list, else None.

    A value replaces the previous one if that is empty or has the same shape. Commas may be missing or doubled, quotes
    single or absent, and other text is skipped. Too deep nesting gives None.
    """
    reader, values = _Reader(text), []
    try:
        while match := OPENING.search(text, reader.place):
            reader.place = match.start()
            value = reader.value("")
            if value and values and (not values[-1] or _shape(values[-1]) == _shape(value)):
                values.pop()
            if value or not values:
                values.append(value)
    except RecursionError:
        return None
    return values[0] if len(values) == 1 else values or None


def _shape(value: Any) -> Any:
    """Types and keys of a value, without the values of its numbers and texts."""
    if isinstance(value, dict):
        return {key: _shape(entry) for key, entry in value.items()}
    return [_shape(entry) for entry in value] if isinstance(value, list) else type(value)


class _Reader:
    def __init__(self, text: str):
        self.text = text
        self.place = 0

    def value(self, closing: str) -> Any:
        """One value; `closing` holds the brackets that would end the containers around it."""
        start = self.text[self.place]
        if start == "[":
            return self._list(closing + "]")
        if start == "{":
            return self._object(closing + "}")
        if start in QUOTES:
            return self._string(start)
        return self._bare()

    def _list(self, closing: str) -> list[Any]:
        self.place += 1
        items = []
        while not self._closed("]", closing):
            items.append(self.value(closing))
        return items

    def _object(self, closing: str) -> dict[str, Any]:
        self.place += 1
        result: dict[str, Any] = {}
        while not self._closed("}", closing):
            start = self.place
            key = str(self.value(closing))
            self._skip()
            result[key] = ""
            if self._next() == ":":
                self.place += 1
                self._skip()
                if self._next() not in ("", "}", "]"):
                    result[key] = self.value(closing)
            if self.place == start:
                self.place += 1
        return result

    def _closed(self, bracket: str, closing: str) -> bool:
        """Return whether the container ends here: at its bracket, which is consumed, at an outer one, or at the end."""
        self._skip()
        while self._next() and self._next() in "]}:" and self._next() not in closing:  # it closes nothing
            self.place += 1
            self._skip()
        char = self._next()
        if char == bracket:
            self.place += 1
        return char == "" or char in "]}"

    def _string(self, quote: str) -> str:
        start = self.place + 1
        end = start
        while end < len(self.text) and self.text[end] != QUOTES[quote]:
            end += 2 if self.text[end] == "\\" else 1
        self.place = min(end + 1, len(self.text))
        return self.text[start:end]

    def _bare(self) -> Any:
        match = BARE.match(self.text, self.place)
        if match is None:
            self.place += 1
            return ""
        self.place = match.end()
        word = match[0].strip()
        if NUMBER.fullmatch(word):
            return float(word) if set(word) & set(".eE") else int(word)
        return WORDS.get(word.lower(), word)

    def _next(self) -> str:
        return self.text[self.place : self.place + 1]

    def _skip(self) -> None:
        match = BLANK.match(self.text, self.place)
        if match is not None:
            self.place = match.end()
