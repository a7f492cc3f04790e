"""`vlmr1 data check` as a command: its exit status, and each fault by file and line."""

from __future__ import annotations

import json

from vlmr1.cli import main
from vlmr1.tiny import digits


def test_a_whole_file(tmp_path, capsys):
    digits.write(tmp_path, "train", 3, seed=1)
    words = ["data", "check", str(tmp_path / "train.jsonl"), "--images", str(tmp_path / "images")]
    assert main([*words, "--reward_funcs", "accuracy"]) == 0
    assert "3 rows" in capsys.readouterr().out


def test_every_fault_is_named(tmp_path, capsys):
    digits.write(tmp_path, "train", 4, seed=1)
    path = tmp_path / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["image"] = "gone.png"
    rows[3]["conversations"][1]["value"] = "no box at all"
    path.write_text("\n".join(map(json.dumps, rows)))
    words = ["data", "check", str(path), "--images", str(tmp_path / "images"), "--reward_funcs", "accuracy"]
    assert main(words) == 1
    shown = capsys.readouterr()
    assert f"{path}:2:" in shown.out + shown.err and f"{path}:4:" in shown.out + shown.err
    assert main(["data", "check", str(tmp_path / "nowhere.jsonl"), "--images", str(tmp_path)]) == 2
