"""`vlmr1 data check` as a command: its exit status, and each fault by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from vlmr1.cli import main

STANDINS = Path(__file__).parents[2] / "data" / "standins"
RECIPES = Path(__file__).parents[3] / "vlmr1" / "recipes"


def check(path, *more):
    return main(["data", "check", *map(str, path), "--images", str(STANDINS / "images"), *more])


def settings_of(recipe):
    return yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())


@pytest.mark.parametrize("recipe", sorted(path.stem for path in STANDINS.glob("*.jsonl")))
def test_rows_of_a_recipe(recipe, capsys):
    settings = settings_of(recipe)
    words = ["--reward_funcs", *settings["reward_funcs"], "--question_template", settings["question_template"]]
    words += ["--accu_reward_method", *settings.get("accu_reward_method", ["iou"])]
    status = check([STANDINS / f"{recipe}.jsonl"], *words, "--reward_mode", settings.get("reward_mode", "strict"))
    assert status == 0, capsys.readouterr().out


def test_a_method_for_each_file(capsys):
    files = [STANDINS / "rec-3b.jsonl", STANDINS / "ovd-3b.jsonl"]
    words = ["--reward_funcs", "accuracy", "--accu_reward_method"]
    assert check(files, *words, "iou:odLength") == check(files, *words, "iou", "odLength") == 0
    assert check(files, *words, "odLength:iou") == check(files, *words, "iou") == 1
    assert check(files[1:], *words, "llm") == 0  # the judge is not asked
    capsys.readouterr()
    assert check(files, *words, "iou", "map", "mcq") == 2
    assert "accu_reward_method has 3 methods for 2 data files" in capsys.readouterr().err


def test_the_mode_decides(tmp_path, capsys):
    """The published code reads a box without area, and needs the tags."""
    path = tmp_path / "rows.jsonl"
    shared = {"image": sorted(path.name for path in (STANDINS / "images").iterdir())[0], "prompt": "<image>?"}
    for solution, strict in (("<answer>[30, 40, 1, 2]</answer>", 1), ("[1, 2, 30, 40]", 0)):
        path.write_text(json.dumps(shared | {"solution": solution}))
        assert check([path], "--reward_funcs", "accuracy") == strict
        assert check([path], "--reward_funcs", "accuracy", "--reward_mode", "vlm_r1") == 1 - strict
