"""The rows of each peer's format, over the images of the stand-ins: `python -m tests.data.formats.make`.

Each file has the columns, roles and nesting that its peer documents. verl and EasyR1 read Parquet with image bytes."""

from __future__ import annotations

import base64
import json
import zipfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
IMAGES = FOLDER.parent / "standins" / "images"
NAMES = ("scene-0.png", "scene-1.png")
ASKED = ("yellow rectangle on the right", "red rectangle on the left")
BOXES = ([94, 58, 139, 86], [7, 55, 50, 71])
QUESTIONS = [f"Where is the {asked}?" for asked in ASKED]
BOXED = [json.dumps(box) for box in BOXES]
SYSTEM = "Answer with a box in pixels."


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def bytes_of(name: str) -> bytes:
    return (IMAGES / name).read_bytes()


def uri(name: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(bytes_of(name)).decode()}"


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def vlm_r1() -> list[dict]:
    """Turns of `from` and `value`, with a system turn, and of `role` and `content`."""
    human, gpt = ({"from": "human", "value": f"<image>{QUESTIONS[0]}"}, {"from": "gpt", "value": BOXED[0]})
    return [
        {"image": NAMES[0], "conversations": [{"from": "system", "value": SYSTEM}, human, gpt]},
        {"image": [NAMES[1]], "conversations": [said("user", f"<image>{QUESTIONS[1]}"), said("assistant", BOXED[1])]},
    ]


def trl() -> list[dict]:
    """Prompts as text and as messages with image parts, which hold their images or stand for those of the column."""
    address = {"type": "image_url", "image_url": {"url": uri(NAMES[1])}}
    return [
        {"prompt": [said("user", QUESTIONS[0])], "image": NAMES[0], "solution": BOXED[0]},
        {"prompt": QUESTIONS[1], "images": [NAMES[1]], "solution": [BOXED[1], BOXED[1]]},
        {"prompt": [said("user", [{"type": "image", "image": NAMES[0]}, text(QUESTIONS[0])])], "solution": BOXED[0]},
        {"prompt": [said("system", SYSTEM), said("user", [address, text(QUESTIONS[1])])], "solution": BOXED[1]},
        {"prompt": [said("user", [{"type": "image"}, text("?")])], "images": [uri(NAMES[0])], "solution": BOXED[0]},
    ]


def ms_swift() -> list[dict]:
    """Messages with their answer, or with a column of it; query and response; grounding."""
    asked = [said("user", f"<image>{question}") for question in QUESTIONS]
    objects = {"ref": [ASKED[1]], "bbox": [BOXES[1]]}
    scaled = {"ref": [], "bbox": [[94 / 151, 58 / 97, 139 / 151, 86 / 97]], "bbox_type": "norm1"}
    return [
        {"messages": [said("system", SYSTEM), asked[0], said("assistant", BOXED[0])], "images": [NAMES[0]]},
        {"messages": [asked[1]], "images": [NAMES[1]], "solution": BOXED[1]},
        {"query": QUESTIONS[0], "response": BOXED[0], "images": [NAMES[0]], "history": [["Ready?", "Yes."]]},
        {
            "messages": [said("user", "<image>Find the <ref-object>"), said("assistant", "<bbox>")],
            "images": [{"bytes": None, "path": NAMES[1]}],
            "objects": objects,
        },
        {
            "messages": [asked[0], said("assistant", "<answer><bbox></answer>")],
            "images": [NAMES[0]],
            "objects": scaled,
        },
    ]


def llama_factory() -> list[dict]:
    """OpenAI's messages, ShareGPT, Alpaca."""
    turns = [{"from": "human", "value": f"<image>{QUESTIONS[1]}"}, {"from": "gpt", "value": BOXED[1]}]
    return [
        {"messages": [said("user", f"<image>{QUESTIONS[0]}"), said("assistant", BOXED[0])], "images": [NAMES[0]]},
        {"conversations": turns, "system": SYSTEM, "images": [NAMES[1]]},
        {"instruction": "Give a box.", "input": QUESTIONS[0], "output": BOXED[0], "images": [NAMES[0]], "system": ""},
    ]


def verl() -> list[dict]:
    return [
        {
            "data_source": "scenes",
            "prompt": [said("user", f"<image>{question}")],
            "images": [{"bytes": bytes_of(name), "path": None}],
            "ability": "grounding",
            "reward_model": {"style": "rule", "ground_truth": box},
            "extra_info": {"split": "train", "index": index},
        }
        for index, (name, question, box) in enumerate(zip(NAMES, QUESTIONS, BOXED, strict=True))
    ]


def easyr1() -> list[dict]:
    return [
        {"images": [{"bytes": bytes_of(name), "path": name}], "problem": f"<image>{question}", "answer": box}
        for name, question, box in zip(NAMES, QUESTIONS, BOXED, strict=True)
    ]


FORMATS = {
    "vlm-r1.jsonl": vlm_r1,
    "trl.jsonl": trl,
    "ms-swift.jsonl": ms_swift,
    "llama-factory.json": llama_factory,
    "verl.parquet": verl,
    "easyr1.parquet": easyr1,
}


def write(folder: Path = FOLDER) -> None:
    import pyarrow
    import pyarrow.parquet

    for name, rows in FORMATS.items():
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), folder / name)
        elif name.endswith(".jsonl"):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
        else:
            (folder / name).write_text(json.dumps(rows(), indent=1) + "\n", encoding="utf-8")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name in NAMES:
            archive.writestr(zipfile.ZipInfo(name), bytes_of(name))


if __name__ == "__main__":
    write()
