"""A referring-expression data set over real images: scans of handwritten digits on coloured canvases.

The 1,797 scans of 8x8 pixels are in digits.npz; digits.txt names their source and licence. Every fifth scan of a class
is held out: training canvases never show it. Positions and sizes are multiples of 14 px, one patch of the vision tower.
The background gets redder to the right and greener to the bottom, which tells so small a vision tower where a patch is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from vlmr1.lifecycle.checkpoint import replace_text
from vlmr1.lifecycle.disk import guard_writes
from vlmr1.tiny.texts import STEP, Box, Canvas, answer, completion_text, question, sloppy

SCANS = Path(__file__).with_name("digits.npz")
CANVAS = (112, 140, 168)  # px, multiples of 28: one merged image token
DIGIT = (42, 56)  # px
TRAIN_ROWS = 2000

Split = Literal["train", "held_out"]


@cache
def scans(split: Split) -> dict[int, np.ndarray]:
    """Return the scans by class: {label: [n, 8, 8] float in 0..1}."""
    with np.load(SCANS) as file:
        images, labels = file["images"], file["labels"]
    out = {}
    for label in range(10):
        of_class = images[labels == label] / 16.0
        held_out = np.arange(len(of_class)) % 5 == 0
        out[label] = of_class[held_out] if split == "held_out" else of_class[~held_out]
    return out


def draw(rng: np.random.Generator, split: Split) -> Canvas:
    """Draw a canvas with 2 to 4 digits of different classes that do not overlap."""
    size = int(rng.choice(CANVAS))
    boxes = _boxes(rng, size)
    labels = tuple(int(label) for label in rng.permutation(10)[: len(boxes)])
    ramp = np.linspace(0, size / max(CANVAS), size)
    light = np.zeros((size, size, 3))
    light[..., 0] = ramp[None, :]
    light[..., 1] = ramp[:, None]
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        ink = _scale(scans(split)[label], rng, x2 - x1)
        light[y1:y2, x1:x2, 2] = ink  # ink is blue, so that the background stays visible under it
        light[y1:y2, x1:x2, :2] *= 1 - 0.5 * ink[..., None]
    noise = rng.normal(0, 0.02, light.shape)
    pixels = (np.clip(0.1 + 0.8 * light + noise, 0, 1) * 255).astype(np.uint8)
    return Canvas(pixels, boxes, labels)


def _boxes(rng: np.random.Generator, size: int) -> tuple[Box, ...]:
    """Draw 2 to 4 boxes that do not overlap."""
    boxes: list[Box] = []
    wanted = int(rng.integers(2, 5))
    while len(boxes) < 2:
        boxes = []
        for _ in range(20):
            side = int(rng.choice(DIGIT))
            x, y = (int(rng.integers(0, (size - side) // STEP + 1)) * STEP for _ in range(2))
            if all(x >= x2 or x + side <= x1 or y >= y2 or y + side <= y1 for x1, y1, x2, y2 in boxes):
                boxes.append((x, y, x + side, y + side))
            if len(boxes) == wanted:
                break
    return tuple(boxes)


def _scale(of_class: np.ndarray, rng: np.random.Generator, side: int) -> np.ndarray:
    scan = of_class[rng.integers(len(of_class))]
    return np.asarray(Image.fromarray(scan.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR))


def training_files(
    output_dir: Path, seed: int, *, first: bool = True, barrier: Callable[[], None] = lambda: None
) -> tuple[list[str], list[str]]:
    """Data file and image folder of the embedded data set, which the `first` rank writes below the output directory."""
    folder = output_dir / "data"
    path = folder / "train.jsonl"
    if first and not path.exists():
        with guard_writes("the embedded data set", output_dir):
            write(folder, "train", count=TRAIN_ROWS, seed=seed)
    barrier()
    return [str(path)], [str(folder / "images")]


def write(folder: Path, split: Split, count: int, seed: int) -> Path:
    """Write `count` canvases, one question each, as `<split>.jsonl` in VLM-R1's format beside `images/`.

    The solution has the exact box. Two columns are for supervised training: `response` is a completion with a
    sloppy box, `exact_response` one with the exact box."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng, annotator = (np.random.default_rng([seed, split == "held_out", *more]) for more in ([], [1]))
    lines = []
    for i in range(count):
        canvas = draw(rng, split)
        name = f"{split}-{i:05d}.png"
        Image.fromarray(canvas.pixels).save(images / name)
        which = int(rng.integers(len(canvas.boxes)))
        box, label = canvas.boxes[which], canvas.labels[which]
        conversations = [
            {"from": "human", "value": f"<image>{question(label)}"},
            {"from": "gpt", "value": f"<answer>{answer(box, label)}</answer>"},
        ]
        responses = {"response": sloppy(canvas, which, annotator), "exact_response": box}
        row = {"id": f"{split}-{i}", "image": name, "conversations": conversations}
        row |= {column: completion_text(canvas, which, each) for column, each in responses.items()}
        lines.append(json.dumps(row) + "\n")
    path = folder / f"{split}.jsonl"
    replace_text(path, "".join(lines))  # atomic: a run that is killed here does not resume with a part of the rows
    return path
