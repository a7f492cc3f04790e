"""Rows of data files, and what they become."""

import json
from pathlib import Path
from typing import Any

from vlmr1.types import Sample

BOX = '<answer>{"bbox_2d": [0, 0, 4, 4]}</answer>'


def row(human: Any = "<image>Where?", gpt: Any = BOX, **columns: Any) -> dict[str, Any]:
    """A row in the format of VLM-R1."""
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"image": "a.png", "conversations": turns} | columns


def write(path: Path, *lines: Any) -> Path:
    """The path of a file with these lines: rows, text or bytes."""
    texts = [line if isinstance(line, bytes | str) else json.dumps(line) for line in lines]
    path.write_bytes(b"".join((text if isinstance(text, bytes) else text.encode()) + b"\n" for text in texts))
    return path


def shown(made: Sample) -> list[tuple[str, list[str]]]:
    """Role and parts of each message, an image as I, a text as itself."""
    found = []
    for each in made.messages:
        parts = ["I" if part == {"type": "image"} else part["text"] for part in each["content"]]
        found.append((each["role"], parts))
    return found


SIZES = {"a": 10, "b": 40, "c": 7}
NUMBERED = [f"{name}{i}" for name, count in SIZES.items() for i in range(count)]  # solutions of the rows


def numbered_files(folder: Path) -> list[Path]:
    """Files a, b and c of these sizes; the solution of a row is its file's name and its number."""
    return [
        write(folder / f"{name}.jsonl", *({"prompt": "?", "solution": f"{name}{i}"} for i in range(count)))
        for name, count in SIZES.items()
    ]
