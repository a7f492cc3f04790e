"""Convert conversations and prompts of a row to chat messages with text and image parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmr1.data.faults import row_fault
from vlmr1.errors import SettingError

MARKER = "<image>"
QUESTION = "{question}"
ROLES = {"human": "user", "gpt": "assistant"}
CHAT_ROLES = ("system", "user", "assistant")

Part = dict[str, str]  # {"type": "image"} or {"type": "text", "text": ...}
Message = dict[str, Any]  # {"role": ..., "content": [Part]}


def check_template(question: str, known: Iterable[str] = ()) -> None:
    """SettingError for a question template that cannot be filled; the message lists the `known` names."""
    if question.count(QUESTION) != 1 or MARKER in question:
        names = f"one of {', '.join(known)}, or a text that" if known else "it"
        raise SettingError(f"question_template is {question!r}: {names} must hold {QUESTION} once, and no {MARKER}")


def from_turns(turns: Any, num_images: int, question: str, source: str) -> tuple[list[Message], str]:
    """Convert VLM-R1's conversation to the messages of its prompt and the solution.

    The last turn is by gpt and is the solution. The turns before it are the prompt; its last one gets the template."""
    if not isinstance(turns, list) or not turns:
        raise row_fault(
            source, "conversations", "no conversations: a row needs a list with a human and a gpt turn, or a prompt"
        )
    for turn in turns:
        if not isinstance(turn, dict) or "value" not in turn or turn.get("from") not in ROLES:
            what = f'a turn is {{"from": "human" or "gpt", "value": ...}}, not {short(turn)}'
            raise row_fault(source, "turn", what)
    *turns, last = turns
    if last["from"] != "gpt" or last["value"] is None:
        raise row_fault(source, "solution", "no gpt turn at the end of conversations: it is the solution")
    if not turns or turns[-1]["from"] != "human":
        raise row_fault(source, "turn", "no human turn before the last gpt turn")
    for turn in turns:
        if not isinstance(turn["value"], str):
            raise row_fault(source, "turn", f"a {turn['from']} turn is not text but {kind_of(turn['value'])}")
    messages = [message(ROLES[turn["from"]], stripped(parts_of(turn["value"]))) for turn in turns]
    return finished(messages, num_images, question, source), as_text(last["value"])


def from_prompt(prompt: Any, num_images: int, question: str, source: str) -> list[Message]:
    """Convert TRL's prompt, a text or a list of messages, to messages; the last one gets the template."""
    if isinstance(prompt, str):
        return finished([message("user", stripped(parts_of(prompt)))], num_images, question, source)
    if not isinstance(prompt, list) or not prompt:
        raise row_fault(source, "prompt", f"the prompt is neither text nor a list of messages but {short(prompt)}")
    messages = []
    for each in prompt:
        if not isinstance(each, dict) or each.get("role") not in CHAT_ROLES:
            what = f'a message is {{"role": {" or ".join(CHAT_ROLES)}, "content": ...}}, not {short(each)}'
            raise row_fault(source, "turn", what)
        content = each.get("content")
        parts = parts_of(content) if isinstance(content, str) else _parts(content, source)
        messages.append(message(each["role"], parts))
    if messages[-1]["role"] != "user":
        raise row_fault(source, "turn", f"the last message of the prompt is of {messages[-1]['role']}, not of user")
    return finished(messages, num_images, question, source)


def finished(messages: list[Message], num_images: int, question: str, source: str) -> list[Message]:
    """Put the template into the last message, and the images at their markers.

    Without markers, all images precede the text of the first user message."""
    marked = sum(part["type"] == "image" for each in messages for part in each["content"])
    if marked not in (0, num_images):
        count = f"{marked} {MARKER} markers in the prompt for {num_images} image{'' if num_images == 1 else 's'}"
        raise row_fault(source, "markers", count)
    if not marked:
        first = next(each for each in messages if each["role"] == "user")
        first["content"] = [*({"type": "image"} for _ in range(num_images)), *first["content"]]
    messages[-1]["content"] = with_template(messages[-1]["content"], question)
    for each in messages:
        if not each["content"]:
            raise row_fault(source, "empty turn", f"a turn of {each['role']} is empty")
    return messages


def message(role: str, content: list[Part]) -> Message:
    return {"role": role, "content": content}


def parts_of(text: str) -> list[Part]:
    """Split a text at its image markers."""
    parts: list[Part] = []
    for place, piece in enumerate(text.split(MARKER)):
        if place:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def stripped(parts: Sequence[Part]) -> list[Part]:
    """Strip white space around the text, and around its leading images."""
    parts = [dict(part) for part in parts]
    leading = leading_images(parts)
    images, rest = parts[:leading], parts[leading:]
    if rest and "text" in rest[0]:
        rest[0]["text"] = rest[0]["text"].lstrip()
    if rest and "text" in rest[-1]:
        rest[-1]["text"] = rest[-1]["text"].rstrip()
    return [part for part in images if "text" not in part] + [part for part in rest if part.get("text") != ""]


def with_template(parts: Sequence[Part], question: str) -> list[Part]:
    """Put the template around the text, after its leading images."""
    before, after = question.split(QUESTION)
    leading = leading_images(parts)
    images, rest = list(parts[:leading]), list(parts[leading:])
    for text, place in ((before, 0), (after, -1)):
        if text and rest and "text" in rest[place]:
            known = rest[place]["text"]
            rest[place] = {"type": "text", "text": text + known if place == 0 else known + text}
        elif text:
            rest.insert(0 if place == 0 else len(rest), {"type": "text", "text": text})
    return images + rest


def leading_images(parts: Sequence[Part]) -> int:
    """Return the number of parts up to the last image before the first text that is not blank."""
    count = 0
    for place, part in enumerate(parts, start=1):
        if part["type"] == "image":
            count = place
        elif part["text"].strip():
            break
    return count


def as_text(value: Any) -> str:
    """Return a solution as text; some files hold a JSON value instead."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def kind_of(value: object) -> str:
    return "null" if value is None else type(value).__name__


def short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def _parts(content: Any, source: str) -> list[Part]:
    """Check a message's list of parts; unused keys of a part are null in some files."""
    if not isinstance(content, list):
        raise row_fault(source, "turn", f"the content of a message is neither text nor parts but {kind_of(content)}")
    parts: list[Part] = []
    for part in content:
        used: Mapping[str, Any] = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        if used == {"type": "image"}:
            parts.append({"type": "image"})
        elif used.keys() == {"type", "text"} and used["type"] == "text" and isinstance(used["text"], str):
            parts.append({"type": "text", "text": used["text"]})
        else:
            what = f'a part is {{"type": "text", "text": ...}} or {{"type": "image"}}, not {short(part)}'
            raise row_fault(source, "turn", what)
    return parts
