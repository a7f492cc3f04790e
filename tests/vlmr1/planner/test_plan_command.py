"""`vlmr1 plan` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmr1.cli import main

SMALL = ["--model", "tiny", "--image_tokens", "16", "--text_tokens", "40", "--num_generations", "3"]
SMALL += ["--prompts_per_device", "2", "--max_completion_length", "16"]


def test_table_and_json_say_the_same(tmp_path: Path, capsys: Any):
    assert main(["plan", *SMALL, "--gpu", "24GiB", "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "plan.json").read_text())
    peak = figures["peak"]
    assert peak["bytes"] == max(sum(causes.values()) for causes in figures["phases"].values())
    assert f"It fits: the peak is {peak['bytes'] / 2**30:.2f} GiB, in {peak['phase']}; there are 24.00." in said
    assert f"tiny: {figures['parameters'] / 1e9:.2f} billion parameters" in said
    assert figures["fits"] and figures["remedies"] == []
    assert figures["inputs"]["num_generations"] == 3


def test_a_gpu_that_is_too_small(capsys: Any):
    assert main(["plan", *SMALL, "--gpu", "100MiB"]) == 0
    said = capsys.readouterr().out
    assert "It does not fit: the peak is" in said
    assert "Nothing fits: it misses by" in said  # the allowance alone is larger


WRONG = {
    "model": (["--model", "Qwen/Qwen9-VL"], "fetches nothing; it knows OpenGVLab/InternVL3-2B-hf"),
    "no model": ([], "--model is not set"),
    "gpu": (["--model", "tiny", "--gpu", "80"], "gpu is '80': a size is expected"),
    "setting": (["--model", "tiny", "--learning_rats", "1"], "unknown setting 'learning_rats'"),
    "optimizer": (["--model", "tiny", "--optim", "adafactor"], "optim=adafactor: .* does not know"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG.keys())
def test_mistakes_are_one_line(words, message, capsys: Any):
    import re

    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error
