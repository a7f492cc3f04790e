"""Convert conversations and prompts of a row to chat messages with text and image parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmr1.data.faults import row_fault
from vlmr1.errors import SettingError

MARKER = "<image>"
QUESTION = "{question}"
CHAT_ROLES = ("system", "user", "assistant")

IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes", "base64")  # of an image part, and of an image as a dict
VALUE = "value"  # of an image part that holds its image, until it is placed

Part = dict[str, Any]  # {"type": "image"} or {"type": "text", "text": ...}
Message = dict[str, Any]  # {"role": ..., "content": [Part]}


def check_template(question: str, known: Iterable[str] = ()) -> None:
    """SettingError for a question template that cannot be filled; the message lists the `known` names."""
    if question.count(QUESTION) != 1 or MARKER in question:
        names = f"one of {', '.join(known)}, or a text that" if known else "it"
        raise SettingError(f"question_template is {question!r}: {names} must hold {QUESTION} once, and no {MARKER}")


def finished(
    messages: list[Message], values: Sequence[Any], question: str, source: str
) -> tuple[list[Message], list[Any]]:
    """Put the template into the last message, and the images of the row's column at their markers.

    Without markers, they precede the text of the first user message. Return the messages with the images of all parts,
    in the order of their places."""
    parts = [part for each in messages for part in each["content"]]
    marked = sum(part == {"type": "image"} for part in parts)
    own = sum(VALUE in part for part in parts)
    if marked not in (0, len(values)):
        count = f"{marked} {MARKER} markers in the prompt for {len(values)} image{'' if len(values) == 1 else 's'}"
        raise row_fault(source, "markers", count)
    if own and values and not marked:
        what = f"{own} images in the parts of the prompt, and {len(values)} more in a column without markers"
        raise row_fault(source, "markers", what)
    if values and not marked:
        first = next(each for each in messages if each["role"] == "user")
        first["content"] = [*({"type": "image"} for _ in values), *first["content"]]
    messages[-1]["content"] = with_template(messages[-1]["content"], question)
    images, left = [], iter(values)
    for each in messages:
        if not each["content"]:
            raise row_fault(source, "empty turn", f"a turn of {each['role']} is empty")
        for part in each["content"]:
            if part["type"] == "image":
                images.append(part.pop(VALUE) if VALUE in part else next(left))
    return messages, images


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


def text_and_images(content: Sequence[Any], source: str, *, markers: bool = True) -> list[Part]:
    """Convert a message's list of parts; unused keys of a part are null in some files.

    Text parts have markers as texts do, unless `markers` is false. An image part may hold its image under one of
    `IMAGE_KEYS`."""
    parts: list[Part] = []
    for part in content:
        used: Mapping[str, Any] = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        held = [key for key in used if key in IMAGE_KEYS]
        if used.get("type") in ("image", "image_url") and used.keys() == {"type", *held} and len(held) <= 1:
            parts.append({"type": "image"} | ({VALUE: used[held[0]]} if held else {}))
        elif used.keys() == {"type", "text"} and used["type"] == "text" and isinstance(used["text"], str):
            parts += parts_of(used["text"]) if markers else [{"type": "text", "text": used["text"]}]
        elif str(used.get("type")).startswith(("video", "audio", "input_audio")):
            raise row_fault(source, "video", f"a part of type {used['type']}: only text and images are trained on")
        else:
            what = f'a part is {{"type": "text", "text": ...}} or {{"type": "image"}}, not {short(part)}'
            raise row_fault(source, "turn", what)
    return parts
