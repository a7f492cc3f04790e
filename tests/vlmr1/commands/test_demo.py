"""The demo from end to end, in a few steps; and `vlmr1 evaluate` on its checkpoint."""

import json
import re

import pytest

from vlmr1.cli import main
from vlmr1.commands import demo
from vlmr1.report.progress import read_metrics


@pytest.mark.slow
def test_demo_and_evaluate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "HELD_OUT_ROWS", 20)
    monkeypatch.setattr("vlmr1.tiny.digits.TRAIN_ROWS", 16)
    out = tmp_path / "out"
    changes = ["--max_steps", "3", "--prompts_per_device", "4", "--save_steps", "2", "--use_cpu", "true"]
    assert main(["demo", "--seed", "2", "--output_dir", str(out), *changes]) == 0
    shown = capsys.readouterr().out
    table = dict(re.findall(r"^(\S.*?)\s{2,}(?:\d\.\d+|\d+\.\d+)\s+(\d+\.\d+)$", shown, re.M))
    assert list(table) == [
        "held-out greedy acc@0.5",
        "held-out greedy mean IoU",
        "sampled reward, accuracy",
        "sampled reward, format",
        "completion length, tokens",
        "KL to the reference",
    ]
    assert "16 rows; an update: 4 prompts x 8 generations = 32 sequences on 1 device; 4 updates an epoch" in shown
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.html").read_text()
    assert report.count('<article class="card">') == demo.SHOWN and table["held-out greedy mean IoU"] in report

    data, results = out / "data", tmp_path / "results"
    words = ["evaluate", "--model", str(out / "checkpoint-3"), "--task", "rec", "--output_dir", str(results)]
    words += ["--data", str(data / "held_out.jsonl"), "--images", str(data / "images"), "--max_completion_length", "48"]
    assert main(words) == 0
    (path,) = results.glob("*/results.json")
    mean_iou = json.loads(path.read_text())["metrics"]["mean_iou"]["value"]
    assert f"{mean_iou:.4f}" in capsys.readouterr().out
    assert f"{mean_iou:.3f}" == table["held-out greedy mean IoU"]
