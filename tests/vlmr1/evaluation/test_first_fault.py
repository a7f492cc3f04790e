"""Of several faults in the rows of an evaluation, the first is named."""

from __future__ import annotations

import json

import pytest

from vlmr1.errors import DataError
from vlmr1.evaluation.options import Options
from vlmr1.evaluation.rows import load_rows
from vlmr1.tiny import digits


def test_an_image_before_a_solution(tmp_path):
    """The image of the first row waits for its decoder while the second row is read."""
    digits.write(tmp_path, "held_out", 2, seed=3)
    path = tmp_path / "held_out.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    image = tmp_path / "images" / rows[0]["image"]
    image.write_bytes(image.read_bytes()[:200])
    rows[1]["conversations"][1]["value"] = "no box"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"held_out\.jsonl:1: "):
        load_rows(Options("rec", (str(path),), (str(tmp_path / "images"),)), "qwen2_5_vl")
