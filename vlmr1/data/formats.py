"""Formats of rows. Each is converted to chat messages and the accepted solutions, by one table of columns.

A row has the first format of `FORMATS` whose column of the prompt it has. They are those of VLM-R1, TRL and verl,
ms-swift and LLaMA-Factory, ms-swift's queries, EasyR1 and R1-V, VQA data sets, and Alpaca, in this order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlmr1.data.faults import row_fault
from vlmr1.data.messages import (
    CHAT_ROLES,
    Message,
    as_text,
    kind_of,
    message,
    parts_of,
    short,
    stripped,
    text_and_images,
)
from vlmr1.data.rows import Row

ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in CHAT_ROLES}
SOLUTION = "solution"
EMPTY = "the solution is empty: a row needs a text to compare completions with"
NO_ANSWER = "the answer is empty: a row needs a text to train on"


@dataclass(frozen=True)
class Columns:
    """How rows are read: names of columns, in which dots lead into nested values, and what all rows have in common."""

    prompt: str = "prompt"
    solution: str = SOLUTION
    image: str = ""  # by default image or images
    system_prompt: str | None = None  # of rows without a system message
    images_outside: bool = False  # names of images may leave the image folder
    answers: tuple[str, ...] = ()  # of supervised training: read before the assistant's last turn and the solution


DEFAULT = Columns()


@dataclass(frozen=True)
class Format:
    """A format of rows by its columns. `others` are optional: system, history, input."""

    prompt: str  # a text or messages; with `dialogue`, turns up to that of the solution
    solutions: tuple[str, ...] = ()  # read where the row has no `solution_column`
    dialogue: bool = False
    others: tuple[str, ...] = ()


FORMATS = (
    Format("conversations", dialogue=True, others=("system",)),
    Format("prompt", ("reward_model.ground_truth",)),
    Format("messages", dialogue=True, others=("system",)),
    Format("query", ("response",), others=("system", "history")),
    Format("problem", ("answer",)),
    Format("question", ("answer",)),
    Format("instruction", ("output",), others=("system", "history", "input")),
)


@dataclass(frozen=True)
class Reading:
    """The conversation of a row. An image part holds its image as `value`, or stands for one of the row's column."""

    messages: list[Message]
    solutions: tuple[str, ...]
    used: frozenset[str]  # columns that are none of a reward's


def read_row(row: Row, columns: Columns, source: str) -> Reading:
    """Return the messages and solutions of a row in any format. DataError where it has none or is invalid."""
    found = _format_of(row, columns, source)
    value = value_of(row, found.prompt)
    solution = _solution_column(row, columns, found, value)
    if found.dialogue:
        messages, last = _dialogue(value, found.prompt, solution is not None, source)
    else:
        messages, last = _prompt(value, row if "input" in found.others else {}, source), None
        if solution is None:
            names = ", ".join(map(repr, row))
            what = f"no solution: the row has no column {columns.solution!r}; solution_column names one of {names}"
            if columns.answers:
                wanted = ", ".join(dict.fromkeys((*columns.answers, columns.solution)))
                what = f"no answer: the row has none of the columns {wanted}; response_column names one of {names}"
            raise row_fault(source, SOLUTION, what)
    if messages[-1]["role"] != "user":
        what = f"the last message of the prompt is of {messages[-1]['role']}, not of user"
        raise row_fault(source, "turn", what)
    others = [name for name in found.others if row.get(name)]
    if "history" in others:
        messages = [*_history(row["history"], source), *messages]
    if "system" in others:
        messages = with_system(messages, _text(row["system"], "system", source))
    given = last if solution is None else value_of(row, solution)
    solutions = _answers(given, source) if columns.answers else _solutions(given, source)
    used = {found.prompt, *others, *([] if solution is None else [solution])}
    used |= {*columns.answers, columns.solution} if columns.answers else set()
    return Reading(messages, solutions, frozenset(used))


def value_of(row: Row, name: str) -> Any:
    """Return the value of a column, or of a nested one for a name with dots; None where the row has none."""
    if name in row:
        return row[name]
    value: Any = row
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def with_system(messages: Sequence[Message], text: str | None) -> list[Message]:
    """Put a system message first, unless there is one or the text is empty."""
    if not text or any(each["role"] == "system" for each in messages):
        return list(messages)
    return [message("system", parts_of(text)), *messages]


def _formats(columns: Columns) -> Iterator[Format]:
    """The table, with the setting's column of the prompt after conversations."""
    first, *others = FORMATS
    known = {each.prompt: each for each in others}
    yield from (first, known.get(columns.prompt, Format(columns.prompt)), *others)


def _format_of(row: Row, columns: Columns, source: str) -> Format:
    for each in _formats(columns):
        if value_of(row, each.prompt) is not None:
            return each
    names = ", ".join(dict.fromkeys(each.prompt for each in _formats(columns)))
    has = ", ".join(map(repr, row)) or "none"
    what = f"no conversations: the row has none of the columns {names}, which hold a prompt. Its columns: {has}"
    raise row_fault(source, "conversations", what)


def _solution_column(row: Row, columns: Columns, found: Format, value: Any) -> str | None:
    """The column of the solution, or of the answer; None where it is the last turn of `value`, or missing."""
    names = (columns.solution, *(found.solutions if columns.solution == SOLUTION else ()))
    if columns.answers:
        names = columns.answers if found.dialogue and _is_answered(value) else (*columns.answers, *names)
    return next((name for name in names if value_of(row, name) is not None), None)


def _is_answered(turns: Any) -> bool:
    """Return whether the last turn is the assistant's, and not null."""
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict) or ROLES.get(str(last.get("role") or last.get("from"))) != "assistant":
        return False
    return (last.get("content") or last.get("value")) is not None


def _dialogue(turns: Any, name: str, solved: bool, source: str) -> tuple[list[Message], Any]:
    """Return the messages of the prompt, and the content of the last turn, which is by the assistant.

    A row that is `solved` has its solution in a column; then a last turn by the assistant is left out."""
    if not isinstance(turns, list) or not turns:
        raise row_fault(source, name, f"no {name}: a list of turns is needed, not {short(turns)}")
    every = [_turn(each, source) for each in turns]
    user, assistant = ("human", "gpt") if name == "conversations" else ("user", "assistant")
    role, _, last = every[-1]
    if role == "assistant":
        every.pop()
    elif not solved:
        raise row_fault(source, SOLUTION, f"no {assistant} turn at the end of {name}: it is the solution")
    if last is None and not solved:
        raise row_fault(source, SOLUTION, f"no {assistant} turn at the end of {name}: it is the solution, and null")
    if not every or every[-1][0] != "user":
        raise row_fault(source, "turn", f"no {user} turn before the last {assistant} turn")
    strip = name == "conversations"
    return [_message(each, source, strip=strip) for each in every], last


def _prompt(prompt: Any, row: Row, source: str) -> list[Message]:
    """Return the messages of a text, with its `input` below it, or of a list of messages."""
    if isinstance(prompt, str):
        further = row.get("input") or ""
        text = f"{prompt}\n{_text(further, 'input', source)}" if further else prompt
        return [message("user", stripped(parts_of(text)))]
    if not isinstance(prompt, list) or not prompt:
        raise row_fault(source, "prompt", f"the prompt is neither text nor a list of messages but {short(prompt)}")
    return read_messages(prompt, source)


def read_messages(prompt: Sequence[Any], source: str, *, markers: bool = True) -> list[Message]:
    """Return the messages of a list of turns. Unless `markers` is false, "<image>" in a text stands for an image."""
    return [_message(_turn(each, source), source, markers=markers) for each in prompt]


def _turn(turn: Any, source: str) -> tuple[str, str, Any]:
    """Return role, the row's word for it, and content, under the names of OpenAI or of ShareGPT."""
    given = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
    word = given.get("role", given.get("from"))
    if not isinstance(word, str) or word not in ROLES:
        roles = " or ".join(CHAT_ROLES)
        what = f'a message is {{"role": {roles}, "content": ...}} or {{"from": "human" or "gpt", "value": ...}}'
        raise row_fault(source, "turn", f"{what}, not {short(turn)}")
    return ROLES[word], word, given.get("content", given.get("value"))


def _message(turn: tuple[str, str, Any], source: str, *, strip: bool = False, markers: bool = True) -> Message:
    role, word, content = turn
    if not isinstance(content, str | list):
        what = f"the content of a message is neither text nor parts but {kind_of(content)}, in a {word} turn"
        raise row_fault(source, "turn", what)
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = text_and_images(content, source, markers=markers)
    return message(role, stripped(parts) if strip else parts)


def _history(pairs: Any, source: str) -> list[Message]:
    """Return the messages of earlier questions and answers."""
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise row_fault(source, "turn", f"history is a list of [question, answer], not {short(pairs)}")
    roles = ("user", "assistant")
    return [
        message(role, stripped(parts_of(_text(text, "history", source))))
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


def _text(value: Any, name: str, source: str) -> str:
    if not isinstance(value, str):
        raise row_fault(source, "turn", f"{name} is not text but {kind_of(value)}")
    return value


def _answers(value: Any, source: str) -> tuple[str, ...]:
    """Return the answers to train on: each of a list with texts, or of TRL's lists of one message, else one."""
    if not isinstance(value, list) or not value:
        return _solutions(value, source, NO_ANSWER)
    if any(isinstance(each, dict) and ("role" in each or "from" in each) for each in value):
        turns = [_turn(each, source) for each in value]
        if len(turns) > 1 or turns[0][0] != "assistant":
            what = f"an answer is one turn of the assistant, not {short(value)}"
            raise row_fault(source, "turn", what)
        return _solutions(turns[0][2], source, NO_ANSWER)
    if not all(isinstance(each, str | list) for each in value):
        return _solutions(value, source, NO_ANSWER)
    return tuple(answer for each in value for answer in _answers(each, source))


def _joined(value: Any, source: str) -> Any:
    """The text of a list of text parts; other values as they are."""
    of_texts = isinstance(value, list) and all(isinstance(each, dict) and each.get("type") == "text" for each in value)
    return "".join(_text(each.get("text"), "the text of a part", source) for each in value) if of_texts else value


def _solutions(value: Any, source: str, empty: str = EMPTY) -> tuple[str, ...]:
    """Return the accepted solutions: those of a list with texts, else one. Other values become JSON."""
    value = _joined(value, source) if value else value
    several = isinstance(value, list) and any(isinstance(each, str) for each in value)
    found = []
    for each in value if several else [value]:
        try:
            found.append("" if each is None else as_text(each))
        except (TypeError, ValueError) as error:
            what = f"the solution is neither text nor a JSON value: {error}"
            raise row_fault(source, SOLUTION, what) from error
    if not all(text.strip() for text in found):
        raise row_fault(source, SOLUTION, empty)
    return tuple(dict.fromkeys(found))
